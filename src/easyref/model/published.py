"""Names of the published EasyRef weights; no other file knows them.

Read from the published code (github.com/TempleX98/EasyRef, with transformers 4.45 and diffusers 0.22). One safetensors file holds
  image_proj_model.proj.{0,2,3}.*   projector: Linear, GELU, Linear, LayerNorm
  mllm_final_layer.*                `reference_tokens`, the last layer as `layers.0.*`, `norm.weight`
  multimodal_llm.*                  `visual.*` and `model.*` (embed_tokens, all layers but the last, its own norm): from stage 2 on
  unet.ATTENTION.processor.*        `to_{k,v}_ip.weight`; from stage 2 on `to_{q,k,v,out}_lora.{down,up}.weight`, added with scale 1
and what a training of that code saves besides, which is dropped by rule (`sort`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

NAMES: Final = (  # ours, theirs
    (r"encoder\.projector\.hidden\.", r"image_proj_model.proj.0."),
    (r"encoder\.projector\.out\.", r"image_proj_model.proj.2."),
    (r"encoder\.projector\.norm\.", r"image_proj_model.proj.3."),
    (r"encoder\.(reference_tokens|norm\.)", r"mllm_final_layer.\1"),
    (r"encoder\.final_layer\.", r"mllm_final_layer.layers.0."),
    (r"encoder\.mllm\.visual\.", r"multimodal_llm.visual."),
    (r"encoder\.mllm\.language_model\.", r"multimodal_llm.model."),
    (r"adapter\.reference_kv\.(.+)\.([kv])\.", r"unet.\1.processor.to_\2_ip."),
    (r"adapter\.lora\.(.+)\.to_(q|k|v|out)(?:\.0)?\.(down|up)\.", r"unet.\1.processor.to_\2_lora.\3."),
)
ALIASES: Final = (  # other spellings that are met
    (r"^module\.", r""),  # saved from within DDP
    (r"^multimodal_llm\.model\.visual\.", r"multimodal_llm.visual."),  # transformers from 4.52 on
    (r"^multimodal_llm\.model\.language_model\.", r"multimodal_llm.model."),
)
TOKENS: Final = "mllm_final_layer.reference_tokens"  # [T, D]
LORA_DOWN: Final = "_lora.down.weight"  # [rank, in]
MLLM: Final = "multimodal_llm."
EMBEDDINGS, HEAD = "multimodal_llm.model.embed_tokens.weight", "multimodal_llm.lm_head.weight"


def published(name: str) -> str:
    """The published name of a tensor of ours."""
    for ours, theirs in NAMES:
        found, hits = re.subn(f"^{ours}", theirs, name)
        if hits:
            return found
    raise AssertionError(f"{name} has no published name")


def sort(file: Path, names: Collection[str], frozen: Collection[str], tied: bool) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names of a file by their published spelling, and apart, by reason, those that EasyRef has no use for.

    `frozen`: the names of the UNet without EasyRef. `tied`: the MLLM's output layer is its embeddings; a file may have either name.

    Raises:
        ValueError: another kind of checkpoint, or a tensor that is there under two spellings.
    """
    kept: dict[str, str] = {}
    for name in sorted(names):
        plain = name
        for alias, usual in ALIASES:
            plain = re.sub(alias, usual, plain)
        if plain in kept:
            raise ValueError(f"{file}: {kept[plain]} and {name} are one tensor under two names; keep one of them")
        kept[plain] = name
    _check_kind(file, kept)
    if tied and EMBEDDINGS not in kept and HEAD in kept:
        kept[EMBEDDINGS] = kept.pop(HEAD)
    reasons = {
        "the frozen UNet": [n for n in kept if n.startswith("unet.") and n.removeprefix("unet.") in frozen],
        "what unet.*.processor has, a second time": [n for n in kept if n.startswith("adapter_modules.")],
        "the MLLM's output layer": [n for n in kept if n == HEAD],
    }
    return kept, {reason: [kept.pop(n) for n in dropped] for reason, dropped in reasons.items() if dropped}


def _check_kind(file: Path, names: Collection[str]) -> None:
    if any(name.startswith(("image_proj.", "ip_adapter.")) for name in names):
        raise ValueError(
            f"{file} is an IP-Adapter checkpoint (image_proj.*, ip_adapter.*), not one of EasyRef; diffusers' load_ip_adapter reads it"
        )
    if not any(name.startswith("mllm_final_layer.") for name in names):
        raise ValueError(f"{file} is no EasyRef checkpoint: of its {len(names)} tensors none is in mllm_final_layer.*")
