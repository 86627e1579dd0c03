"""SDXL base 1.0 and Qwen2-VL-2B shapes on the meta device: parameters of every part against numbers counted by hand."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from easyref.model.adapter import Adapter
from easyref.model.attention import kv_layout, packed_width
from easyref.model.reference import ReferenceEncoder
from easyref.model.shapes import DIFFUSION, MLLM

from .conftest import reference_config


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    """The published unet/config.json of stable-diffusion-xl-base-1.0."""
    with torch.device("meta"):
        return UNet2DConditionModel(**DIFFUSION["stabilityai/stable-diffusion-xl-base-1.0"]["unet"])


# Cross-attentions: 640 wide: 2 blocks x 2 layers down, 3 x 2 up; 1280 wide: 2 x 10 down, 10 in the middle, 3 x 10 up.
LAYERS = {640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 10 + 3 * 10}


def test_sdxl_adapter_has_the_published_size(sdxl: UNet2DConditionModel) -> None:
    before = count(sdxl.parameters())
    assert before == 2_567_463_684  # SDXL base 1.0
    adapter = Adapter.install(sdxl, 64, 8, 8.0, torch.Generator().manual_seed(0))
    assert len(kv_layout(sdxl)) == sum(LAYERS.values()) == 70
    assert packed_width(kv_layout(sdxl)) == sum(n * 2 * c for c, n in LAYERS.items()) == 166_400
    kv = sum(n * 2 * 2048 * c for c, n in LAYERS.items())
    assert count(adapter.parts()["reference_kv"]) == kv == 340_787_200
    # rank x (in + out), rank 8 for a quick test: self q, k, v, out and cross q, out are c -> c; cross k, v are 2048 -> c.
    lora = sum(n * 8 * (6 * 2 * c + 2 * (2048 + c)) for c, n in LAYERS.items())
    assert count(adapter.parts()["lora"]) == lora
    assert count(p for p in sdxl.parameters() if p.requires_grad) == kv + lora
    adapter.uninstall()
    assert count(sdxl.parameters()) == before


@pytest.mark.parametrize("prefix_final_norm", [False, True])
def test_qwen2_vl_2b_encoder_has_the_counted_size(prefix_final_norm: bool) -> None:
    with torch.device("meta"):
        mllm = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**MLLM["Qwen/Qwen2-VL-2B-Instruct"]))
    config = reference_config(num_tokens=64, cross_attention_dim=2048, patch_size=14, prefix_final_norm=prefix_final_norm)
    parts = ReferenceEncoder(mllm, config, torch.Generator().manual_seed(0)).parts()
    d, kv, ff = 1536, 2 * 128, 8960
    layer = (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * ff + 2 * d
    v = 1280
    block = 2 * 2 * v + (3 * v * v + 3 * v) + (v * v + v) + (v * 4 * v + 4 * v) + (4 * v * v + v)
    merger = 2 * v + (4 * v) ** 2 + 4 * v + 4 * v * d + d
    vision = v * 3 * 2 * 14 * 14 + 32 * block + merger
    assert {tag: count(part) for tag, part in parts.items()} == {
        "reference_tokens": 64 * d,
        "final_layer": layer + d,
        "projector": d * d + d + d * 2048 + 2048 + 2 * 2048,
        "vision": vision,
        "mllm": 151_936 * d + 27 * layer + (d if prefix_final_norm else 0),
    }
    total = vision + 151_936 * d + 28 * layer + d
    assert total == 2_208_985_600  # Qwen2-VL-2B-Instruct
