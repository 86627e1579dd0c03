"""Tiny real models: a Qwen2-VL of 0.1 M parameters with its own tokenizer, and an SDXL-shaped UNet of 0.35 M."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from easyref.model.reference import ReferenceConfig, ReferenceEncoder, ReferenceProcessor

torch.set_num_threads(1)

T, D, X = 6, 32, 48  # reference tokens, LLM width, UNet cross-attention width
GRID = 8  # pixels of the side of one merged image token
SPECIAL = [f"<|{w}|>" for w in ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]]
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["a red cat on a blue chair", "the provided images, described in this prompt"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def reference_config(**changes: Any) -> ReferenceConfig:
    values: dict[str, Any] = {
        "num_tokens": T, "cross_attention_dim": X, "prefix_final_norm": False, "final_layer_attention": "bidirectional",
        "positions": "mrope", "min_pixels": 4 * GRID**2, "max_pixels": 16 * GRID**2, "patch_size": 4, "merge_size": 2,
        "temporal_patch_size": 2, "max_references": 5,
    }  # fmt: skip
    return ReferenceConfig(**(values | changes))


@pytest.fixture(scope="session")
def make_mllm(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Qwen2VLForConditionalGeneration]:
    """A Qwen2-VL with random weights, biases and norms, so that no term can hide behind a zero or a one."""

    def make(seed: int = 0) -> Qwen2VLForConditionalGeneration:
        ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
        config = Qwen2VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": D, "intermediate_size": 80, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
                "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 2, "embed_dim": 32, "hidden_size": D, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        )  # fmt: skip
        model = Qwen2VLForConditionalGeneration(config).eval()
        randomize(model, seed)
        return model

    return make


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Matrices keep their inputs' size; vectors are biases and norm weights.
        parameter.data.copy_(noise / parameter[0].numel() ** 0.5 * 1.5 if parameter.ndim > 1 else 0.6 + 0.3 * noise)


@pytest.fixture(scope="session")
def processor(tokenizer: PreTrainedTokenizerFast) -> ReferenceProcessor:
    return ReferenceProcessor(tokenizer, reference_config())


@pytest.fixture(scope="session")
def make_encoder(make_mllm: Callable[..., Qwen2VLForConditionalGeneration]) -> Callable[..., ReferenceEncoder]:
    """An encoder in fp64 with random norms (a fresh norm is all ones)."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **switches: Any) -> ReferenceEncoder:
        config = reference_config(**switches)
        encoder = ReferenceEncoder(make_mllm(seed), config, torch.Generator().manual_seed(seed)).eval()
        randomize(encoder.projector, seed + 1)
        return encoder.to(dtype)

    return make


def picture(seed: int, width: int = 24, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Numbers of references and sizes that differ within the batch.
REFERENCES = [
    [picture(0, 24, 24), picture(1, 32, 16), picture(2, 16, 40)],
    [picture(3, 20, 20)],
    [picture(4, 60, 12), picture(5, 24, 24)],
]
PROMPTS = ["a red cat", "a blue chair with a very long description of it", ""]


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet2DConditionModel]:
    def make(seed: int = 0) -> UNet2DConditionModel:
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=X,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        ).eval()  # fmt: skip
        randomize(unet, seed)
        return unet

    return make


def unet_inputs(seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    return {
        "sample": draw(batch, 4, 8, 8),
        "timestep": torch.tensor(37),
        "encoder_hidden_states": draw(batch, 7, X),
        "added_cond_kwargs": {
            "text_embeds": draw(batch, 32),
            "time_ids": draw(batch, 6),
            "image_embeds": [draw(batch, 1, T, X)],
        },
    }
