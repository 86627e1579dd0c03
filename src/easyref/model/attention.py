"""Decoupled cross-attention through diffusers' own IP-Adapter seams.

out = Attn(q, K_text, V_text) + scale * Attn(q, K_ref, V_ref): two softmaxes (IP-Adapter, arXiv 2308.06721; EasyRef section 3).
diffusers' `IPAdapterAttnProcessor2_0` computes exactly that from `added_cond_kwargs["image_embeds"]`, in every SDXL pipeline
(`ip_adapter_image_embeds`, regional `ip_adapter_masks`, `set_ip_adapter_scale`). We reuse it and change only its two projections:
they also read their result from PRECOMPUTED keys and values. In the common case of those (no masks) the same sums are done here with
fewer passes over memory: heads merged once, not twice, the scale within the addition, no division by one.

The payload `image_embeds=[payload]` is either
- tokens [B, 1, T, X]: each layer projects them, in every step (training), or
- packed K/V [B, 1, T, W] of `pack_reference_kv`: computed once an image, each layer takes its columns (inference, export).
The last axis tells which; nothing is stored on the processor between calls.

Letters: B batch · T reference tokens · X cross-attention width · C width of one attention layer · W sum of 2C over layers ·
S pixels · L text tokens · H heads · E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn


class KVSlot(NamedTuple):
    """Where one cross-attention lies in the packed K/V: keys at [offset, offset + width), values right after."""

    name: str  # module path of the Attention in the UNet
    width: int
    offset: int


class ReferenceProjection(nn.Linear):
    """Linear X -> C without bias on tokens; on packed K/V it takes its own C columns instead."""

    def __init__(self, weight_CX: Tensor, offset: int, packed_width: int) -> None:
        nn.Module.__init__(self)  # not Linear's, for the same reason as in the processor below
        self.out_features, self.in_features = weight_CX.shape
        self.offset, self.packed_width = offset, packed_width
        self.weight = nn.Parameter(weight_CX.detach().clone())
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """[..., X] or [..., W] -> [..., C]."""
        if input.shape[-1] == self.in_features:
            return F.linear(input, self.weight)
        if input.shape[-1] != self.packed_width:
            raise ValueError(
                f"image_embeds are {input.shape[-1]} wide; give reference tokens ({self.in_features} wide) "
                f"or the result of pack_reference_kv ({self.packed_width} wide)"
            )
        return input[..., self.offset : self.offset + self.out_features]


class ReferenceAttnProcessor(IPAdapterAttnProcessor2_0):
    """diffusers' IP-Adapter processor with one adapter whose K_ref/V_ref start as copies of the layer's to_k/to_v."""

    def __init__(self, attn: Attention, num_tokens: int, scale: float, offset: int, packed_width: int) -> None:
        k_CX, v_CX = attn.to_k.weight, attn.to_v.weight
        # No tokens, so no projections of its own: it would draw random weights to throw away.
        super().__init__(k_CX.shape[0], k_CX.shape[1], num_tokens=(), scale=[])
        self.num_tokens = (num_tokens,)
        self.scale = [scale]
        self.to_k_ip = nn.ModuleList([ReferenceProjection(k_CX, offset, packed_width)])
        self.to_v_ip = nn.ModuleList([ReferenceProjection(v_CX, offset + k_CX.shape[0], packed_width)])

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Tensor | None = None,
        temb: Tensor | None = None, scale: float = 1.0, ip_adapter_masks: Any = None,
    ) -> Tensor:  # fmt: skip
        """hidden_states [B, S, C], encoder_hidden_states: text [B, L, X] and [payload] -> [B, S, C]. The names are diffusers'."""
        k: Any = self.to_k_ip[0]
        text_BLX, images = encoder_hidden_states if isinstance(encoder_hidden_states, tuple) else (None, [])
        usual = len(images) == 1 and images[0].shape[-1] == k.packed_width and hidden_states.ndim == 3 and not attn.norm_cross
        rare = (attention_mask, ip_adapter_masks, attn.spatial_norm, attn.group_norm)
        if not usual or any(option is not None for option in rare) or isinstance(self.scale[0], list):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks)
        q_BHSE = _heads(attn.to_q(hidden_states), attn.heads)
        k_BHLE, v_BHLE = _heads(attn.to_k(text_BLX), attn.heads), _heads(attn.to_v(text_BLX), attn.heads)
        out_BHSE = F.scaled_dot_product_attention(q_BHSE, k_BHLE, v_BHLE)
        if self.scale[0] != 0:
            own = images[0][:, 0, :, k.offset : k.offset + 2 * k.out_features].unflatten(-1, (2, attn.heads, -1))
            k_BHTE, v_BHTE = own.permute(2, 0, 3, 1, 4).contiguous()  # rows lie W apart: slower to read than to copy
            out_BHSE = out_BHSE.add(F.scaled_dot_product_attention(q_BHSE, k_BHTE, v_BHTE), alpha=self.scale[0])
        out_BSC = attn.to_out[1](attn.to_out[0](out_BHSE.transpose(1, 2).flatten(2)))
        if attn.residual_connection:
            out_BSC = out_BSC + hidden_states
        return out_BSC if attn.rescale_output_factor == 1 else out_BSC / attn.rescale_output_factor


def _heads(x_BSC: Tensor, heads: int) -> Tensor:
    """[B, S, C] -> [B, H, S, E]."""
    return x_BSC.unflatten(-1, (heads, -1)).transpose(1, 2)


def kv_layout(unet: UNet2DConditionModel) -> list[KVSlot]:
    """All cross-attentions of the UNet (module names `attn2`) in packing order, the order of `unet.attn_processors`."""
    slots: list[KVSlot] = []
    offset = 0
    for processor_name in unet.attn_processors:
        name = processor_name.removesuffix(".processor")
        if name.endswith("attn2"):
            attn: Any = unet.get_submodule(name)
            width = attn.to_k.out_features
            slots.append(KVSlot(name, width, offset))
            offset += 2 * width
    return slots


def packed_width(layout: Sequence[KVSlot]) -> int:
    """W."""
    return sum(2 * slot.width for slot in layout)


def processors(unet: UNet2DConditionModel) -> dict[str, ReferenceAttnProcessor]:
    """Our processors by the name of their Attention, in packing order."""
    return {name.removesuffix(".processor"): p for name, p in unet.attn_processors.items() if isinstance(p, ReferenceAttnProcessor)}


def reference_kv(unet: UNet2DConditionModel, tokens_BTX: Tensor) -> list[tuple[Tensor, Tensor]]:
    """K_BTC and V_BTC of every cross-attention, in packing order. They do not depend on the timestep: once an image."""
    return [(p.to_k_ip[0](tokens_BTX), p.to_v_ip[0](tokens_BTX)) for p in processors(unet).values()]


def pack_reference_kv(kv: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The `image_embeds` payload [B, 1, T, W] that holds all keys and values."""
    return torch.cat([part_BTC for pair in kv for part_BTC in pair], dim=-1)[:, None]


Scales = Mapping[str, Any]  # numbers by block, nested as diffusers' set_ip_adapter_scale takes them


def set_scale(unet: UNet2DConditionModel, scale: float | Scales) -> None:
    """Set lambda of every cross-attention, or of those that are named (`named_scales`); the others stay as they are."""
    ours = processors(unet)
    for name, value in named_scales(unet, scale).items():
        ours[name].scale[0] = value


def named_scales(unet: UNet2DConditionModel, scale: float | Scales) -> dict[str, float]:
    """lambda of the cross-attentions that `scale` names, by their names. ValueError for a name that none has.

    By the start of the module's name (`{"up_blocks.0": 0.5}`), or as diffusers' `set_ip_adapter_scale` has it
    (`{"down": 0.5, "up": {"block_0": [0.0, 1.0, 0.0]}}`: a number for a part, a block or each transformer of a block).
    """
    ours = processors(unet)
    if not isinstance(scale, Mapping):
        return dict.fromkeys(ours, scale)
    chosen: dict[str, float] = {}
    for start, value in _flat(scale):
        named = [name for name in ours if f"{name}.".startswith(f"{start}.")]
        if not named:
            raise ValueError(f"no cross-attention starts with {start!r}; names are like {next(iter(ours), '')!r}")
        chosen |= dict.fromkeys(named, value)
    return chosen


def blocks(unet: UNet2DConditionModel) -> list[str]:
    """The blocks that have cross-attention, from the input to the output: names that `set_scale` takes."""
    found = {name.split(".attentions")[0] for name in processors(unet)}
    return sorted(found, key=lambda name: ("dmu".index(name[0]), name))  # down, mid, up


def scales(unet: UNet2DConditionModel) -> tuple[float, ...]:
    """lambda of every cross-attention, in packing order."""
    return tuple(processor.scale[0] for processor in processors(unet).values())


def _flat(scale: Scales, within: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by the start of a module's name."""
    for key, value in scale.items():
        start = within + {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}.get(key, key.removeprefix("block_"))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}.")
        elif isinstance(value, Sequence):
            yield from ((f"{start}.attentions.{number}", one) for number, one in enumerate(value))
        else:
            yield start, float(value)
