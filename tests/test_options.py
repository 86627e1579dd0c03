"""Options of the stages, off by default, in stages that run: each by the command a user types, on the shipped base models."""

import json
import shutil
import signal
import sys
import time
from contextlib import chdir
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from easyref import cli
from easyref.evaluation.grid import LARGE, MARGIN
from easyref.model import weights
from easyref.model.schedule import Schedule
from easyref.pipeline import EasyRef, Request
from easyref.records import read_table
from easyref.training.ema import WIDTHS
from tests.processes import exit_code, start
from tests.projects import tiny_project


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"))


def easyref(place: Path, stage: str, options: dict[str, Any]) -> None:
    """`easyref STAGE` in the folder `place`, with `options` in the stage's parameters."""
    values = yaml.safe_load((place / "params.yaml").read_text()) | {"align": None}
    values[stage] |= options
    (place / "with.yaml").write_text(yaml.safe_dump(values))
    with chdir(place):
        sys.argv = ["easyref", stage, "--params", "with.yaml"]
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise


OPTIONS: dict[str, Any] = {
    "min_snr": 5.0, "noise_offset": 0.1, "rates": {"projector": 2.0}, "prediction": "epsilon", "zero_terminal_snr": False,
    "images": 12, "snapshot_images": 4, "sample_images": 8,
}  # fmt: skip
STAGE = "pretrain"


def results(place: Path) -> dict[str, bytes]:
    found = [*(place / "models" / STAGE).rglob("*"), *(place / ".work").glob(f"{STAGE}.*"), *(place / ".work").glob(f"{STAGE}.*/*")]
    return {str(path.relative_to(place)): path.read_bytes() for path in found if path.is_file() and path.suffix != ".speed"}


def clean(place: Path) -> None:
    for folder in (place / "models" / STAGE, place / ".work"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    """What a stage with all options leaves when nobody disturbs it."""
    clean(place)
    easyref(place, STAGE, OPTIONS)
    found = results(place)
    work = {f".work/{STAGE}.ema/{n:012}.safetensors" for n in (4, 8, 12)} | {f".work/{STAGE}.samples/{n:012}.png" for n in (0, 8)}
    assert found.keys() == work | {f".work/{STAGE}.jsonl"} | {f"models/{STAGE}/{name}" for name in ("config.json", weights.WEIGHTS)}
    return found


def test_pictures_show_the_held_out_samples_and_change_with_the_weights(whole: dict[str, bytes]) -> None:
    first, later = (Image.open(BytesIO(whole[f".work/{STAGE}.samples/{n:012}.png"])) for n in (0, 8))
    assert first.size == later.size and first.width < 800
    differs = np.argwhere(np.any(np.asarray(first) != np.asarray(later), axis=2))
    assert len(differs) and differs[:, 1].min() >= first.width - MARGIN - LARGE  # only in the last column, "Drawn now"


def test_pictures_and_averages_change_no_bit_of_the_training(place: Path, whole: dict[str, bytes]) -> None:
    easyref(place, STAGE, OPTIONS | {"sample_images": 0, "snapshot_images": 0})
    kept = {name for name in whole if ".ema/" not in name and ".samples/" not in name}
    assert results(place) == {name: whole[name] for name in kept}  # those of the training before are gone


def test_killed_beside_a_snapshot_and_started_again_leaves_the_same_bytes(place: Path, whole: dict[str, bytes]) -> None:
    clean(place)
    for name in (f"{STAGE}.ema/{4:012}.safetensors", f"{STAGE}.safetensors", f"{STAGE}.ema/{8:012}.safetensors"):
        process = start(easyref, place, STAGE, OPTIONS)
        while process.is_alive() and not (place / ".work" / name).exists():
            time.sleep(0.001)
        process.kill()
        assert exit_code(process) == -signal.SIGKILL
    easyref(place, STAGE, OPTIONS)
    assert results(place) == whole


@pytest.fixture
def trained(place: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the project, as the stage left it."""
    monkeypatch.chdir(place)
    clean(place)
    for name, data in whole.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


@pytest.mark.usefixtures("trained")
def test_a_width_chosen_afterwards_is_a_checkpoint_that_draws() -> None:
    done = CliRunner().invoke(cli.app, ["ema", STAGE, "--width", ".07"])
    assert done.exit_code == 0
    assert done.output.startswith(f"models/{STAGE}-ema-0.07: ") and "over 3 snapshots up to image 12" in done.output
    made, last = (load_file(Path("models") / name / weights.WEIGHTS) for name in (f"{STAGE}-ema-0.07", STAGE))
    narrow, wide = (
        {n.removeprefix(f"{w}/"): t for n, t in load_file(f".work/{STAGE}.ema/{12:012}.safetensors").items() if n.startswith(f"{w}/")}
        for w in WIDTHS
    )
    assert made.keys() == last.keys() == narrow.keys()
    for name, tensor in made.items():
        assert (tensor - narrow[name]).norm() < (wide[name] - narrow[name]).norm() or torch.equal(narrow[name], wide[name]), name
    (image,) = EasyRef.from_pretrained(f"models/{STAGE}-ema-0.07")([Request("star", [], 0)], steps=2)
    assert image.size == (64, 64)


@pytest.mark.usefixtures("trained")
def test_a_schedule_is_in_the_checkpoint_and_in_what_draws_with_it_and_in_the_next_stage(place: Path) -> None:
    easyref(place, "finetune_single", {})
    base = EasyRef.base_pipeline("models/pretrain").scheduler.config
    assert base.prediction_type == "v_prediction" and base.rescale_betas_zero_snr
    for name in ("models/pretrain", "models/finetune_single"):
        assert weights.read_config(Path(name)).schedule == Schedule(prediction="epsilon", zero_terminal_snr=False)
        model = EasyRef.from_pretrained(name)
        drawn = model.pipe.scheduler
        assert drawn.config.prediction_type == "epsilon" and drawn.alphas_cumprod[-1] > 0
        model.detach()
        assert model.pipe.scheduler.config == base


def failed(place: Path, options: dict[str, Any], capsys: pytest.CaptureFixture) -> str:
    """What the stage says when it fails."""
    clean(place)
    with pytest.raises(SystemExit, match="2"):
        easyref(place, STAGE, options)
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("easyref: "))


def test_a_schedule_that_the_base_cannot_have_is_one_line(place: Path, capsys: pytest.CaptureFixture) -> None:
    said = failed(place, {"prediction": "epsilon"}, capsys)
    assert said.startswith("easyref: prediction epsilon does not go with zero terminal SNR")


def test_a_loss_that_is_not_finite_names_the_images(place: Path, capsys: pytest.CaptureFixture) -> None:
    said = failed(place, {"rates": {"reference_kv": 1e36}, "images": 12, "save_images": 12}, capsys)
    assert said.startswith(f"easyref: {STAGE}: loss is not finite in the update at image 4, from images 4, 5, 6, 7, which are in ")
    broken = json.loads((place / ".work" / f"{STAGE}.broken.json").read_text())
    assert broken["update_at"] == 4 and [row["number"] for row in broken["images"]] == [4, 5, 6, 7]
    sha256s = set(read_table(place / "data" / "images" / "images.parquet")["sha256"]) | {"null reference"}
    for row in broken["images"]:
        assert {row["target"], *row["references"]} <= sha256s and row["loss"] in ("nan", "inf") and 0 <= row["timestep"] < 1000
        assert isinstance(row["prompt"], str)
    latents = load_file(place / ".work" / f"{STAGE}.broken.safetensors")
    assert {name: tensor.shape for name, tensor in latents.items()} == {f"latents/{n}": (8, 8, 8) for n in (4, 5, 6, 7)}
