"""`easyref convert`: the published EasyRef weights into a checkpoint folder, and back.

What must be in a file is asked of the models themselves, built on torch's meta device over the shapes of their base models; what its
tensors are called stands in model/published.py. What does not fit is listed and nothing is written. One tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import Any

import torch

from easyref.config import Params, load_params
from easyref.model import shapes, stream, weights
from easyref.model.adapter import Adapter
from easyref.model.published import EMBEDDINGS, HEAD, LORA_DOWN, MLLM, TOKENS, published, sort
from easyref.model.reference import SWITCHES, ReferenceEncoder
from easyref.model.schedule import AS_BASE
from easyref.model.stream import Entry
from easyref.model.weights import CONFIG, WEIGHTS, CheckpointConfig
from easyref.records import atomic_folder, atomic_path
from easyref.training.models import DTYPES, base_ids, reference_config

RELEASED = SWITCHES["released"] | {"layer": -1}  # what the published code does, whatever its weights


def convert(source: Path, out: Path, params: Path, dtype: str, trust_pickle: bool) -> list[str]:
    """A published file → checkpoint folder `out`, or a checkpoint folder → published file `out`. Returns what to tell the user.

    `params` names the base models of a file, and the limits on references and pixels that its folder gets. `dtype`: a name of DTYPES,
    or `stored` for each tensor's own.
    """
    try:
        if source.is_dir():
            return to_file(source, out, DTYPES.get(dtype))
        return to_folder(load_params(params), source, out, DTYPES.get(dtype), trust_pickle)
    except OSError as error:
        raise RuntimeError(f"{out}: {error.strerror or error}; nothing was written") from error


def to_folder(params: Params, file: Path, out: Path, dtype: torch.dtype | None, trust_pickle: bool) -> list[str]:
    """The published form → ours; a folder `out` is replaced whole, or stays as it is."""
    with atomic_folder(out) as folder, stream.as_safetensors(file, trust_pickle, folder) as source:
        found = stream.entries(source)
        config, origin, left_out = fit(params, file, found, out)
        named = {ours: _entry(found[theirs], dtype) for ours, theirs in origin.items()}
        text = weights.config_text(config)
        stream.write(folder / WEIGHTS, named, lambda ours: stream.read(source, origin[ours]), {"config": text}, "convert")
        (folder / CONFIG).write_text(text)
    more = {reason: f" and {len(names) - 1} more" if len(names) > 1 else "" for reason, names in left_out.items()}
    return [*(f"left out, {reason}: {names[0]}{more[reason]}" for reason, names in left_out.items()), _summary(out, named, config)]


def fit(
    params: Params, file: Path, found: Mapping[str, Entry], out: Path
) -> tuple[CheckpointConfig, dict[str, str], dict[str, list[str]]]:
    """What becomes of the tensors `found` in a published file: the checkpoint's config, for each of its tensors the name in the file,
    and by reason the names that are left out.

    Raises:
        ValueError: anything else is missing, extra or of another shape.
    """
    ids = base_ids(params)
    models = _models(ids["diffusion"][0], ids["mllm"][0], out)
    kept, left_out = sort(file, found, models["unet"].state_dict(), models["mllm"].config.tie_word_embeddings)
    theirs = {name: found[stored] for name, stored in kept.items()}
    ranks = [entry.shape[0] for name, entry in theirs.items() if name.endswith(LORA_DOWN) and entry.shape]
    rank = mode(ranks) if ranks else None
    tokens = {"num_tokens": theirs[TOKENS].shape[0]} if TOKENS in theirs and theirs[TOKENS].shape else {}
    released = params.model_copy(update={"reference": params.reference.model_copy(update=RELEASED | tokens)})
    config = CheckpointConfig(
        reference=reference_config(released, models["mllm"].config, models["unet"].config.cross_attention_dim),
        lora_rank=rank, lora_alpha=float(rank) if rank else None, has_mllm=any(name.startswith(MLLM) for name in kept),
        mllm_id=ids["mllm"][0], mllm_revision=ids["mllm"][1], base_id=ids["diffusion"][0], base_revision=ids["diffusion"][1],
    )  # fmt: skip
    expected = _expected(models, config)
    _check(file, {published(ours): shape for ours, shape in expected.items()}, theirs, config)
    return config, {ours: kept[published(ours)] for ours in expected}, left_out


def to_file(folder: Path, out: Path, dtype: torch.dtype | None) -> list[str]:
    """Ours → the published form, for weights with which the published code computes the same."""
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the published code takes a file for a pickle if its name does not end in .safetensors; call it so")
    config = weights.read_config(folder)
    for field, value in RELEASED.items():
        if getattr(config.reference, field) != value:
            raise ValueError(
                f"{folder} was trained with {field}={getattr(config.reference, field)!r}, the published code computes with {value!r}: "
                "its tokens would be others"
            )
    if config.schedule != AS_BASE:
        raise ValueError(f"{folder} was trained with another noise schedule or prediction than its base's; the published code has none")
    if config.lora_alpha != config.lora_rank:
        raise ValueError(f"{folder} adds LoRA {config.lora_alpha}/{config.lora_rank} times, the published code once")
    models = _models(config.base_id, config.mllm_id, folder)
    found = stream.entries(folder / WEIGHTS)
    _check(folder / WEIGHTS, _expected(models, config), found, config)
    origin = {published(ours): ours for ours in found}
    if config.has_mllm and models["mllm"].config.tie_word_embeddings:
        origin[HEAD] = origin[EMBEDDINGS]  # the published training code wants it, though EasyRef has no use for it
    named = {theirs: _entry(found[ours], dtype) for theirs, ours in origin.items()}
    with atomic_path(out) as path:
        stream.write(path, named, lambda theirs: stream.read(folder / WEIGHTS, origin[theirs]), {"format": "pt"}, "convert")
    return [_summary(out, named, config)]


def _models(base_id: str, mllm_id: str, checkpoint: Path) -> dict[str, Any]:
    """The base models without weights; those trained here have their configs beside the checkpoint folder."""
    with torch.device("meta"):
        return shapes.build(shapes.configs(base_id, mllm_id, checkpoint.parent / "base"))


def _expected(models: Mapping[str, Any], config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint; EasyRef is put into `models`."""
    encoder = ReferenceEncoder(models["mllm"], config.reference, torch.Generator())
    adapter = Adapter.install(models["unet"], config.reference.num_tokens, config.lora_rank, config.lora_alpha, torch.Generator())
    return {name: tuple(tensor.shape) for name, tensor in weights.tensors(encoder, adapter, config.has_mllm).items()}


def _check(where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Entry], config: CheckpointConfig) -> None:
    faults = weights.misfit(expected, {name: entry.shape for name, entry in found.items()})
    if faults:
        raise ValueError(f"{where} does not fit {config.base_id} with {config.mllm_id}: {faults}")


def _entry(entry: Entry, dtype: torch.dtype | None) -> Entry:
    return entry._replace(dtype=dtype or entry.dtype)


def _summary(out: Path, named: Mapping[str, Entry], config: CheckpointConfig) -> str:
    size = sum(entry.nbytes for entry in named.values()) / 2**30
    mllm = "its own MLLM" if config.has_mllm else "the base's MLLM"
    lora = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "no LoRA"
    return f"{out}: {len(named)} tensors, {size:.2f} GiB, {config.reference.num_tokens} reference tokens, {mllm}, {lora}"
