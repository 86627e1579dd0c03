"""Checkpoint folder of EasyRef: `easyref.safetensors` (all trained tensors) + `config.json`.

Tensor names: `encoder.` + names of ReferenceEncoder, `adapter.` + names of Adapter. `encoder.mllm.*` is there only if the MLLM
was trained (warm start, stages 2-3); otherwise the base model of `config.json` supplies it. Writes are atomic: temp, fsync, rename.
The config also stands in the safetensors header, so that an interrupted overwrite is found out instead of half believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyref.model.adapter import Adapter
from easyref.model.reference import ReferenceConfig, ReferenceEncoder
from easyref.model.schedule import AS_BASE, Schedule
from easyref.records import atomic_path, write_bytes

FORMAT_VERSION: Final = 1
WEIGHTS, CONFIG = "easyref.safetensors", "config.json"
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointConfig(BaseModel):
    """Everything besides the tensors that is needed to build the model again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    reference: ReferenceConfig
    lora_rank: int | None  # None: no LoRA tensors
    lora_alpha: float | None
    has_mllm: bool  # whether encoder.mllm.* is in the file
    mllm_id: str  # folder or hub id of the base Qwen2-VL
    mllm_revision: str | None
    base_id: str  # folder or hub id of the base diffusion pipeline
    base_revision: str | None
    schedule: Schedule = AS_BASE  # of noise, where it is not the base's


def tensors(encoder: ReferenceEncoder, adapter: Adapter, with_mllm: bool) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their name in the file (not copied)."""
    named = {f"encoder.{k}": v for k, v in encoder.state_dict().items() if with_mllm or not k.startswith("mllm.")}
    return named | {f"adapter.{k}": v for k, v in adapter.state_dict().items()}


def save(folder: Path, named: Mapping[str, Tensor], config: CheckpointConfig, dtype: torch.dtype) -> None:
    """Write a checkpoint of `tensors(...)` (or of the same names gathered from shards), stored as `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: t.detach().to("cpu", dtype).contiguous() for name, t in named.items()}
    text = config_text(config)
    with atomic_path(folder / WEIGHTS) as path:
        save_file(stored, path, metadata={"config": text})  # one key: several are written in no fixed order
    write_bytes(folder / CONFIG, text.encode())


def config_text(config: CheckpointConfig) -> str:
    """What stands in `config.json` and, under the key `config`, in the header of the weights."""
    return config.model_dump_json(indent=2) + "\n"


def read_config(folder: Path) -> CheckpointConfig:
    """The config of a checkpoint folder. ValueError if it is absent, unknown or not the one its weights were saved with."""
    try:
        data = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("config", "null"))
        if data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version")
            raise ValueError(f"{folder}: format version {found}, this easyref reads {FORMAT_VERSION}; convert it first")
        if data != header:
            raise ValueError(f"{folder}: {CONFIG} is not the one {WEIGHTS} was saved with; fetch the folder again")
        return CheckpointConfig.model_validate(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: no whole safetensors file ({error}); fetch the folder again") from error
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {CONFIG} or no {WEIGHTS}; give the folder of a checkpoint") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{folder / CONFIG}: {where}: {first['msg']}; fetch the folder again") from error


def load(folder: Path, encoder: ReferenceEncoder, adapter: Adapter, fresh_lora: bool = False) -> CheckpointConfig:
    """Load a checkpoint into an encoder and adapter built over its base models; every name and shape must fit.

    `fresh_lora`: stage 2 starts from a stage-1 checkpoint, which has no LoRA; the adapter's LoRA then stays as initialised.
    """
    adapter.require_unmerged()
    config = read_config(folder)
    _check_reference(folder, encoder.config, config.reference)
    expected = tensors(encoder, adapter, config.has_mllm)
    if fresh_lora and config.lora_rank is None:
        expected = {name: t for name, t in expected.items() if not name.startswith("adapter.lora.")}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        faults = misfit({name: tuple(t.shape) for name, t in expected.items()}, found)
        if faults:
            raise ValueError(f"{folder / WEIGHTS} does not fit: {faults}; build the model from the checkpoint's config")
        with torch.no_grad():
            for name, target in expected.items():  # one tensor at a time: no second copy of the model in memory
                target.copy_(file.get_tensor(name))
    return config


def _check_reference(folder: Path, ours: ReferenceConfig, theirs: ReferenceConfig) -> None:
    # max_references is a limit of use, not of the weights: 28 in training, more at inference.
    for field in sorted(set(ReferenceConfig.model_fields) - {"max_references"}):
        if getattr(ours, field) != getattr(theirs, field):
            raise ValueError(
                f"{folder} was trained with {field}={getattr(theirs, field)!r}, the encoder has "
                f"{getattr(ours, field)!r}; build the encoder from the checkpoint's config"
            )


def misfit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Missing, extra and misshapen tensors by name and shape, a few of each and how many more; empty if all fit."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{n} {list(found[n])} instead of {list(expected[n])}"
        for n in sorted(expected.keys() & found.keys())
        if found[n] != expected[n]
    ]
    return "; ".join(_few(k, v) for k, v in (("missing", missing), ("extra", extra), ("misshapen", shapes)) if v)


def _few(kind: str, names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{kind}: {', '.join(names[:3])}{rest}"
