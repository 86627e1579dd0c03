"""Checkpoint folders: round trip, atomic writes, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from easyref.model import weights
from easyref.model.adapter import Adapter
from easyref.model.reference import ReferenceEncoder

from .conftest import T, randomize, reference_config

Model = tuple[ReferenceEncoder, Adapter]


@pytest.fixture
def build(make_encoder: Callable[..., ReferenceEncoder], make_unet: Callable[..., Any]) -> Callable[..., Model]:
    def make(seed: int, rank: int | None = None, **switches: Any) -> Model:
        encoder = make_encoder(torch.float32, **switches)
        adapter = Adapter.install(make_unet(), T, rank, 4.0, torch.Generator().manual_seed(seed))
        for tag in ("reference_tokens", "final_layer", "projector"):
            randomize(torch.nn.ParameterList(encoder.parts()[tag]), seed)
        randomize(torch.nn.ParameterList(adapter.parts()["reference_kv"]), seed)
        return encoder, adapter

    return make


def config(rank: int | None = None, has_mllm: bool = False, **switches: Any) -> weights.CheckpointConfig:
    return weights.CheckpointConfig(
        reference=reference_config(**switches), lora_rank=rank, lora_alpha=None if rank is None else 4.0, has_mllm=has_mllm,
        mllm_id="tiny-qwen", mllm_revision=None, base_id="tiny-sdxl", base_revision=None,
    )  # fmt: skip


def save(folder: Path, model: Model, settings: weights.CheckpointConfig, dtype: torch.dtype = torch.float32) -> None:
    weights.save(folder, weights.tensors(*model, settings.has_mllm), settings, dtype)


def everything(model: Model) -> dict[str, Tensor]:
    return weights.tensors(*model, with_mllm=True)


def names(folder: Path) -> list[str]:
    with safe_open(folder / weights.WEIGHTS, framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(("rank", "has_mllm"), [(None, False), (3, True)], ids=["stage 1", "stages 2-3"])
def test_round_trip(tmp_path: Path, build: Callable[..., Model], rank: int | None, has_mllm: bool) -> None:
    one, two = build(1, rank), build(2, rank)
    if has_mllm:
        randomize(one[0].mllm, 7)
    save(tmp_path / "a", one, config(rank, has_mllm))
    assert weights.load(tmp_path / "a", *two) == config(rank, has_mllm)
    for name, tensor in everything(one).items():
        assert torch.equal(everything(two)[name], tensor), name
    assert any(n.startswith("encoder.mllm.") for n in names(tmp_path / "a")) == has_mllm
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "easyref.safetensors"]


@pytest.mark.parametrize("dtype", weights.DTYPES.values())
def test_storage_dtype(tmp_path: Path, build: Callable[..., Model], dtype: torch.dtype) -> None:
    one, two = build(1), build(2)
    save(tmp_path, one, config(), dtype)
    with safe_open(tmp_path / weights.WEIGHTS, framework="pt") as file:
        assert all(file.get_tensor(n).dtype == dtype for n in names(tmp_path))
    weights.load(tmp_path, *two)
    assert torch.equal(two[0].reference_tokens, one[0].reference_tokens.to(dtype).float())
    assert two[0].reference_tokens.dtype == torch.float32


def test_next_stage_starts_its_lora_fresh(tmp_path: Path, build: Callable[..., Model]) -> None:
    one, two = build(1), build(2, rank=3)
    save(tmp_path, one, config())
    with pytest.raises(ValueError, match=r"missing: adapter\.lora\..* and 125 more"):
        weights.load(tmp_path, *two)
    fresh = {k: v.clone() for k, v in two[1].state_dict().items() if k.startswith("lora.")}
    weights.load(tmp_path, *two, fresh_lora=True)
    assert all(torch.equal(two[1].state_dict()[k], v) for k, v in fresh.items())
    assert torch.equal(two[0].reference_tokens, one[0].reference_tokens)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, build: Callable[..., Model]) -> None:
    model = build(1)
    named = weights.tensors(*model, with_mllm=False)
    named["encoder.norm.wait"] = named.pop("encoder.norm.weight")
    named["encoder.reference_tokens"] = torch.zeros(3, 3)
    weights.save(tmp_path, named, config(), torch.float32)
    before = {k: v.clone() for k, v in everything(model).items()}
    with pytest.raises(ValueError) as caught:
        weights.load(tmp_path, *model)
    assert str(caught.value) == (
        f"{tmp_path / 'easyref.safetensors'} does not fit: missing: encoder.norm.weight; extra: encoder.norm.wait; "
        "misshapen: encoder.reference_tokens [3, 3] instead of [6, 32]; build the model from the checkpoint's config"
    )
    assert all(torch.equal(v, before[k]) for k, v in everything(model).items())


def test_switches_must_agree(tmp_path: Path, build: Callable[..., Model]) -> None:
    save(tmp_path, build(1), config())
    with pytest.raises(ValueError, match="trained with positions='mrope', the encoder has 'sequential'"):
        weights.load(tmp_path, *build(1, positions="sequential"))
    weights.load(tmp_path, *build(1, max_references=112))  # a limit of use, not of the weights


def test_edited_or_foreign_config_is_refused(tmp_path: Path, build: Callable[..., Model]) -> None:
    save(tmp_path, build(1), config())
    path = tmp_path / weights.CONFIG
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"base_id": "other"}))
    with pytest.raises(ValueError, match=r"config\.json is not the one easyref\.safetensors was saved with"):
        weights.read_config(tmp_path)
    path.write_text(json.dumps(good | {"format_version": 2}))
    with pytest.raises(ValueError, match="format version 2, this easyref reads 1"):
        weights.read_config(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        weights.read_config(tmp_path)


def test_interrupted_save_keeps_the_old_checkpoint(
    tmp_path: Path, build: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = build(1), build(2)
    save(tmp_path, one, config())

    def dies_half_way(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", dies_half_way)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, two, config())
    weights.load(tmp_path, *two)
    assert torch.equal(two[0].reference_tokens, one[0].reference_tokens)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "easyref.safetensors"]


def test_merged_lora_refuses_a_checkpoint(tmp_path: Path, build: Callable[..., Model]) -> None:
    model = build(1, rank=3)
    save(tmp_path, model, config(rank=3))
    model[1].merge_lora()
    with pytest.raises(ValueError, match="call unmerge_lora"):
        weights.load(tmp_path, *model)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, easyref.model; print([m for m in ('torch', 'transformers', 'diffusers', 'peft') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
