"""The encoders as modules with flat tensors in and out, for graphs and engines (ONNX, TensorRT).

The stock reference encoder does not export: it reads lengths of images from tensors and loops over them. Here positions, masks and
places are inputs that the host computes (`flat_inputs`), images are a batch padded to the longest, and the same weights are walked:

vision       patches, place of each in its image, mask        → merged embeddings of each image
prefix       token ids, embeddings, where they go, positions  → states of all layers but the last
aggregator   states, positions, mask, bias                    → T tokens
text         token ids of a CLIP text encoder                 → the states SDXL reads, and with a projection the pooled ones

Letters: B batch · L context tokens · n images · P patches of the longest · M merged embeddings of the longest (P / merge²) ·
K numbers of a patch · D LLM width · T reference tokens · X cross-attention width · H heads · E head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

from easyref.model.reference import PrefixStates, ReferenceEncoder, ReferenceInputs, heads, rotate


def flat_inputs(inputs: ReferenceInputs, mllm: Any, positions: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of `vision` and, without `image_embeds`, of `prefix`. `mllm`: the Qwen2VLModel or one on the meta device; of it only the
    configuration is used. `positions`: mrope or sequential."""
    merge = mllm.config.vision_config.spatial_merge_size
    counts = inputs.image_grid_thw.prod(-1).tolist()
    longest = max(counts)
    patches_nPK = torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in inputs.pixel_values.split(counts)])
    places = get_vision_position_ids(inputs.image_grid_thw, merge).split(counts)
    places_nP2 = torch.stack([F.pad(p, (0, 0, 0, longest - len(p))) for p in places])
    mask_nP = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
    room = longest // merge**2
    rows = torch.cat([i * room + torch.arange(n // merge**2) for i, n in enumerate(counts)])  # of the padded embeddings
    is_image_BL = inputs.mm_token_type_ids_BL == 1
    gather_BL = torch.full_like(inputs.input_ids_BL, -1).masked_scatter(is_image_BL, rows)
    if positions == "sequential":
        positions_3BL = torch.arange(inputs.input_ids_BL.shape[1]).expand(3, *inputs.input_ids_BL.shape).contiguous()
    else:
        positions_3BL, _ = mllm.get_rope_index(
            inputs.input_ids_BL, mm_token_type_ids=inputs.mm_token_type_ids_BL, image_grid_thw=inputs.image_grid_thw,
            attention_mask=inputs.mask_BL,
        )  # fmt: skip
    return (
        {"patches": patches_nPK, "places": places_nP2, "patch_mask": mask_nP},
        {"input_ids": inputs.input_ids_BL, "gather": gather_BL, "positions": positions_3BL, "mask": inputs.mask_BL.bool()},
    )


class Vision(nn.Module):
    def __init__(self, encoder: ReferenceEncoder) -> None:
        super().__init__()
        self.visual: Any = encoder.mllm.visual
        self.merge = encoder.config.merge_size**2

    def forward(self, patches: Tensor, places: Tensor, patch_mask: Tensor) -> Tensor:
        """patches [n, P, K], places int64 [n, P, 2], patch_mask bool [n, P] → [n, M, D]."""
        visual = self.visual
        weight = visual.patch_embed.proj.weight.flatten(1)
        x = F.linear(patches.to(weight.dtype), weight)
        angles = (places[..., None].float() * visual.rotary_pos_emb.inv_freq).flatten(2)
        cos, sin = (torch.cat([f, f], -1)[:, :, None] for f in (angles.cos(), angles.sin()))
        mask = patch_mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        for block in visual.blocks:
            attention = block.attn
            q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
            q, k = (_turn(t.float(), cos, sin).to(v.dtype).transpose(1, 2) for t in (q, k))
            out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask, scale=attention.scaling)
            x = x + attention.proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        merger = visual.merger
        return merger.mlp(merger.ln_q(x).unflatten(1, (-1, self.merge)).flatten(2))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Prefix(nn.Module):
    def __init__(self, encoder: ReferenceEncoder) -> None:
        super().__init__()
        self.lm: Any = encoder.mllm.language_model

    def forward(self, input_ids: Tensor, image_embeds: Tensor, gather: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """input_ids int64 [B, L], image_embeds [n, M, D], gather int64 [B, L] (row of the n·M embeddings; -1: text),
        positions int64 [3, B, L], mask bool [B, L] → [B, L, D]."""
        lm, length = self.lm, input_ids.shape[1]
        words = lm.embed_tokens(input_ids)
        images = image_embeds.flatten(0, 1)[gather.clamp(min=0)].to(words.dtype)
        x = torch.where((gather >= 0)[..., None], images, words)
        cos, sin = _mrope(positions, lm.rotary_emb, x.dtype)
        place = torch.arange(length, device=x.device)
        see = (place[None] <= place[:, None])[None, None] & mask[:, None, None]
        for layer in lm.layers:
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (heads(f(normed), attention.head_dim) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k, v = (t.repeat_interleave(attention.num_key_value_groups, dim=1) for t in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=see, scale=attention.scaling)
            x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return lm.norm(x)


def _mrope(positions_3BL: Tensor, rotary: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, E]: a section of the frequencies each for the temporal, height and width position."""
    angles = positions_3BL[..., None].float() * rotary.inv_freq
    parts = torch.cat([part[i % 3] for i, part in enumerate(angles.split(rotary.mrope_section, dim=-1))], -1)
    both = torch.cat([parts, parts], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


class Aggregator(nn.Module):
    def __init__(self, encoder: ReferenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, states: Tensor, positions: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        """states [B, L, D], positions int64 [3, B, L], mask bool [B, L], bias [B, L] → [B, T, X]."""
        return self.encoder.aggregate(PrefixStates(states, mask.long(), positions), bias)


class Text(nn.Module):
    """A CLIP text encoder as SDXL reads it: the states before the last layer; of one with a projection its pooled states too."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.projection: nn.Module | None = getattr(encoder, "text_projection", None)
        self.clip: Any = encoder if self.projection is None else encoder.text_model

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """input_ids int64 [B, L] → [B, L, D] (and [B, P])."""
        clip, (batch, length) = self.clip, input_ids.shape
        *layers, last = clip.encoder.layers
        x = clip.embeddings(input_ids)
        see = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        for layer in layers:
            x = layer(x, see)
        if self.projection is None:
            return x
        normed = clip.final_layer_norm(last(x, see))
        # transformers' rule: the published configs say 2, for a vocabulary whose end has the largest id
        ends = input_ids if clip.eos_token_id == 2 else (input_ids == clip.eos_token_id).int()
        return x, self.projection(normed[torch.arange(batch, device=x.device), ends.argmax(-1)])
