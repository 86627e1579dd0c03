"""Put EasyRef into a UNet and take it out again.

The UNet is frozen in all stages; the adapter's own tensors are the reference K/V of every cross-attention and, from stage 2
on, LoRA. State names (stable, ours):
  reference_kv.<path of the cross-attention>.{k,v}.weight     [C, X]
  lora.<path of the projection>.{down,up}.weight              [rank, in], [out, rank]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from easyref.model import attention, lora


class Adapter:
    """EasyRef inside one UNet. Build it with `install`."""

    def __init__(self, unet: UNet2DConditionModel, lora_rank: int | None) -> None:
        self.unet = unet
        self.lora_rank = lora_rank
        self._before_processors = dict(unet.attn_processors)
        self._config = cast(Any, unet.config)  # diffusers types it as a dict
        self._before_hid_type = self._config.encoder_hid_dim_type
        self._before_grad = {p: p.requires_grad for p in unet.parameters()}
        self._merged: lora.Merged | None = None
        self.installed = True

    @classmethod
    def install(
        cls,
        unet: UNet2DConditionModel,
        num_tokens: int,
        lora_rank: int | None,
        lora_alpha: float | None,
        generator: torch.Generator | None = None,
        scale: float = 1.0,
    ) -> Self:
        """Freeze the UNet, add reference K/V (copies of its to_k/to_v) and, if `lora_rank` is set, LoRA.

        `generator` draws the LoRA's down matrices and is needed only then. Device and dtype are the UNet's.
        """
        _check_free(unet)
        if lora_rank is not None and (lora_alpha is None or generator is None):
            raise ValueError("LoRA needs lora_alpha and a generator; give both, or lora_rank=None")
        adapter = cls(unet, lora_rank)
        unet.requires_grad_(False)
        adapter._install_attention(num_tokens, scale)
        if lora_rank is not None and lora_alpha is not None and generator is not None:
            lora.add(unet, lora_rank, lora_alpha, generator)
        for parameter in (p for part in adapter.parts().values() for p in part):
            parameter.requires_grad_(True)
        return adapter

    def uninstall(self) -> None:
        """Give the UNet back as it was: weights, processors, config and requires_grad. Once done, done again does nothing."""
        if not self.installed:
            return
        self.installed = False
        if self._merged is not None:
            lora.restore(self.unet, self._merged)
            self._merged = None
        elif self.lora_rank is not None:
            lora.remove(self.unet)
        self.unet.set_attn_processor(dict(self._before_processors))  # it empties the dict it is given
        self.unet.encoder_hid_proj = None
        self._config.encoder_hid_dim_type = self._before_hid_type
        for parameter, grad in self._before_grad.items():
            parameter.requires_grad_(grad)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the names that the stages table uses. "lora" is empty without LoRA."""
        return {
            tag: [p for name, p in self.named_parameters().items() if name.startswith(f"{tag}.")] for tag in ("reference_kv", "lora")
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's own tensors, detached, not copied."""
        self.require_unmerged()
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` in; its names must be exactly those of `state_dict`."""
        self.require_unmerged()
        own = self.named_parameters()
        if state.keys() != own.keys():
            odd = sorted(state.keys() ^ own.keys())
            raise ValueError(f"adapter state does not fit: {odd[0]} and {len(odd) - 1} more are only on one side")
        for name, parameter in own.items():
            parameter.data.copy_(state[name])

    def set_scale(self, scale: float | attention.Scales) -> None:
        """lambda; see `attention.set_scale`."""
        attention.set_scale(self.unet, scale)

    def payload(self, tokens_BTX: Tensor) -> Tensor:
        """Packed K/V [B, 1, T, W]: give it as `image_embeds` / `ip_adapter_image_embeds` instead of tokens [B, 1, T, X]."""
        return attention.pack_reference_kv(attention.reference_kv(self.unet, tokens_BTX))

    def merge_lora(self) -> None:
        """Fold LoRA into the weights: no cost per step. Keeps the original weights (CPU memory) and LoRA for `unmerge_lora`."""
        if self.lora_rank is not None and self._merged is None:
            self._merged = lora.merge(self.unet)

    def unmerge_lora(self) -> None:
        """Back to the original weights, bit for bit."""
        if self._merged is not None:
            lora.unmerge(self.unet, self._merged)
            self._merged = None

    def require_unmerged(self) -> None:
        """A merged LoRA is not there to be read, and loading weights under it would leave it in the UNet."""
        if self._merged is not None:
            raise ValueError("LoRA is merged into the UNet; call unmerge_lora() before its weights are read or loaded")

    def _install_attention(self, num_tokens: int, scale: float) -> None:
        unet, layout = self.unet, attention.kv_layout(self.unet)
        width = attention.packed_width(layout)
        if width == self._config.cross_attention_dim:
            raise ValueError(f"packed K/V and tokens are both {width} wide: this UNet is too small to tell them apart")
        new = dict(self._before_processors)
        for slot in layout:
            attn: Any = unet.get_submodule(slot.name)
            ours = attention.ReferenceAttnProcessor(attn, num_tokens, scale, slot.offset, width)
            new[f"{slot.name}.processor"] = ours
        unet.set_attn_processor(new)
        # Our tokens come projected already.
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([nn.Identity()])
        self._config.encoder_hid_dim_type = "ip_image_proj"  # in memory only: save_pretrained does not write it

    def named_parameters(self) -> dict[str, nn.Parameter]:
        named: dict[str, Any] = {}
        for name, p in attention.processors(self.unet).items():
            named[f"reference_kv.{name}.k.weight"] = p.to_k_ip[0].weight
            named[f"reference_kv.{name}.v.weight"] = p.to_v_ip[0].weight
        for name, (down, up) in lora.layers(self.unet).items():
            named[f"lora.{name}.down.weight"] = down.weight
            named[f"lora.{name}.up.weight"] = up.weight
        return named


def _check_free(unet: UNet2DConditionModel) -> None:
    if unet.encoder_hid_proj is not None:
        raise ValueError("the UNet already has an image adapter (encoder_hid_proj); uninstall it first")
    if getattr(unet, "peft_config", None):
        raise ValueError("the UNet already carries LoRA layers; install EasyRef first, then load other LoRAs")
