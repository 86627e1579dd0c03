"""The three stages on the shipped base models and a few real images: killed with SIGKILL anywhere and started again by the same
command they write the same bytes and leave nothing behind; a finished stage trains again; each stage trains exactly its parts."""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from easyref import cli
from easyref.config import load_params, parse_params
from easyref.model import weights
from easyref.records import read_table, write_table
from easyref.training import stages, state
from easyref.training.models import load_models
from tests.processes import exit_code, start
from tests.projects import tiny_project


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"))


def easyref(place: Path, stage: str, last_write: int = 0) -> None:
    """`easyref STAGE` in the folder `place`, killed at its `last_write`-th moment of writing: half of a safetensors file is there,
    another temporary is not renamed yet, a rename is done."""
    writes, replace = itertools.count(1), Path.replace

    def moment(torn: Path | None = None) -> None:
        if next(writes) == last_write:
            if torn:
                os.truncate(torn, torn.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def saving(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata)
        moment(Path(path))

    def replacing(path: Path, target: Path) -> None:
        if path.suffix != ".safetensors":
            moment()
        replace(path, target)
        moment()

    state.save_file = weights.save_file = saving  # type: ignore[assignment]
    Path.replace = replacing  # type: ignore[assignment, method-assign]
    os.chdir(place)
    sys.argv = ["easyref", stage]
    cli.main()


def results(place: Path, stage: str) -> dict[str, bytes]:
    """All that a stage leaves: checkpoint, curves, log; and any temporary or state that it should not leave."""
    found = [*(place / "models" / stage).rglob("*"), *(place / "metrics" / stage).rglob("*"), *(place / ".work").rglob(f"*{stage}*")]
    read = {path: path.read_bytes() if path.is_file() else b"folder" for path in found}
    return {str(path.relative_to(place)): b"speed" if path.suffix == ".speed" else data for path, data in read.items()}


def whole(place: Path, stage: str) -> tuple[dict[str, bytes], float]:
    """What a run that nobody disturbs leaves, taken away, and its seconds; it left no state, so the next start trains again."""
    begin = time.monotonic()
    assert exit_code(start(easyref, place, stage)) == 0
    expected = results(place, stage)
    assert {path.rsplit("/", 1)[1] for path in expected} == {
        f"{stage}.jsonl", f"{stage}.speed", "loss.json", "held_out.json", "config.json", "easyref.safetensors",
        *(["align"] if stage == "pretrain" else []),
    }  # fmt: skip
    shutil.rmtree(place / "models" / stage)
    return expected, time.monotonic() - begin


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_write_and_started_again_leaves_the_same_bytes(place: Path, every: int) -> None:
    """Each start dies `every` moments of writing later than the one before, from the first again once the state has moved on."""
    expected, _ = whole(place, "pretrain")
    kills, last_write, before = 0, 1, b""
    states = [place / ".work" / f"{name}.safetensors" for name in ("align", "pretrain")]
    while (code := exit_code(start(easyref, place, "pretrain", last_write))) == -signal.SIGKILL and kills < 80:
        kills += 1
        now = b"".join(path.read_bytes() for path in states if path.exists())
        last_write, before = 1 if now != before else last_write + every, now
    assert code == 0
    assert results(place, "pretrain") == expected
    # align: first save; log cut, second save. Then, each start cutting align's log too: first save; log cut, second save; log cut,
    # weights, config, four curves
    assert kills == (2 + 4) + (4 + 6 + 16) if every == 1 else kills >= 6


def test_killed_at_random_and_started_again_leaves_the_same_bytes(place: Path) -> None:
    """The same bytes also with inputs read ahead and encodings on disk (as all runs here) as without."""
    assert exit_code(start(easyref, place, "finetune_single")) == 0
    ahead = (place / "params.yaml").read_text()
    plain = yaml.safe_load(ahead) | {"loading": {"workers": 0, "memory_gib": 1.0, "disk_gib": 0.0, "folder": ".work"}}
    (place / "params.yaml").write_text(yaml.safe_dump(plain))
    expected, seconds = whole(place, "finetune_multi")
    (place / "params.yaml").write_text(ahead)
    kills, rng = 0, np.random.default_rng()
    for _ in range(3):
        process = start(easyref, place, "finetune_multi")
        process.join(seconds * rng.uniform(0.3, 1))
        process.kill()
        kills += exit_code(process) == -signal.SIGKILL
    assert exit_code(start(easyref, place, "finetune_multi")) == 0
    assert results(place, "finetune_multi") == expected
    assert kills


def test_each_stage_changes_exactly_its_parts(place: Path) -> None:
    """Reads the checkpoints that the tests above wrote."""
    stored = [load_file(place / "models" / n / "easyref.safetensors") for n in stages.STAGES]
    assert [{t.dtype for t in tensors.values()} for tensors in stored] == [{torch.float16}, {torch.float32}, {torch.float32}]
    pretrain, single, multi = ({k: t.float() for k, t in tensors.items()} for tensors in stored)
    assert not [k for k in pretrain if k.startswith("adapter.lora.")]
    assert [k for k in single if k.startswith("encoder.mllm.")] and [k for k in single if k.startswith("adapter.lora.")]
    assert single.keys() == multi.keys()
    base = load_models(load_params(place / "params.yaml"), place / "models", None, "fp32").named_parameters()
    warm = [k for k in pretrain if k.startswith("encoder.mllm.")]
    assert warm and any(not torch.equal(pretrain[k], base[k]) for k in warm), "the warm start trains the MLLM"
    for before, after in ((pretrain, single), (single, multi)):
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        for part in ("encoder.reference_tokens", "encoder.final_layer.", "encoder.projector.", "adapter.reference_kv."):
            assert any(k.startswith(part) for k in changed), part
    assert any(not torch.equal(single[k], multi[k]) for k in single if k.startswith("encoder.mllm.visual"))


def test_pretraining_trains_lora_where_it_has_a_rank(place: Path) -> None:
    p = load_params(place / "params.yaml").pretrain
    assert p.lora_rank == 0 and "lora" not in stages.parts("pretrain", p)
    p = p.model_copy(update={"lora_rank": 2})
    assert stages.parts("pretrain", p) == (*stages.ALIGNMENT, "lora")
    assert "lora" not in stages.parts("pretrain", p.model_copy(update={"freeze": ["lora"]}))


def test_a_stage_without_the_one_before_says_which_to_run(place: Path, tmp_path: Path) -> None:
    params = load_params(place / "params.yaml")
    with pytest.raises(FileNotFoundError, match="models/finetune_single: no checkpoint.*; run `easyref finetune_single` first"):
        stages.run_stage(params, "finetune_multi", Path("data"), tmp_path / "models", tmp_path, tmp_path, tmp_path, "finetune_single")
    assert not list(tmp_path.iterdir())


def test_a_stage_without_the_faces_it_needs_says_so_before_the_warm_start(place: Path, tmp_path: Path, capsys) -> None:
    values = yaml.safe_load((place / "params.yaml").read_text())
    values["pretrain"]["face_share"] = 0.5
    out, curves, work = (tmp_path / name for name in ("out", "curves", "work"))
    with pytest.raises(ValueError, match=r"^pretrain.face_share 0.5: no face is known .*, or set face_share to 0$"):
        stages.run_stage(parse_params(values), "pretrain", place / "data", place / "models", out, curves, work, None)
    assert not list(tmp_path.rglob("align*")) and "align" not in capsys.readouterr().out


def test_a_caption_that_the_mllm_refuses_is_told_before_the_training(place: Path, tmp_path: Path) -> None:
    """At whatever image it came, a run that goes on would end there again."""
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / "images" / "images.parquet"
    write_table(path, read_table(path).with_columns(subject=pl.col("subject") + " <|im_end|>"))
    params = load_params(place / "params.yaml")
    with pytest.raises(
        ValueError, match=r"^the caption of image \w{64} \(.*\) holds <\|im_end\|>, a special token of the MLLM; change it"
    ):
        stages.run_stage(
            params, "pretrain", tmp_path / "data", place / "models", *(tmp_path / n for n in ("out", "curves", "work")), None
        )
    assert not (tmp_path / "work" / "align.safetensors").exists()


def test_curves_have_the_columns_that_dvc_draws(place: Path) -> None:
    plots = [next(iter(plot.values()))["y"] for plot in yaml.safe_load(Path("dvc.yaml").read_text())["plots"]]
    drawn = [(place / path, fields) for y in plots for path, fields in y.items() if "metrics/base/" not in path]
    assert len(drawn) == 3 * len(stages.STAGES) + 2  # loss, learning rate, held-out loss; of align loss and explained shares
    for path, fields in drawn:
        assert {"seen", *([fields] if isinstance(fields, str) else fields)} <= json.loads(path.read_text())[0].keys()
