"""LoRA (arXiv 2106.09685) on q, k, v and out of every self- and cross-attention of the UNet, by peft through diffusers.

EasyRef stages 2-3: rank 128, scale = alpha / rank = 1. K_ref/V_ref are trained whole and get no LoRA.
peft under its own adapter name keeps other LoRAs of the user working beside ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

NAME = "easyref"  # peft's adapter name
TARGETS = r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"  # a full match: to_k_ip and to_v_ip stay out


class Merged(NamedTuple):
    """What `merge` took out of the UNet."""

    originals: dict[str, Tensor]  # weights before, on the CPU: a subtraction would not give them back bit for bit
    layers: dict[str, tuple[Tensor, Tensor]]  # (down, up)
    alpha: float


def add(unet: UNet2DConditionModel, rank: int, alpha: float, generator: torch.Generator) -> None:
    """Wrap the attention projections; B = 0, so the UNet computes the same as before."""
    _wrap(unet, rank, alpha)
    for down, _ in layers(unet).values():
        bound = down.in_features**-0.5
        drawn = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
        down.weight.data.copy_(drawn)


def _wrap(unet: UNet2DConditionModel, rank: int, alpha: float) -> None:
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; we overwrite what it drew
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), NAME)  # type: ignore[arg-type]


def remove(unet: UNet2DConditionModel) -> None:
    """Take our LoRA out; the UNet has its plain Linear modules back unless other LoRAs remain."""
    if set(unet.peft_config) == {NAME}:
        unet.unload_lora()
    else:
        unet.delete_adapters(NAME)


def wrapped(unet: UNet2DConditionModel) -> dict[str, Any]:
    """peft's wrappers that carry our LoRA, by module name."""
    return {n: m for n, m in unet.named_modules() if isinstance(m, LoraLayer) and NAME in m.lora_A}


def layers(unet: UNet2DConditionModel) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """(down, up) of every wrapped projection, by module name."""
    return {n: (m.lora_A[NAME], m.lora_B[NAME]) for n, m in wrapped(unet).items()}


def merge(unet: UNet2DConditionModel) -> Merged:
    """W <- W + scale * B A, and our wrappers go: peft leaves out or undoes what is merged in a layer that gets another LoRA."""
    ours = wrapped(unet)
    originals = {n: m.get_base_layer().weight.detach().to("cpu", copy=True) for n, m in ours.items()}
    taken = {n: (down.weight.detach(), up.weight.detach()) for n, (down, up) in layers(unet).items()}
    alpha = unet.peft_config[NAME].lora_alpha
    for module in ours.values():
        module.get_base_layer().weight.data += module.get_delta_weight(NAME)
    remove(unet)
    return Merged(originals, taken, alpha)


def unmerge(unet: UNet2DConditionModel, merged: Merged) -> None:
    """Undo `merge` exactly, with what it returned; other LoRAs stay."""
    restore(unet, merged)
    (down, _), *_ = merged.layers.values()
    _wrap(unet, len(down), merged.alpha)
    for name, pair in layers(unet).items():
        for parameter, taken in zip(pair, merged.layers[name], strict=True):
            parameter.weight.data = taken


def restore(unet: UNet2DConditionModel, merged: Merged) -> None:
    """The weights as they were without our LoRA."""
    for name, original in merged.originals.items():
        module: Any = unet.get_submodule(name)
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        base.weight.data.copy_(original)
