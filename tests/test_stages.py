"""The three stages on the shipped base models and a few real images: stopped anywhere and started again they write the same
bytes, each trains exactly its parts, and a finished stage trains again when asked."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from easyref.config import Params, parse_params
from easyref.data.group import group_images
from easyref.data.shards import ImageStore
from easyref.data.split import split_images
from easyref.records import write_table
from easyref.training import stages

DATA, MODELS = Path("data"), Path("models")
TINY = {"images": 12, "batch": 4, "microbatch": 2, "save_images": 4, "warmup_images": 0, "cooldown_images": 0, "ema_images": 4}


@pytest.fixture(scope="module")
def params() -> Params:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["threads"] = 1
    values["split"] |= {"held_out_groups": 3, "held_in_groups": 3, "samples_per_group": 1, "max_references": 2, "held_out_share": 0.2}
    for name in stages.STAGES:
        values[name] |= TINY
        values[name]["lora_rank"] = 2 if name != "pretrain" else 0
        values[name]["max_references"] = 2 if name == "finetune_multi" else 1
    return parse_params(values)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Path:
    """A project with every 40th concept of the real images, split anew, and the shipped base models."""
    place = tmp_path_factory.mktemp("project")
    shutil.copytree(DATA / "images", place / "data" / "images")
    table = ImageStore(DATA / "images").table
    concepts = table["concept"].unique().sort().to_list()[::40]
    write_table(place / "data" / "images" / "images.parquet", table.filter(table["concept"].is_in(concepts)))
    store = ImageStore(place / "data" / "images")
    for name, part in split_images(store, group_images(store.table, params.group), params.split, 0).items():
        write_table(place / "data" / "split" / f"{name}.parquet", part)
    (place / "models").mkdir()
    (place / "models" / "base").symlink_to((MODELS / "base").resolve())
    return place


def run(name: str, params: Params, place: Path) -> bytes:
    stages.run_stage(params, name, place / "data", place / "models", place / "models" / name, place / "work")
    return (place / "models" / name / "easyref.safetensors").read_bytes()


@pytest.mark.parametrize("name", list(stages.STAGES))
def test_stopped_and_started_again_writes_the_same_bytes(name, params, place, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(name, params, place)
    assert not (place / "work" / f"{name}.safetensors").exists()  # a finished stage leaves no state: the next call trains

    calls, loss = [0], stages._loss

    def stopping(models, inputs, samples, seed, numbers):
        calls[0] += numbers[0].startswith(name)  # not the validation
        if calls[0] == 5:  # in the third update, with checkpoints of the first two
            raise KeyboardInterrupt
        return loss(models, inputs, samples, seed, numbers)

    monkeypatch.setattr(stages, "_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(name, params, place)
    assert (place / "work" / f"{name}.safetensors").exists()
    calls[0] = 100
    assert run(name, params, place) == whole
    assert calls[0] == 102  # only the two microbatches of the last update ran again


def test_each_stage_changes_exactly_its_parts(place: Path) -> None:
    """Reads the checkpoints that the tests above wrote."""
    pretrain, single, multi = (load_file(place / "models" / n / "easyref.safetensors") for n in stages.STAGES)
    assert not [k for k in pretrain if k.startswith(("encoder.mllm.", "adapter.lora."))]
    assert [k for k in single if k.startswith("encoder.mllm.")] and [k for k in single if k.startswith("adapter.lora.")]
    assert single.keys() == multi.keys()
    for before, after in ((pretrain, single), (single, multi)):
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        for part in ("encoder.reference_tokens", "encoder.final_layer.", "encoder.projector.", "adapter.reference_kv."):
            assert any(k.startswith(part) for k in changed), part
    assert any(not torch.equal(single[k], multi[k]) for k in single if k.startswith("encoder.mllm.visual"))
