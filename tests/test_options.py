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
from safetensors.torch import load, load_file
from typer.testing import CliRunner

from easyref import cli
from easyref.config import load_params
from easyref.data.dataset import TrainingImages
from easyref.data.shards import ImageStore
from easyref.evaluation.grid import KIND, GridRow, draw_grid
from easyref.model import weights
from easyref.model.schedule import Schedule
from easyref.pipeline import EasyRef, Request
from easyref.records import read_table
from easyref.seeds import seed_of
from easyref.training.ema import WIDTHS
from easyref.training.inputs import Inputs
from easyref.training.models import load_models
from easyref.training.stages import Validation, sample_loss
from tests.processes import exit_code, start, start_together
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
    "images": 12, "ema_images": 0, "snapshot_images": 4, "sample_images": 12, "stored": "fp32",
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
    work = {f".work/{STAGE}.ema/{n:012}.safetensors" for n in (4, 8, 12)} | {f".work/{STAGE}.samples/{n:012}.png" for n in (0, 12)}
    assert found.keys() == work | {f".work/{STAGE}.jsonl"} | {f"models/{STAGE}/{name}" for name in ("config.json", weights.WEIGHTS)}
    return found


@pytest.fixture
def trained(place: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of the project, as the stage left it."""
    monkeypatch.chdir(place)
    clean(place)
    for name, data in whole.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)


@pytest.mark.usefixtures("trained")
def test_the_last_picture_shows_what_the_checkpoint_draws_of_held_out_samples() -> None:
    table, store = (
        read_table("data/split/samples.parquet").filter(split="held_out").sort("kind", "sample_id"),
        ImageStore(Path("data/images")),
    )
    model, rows, i = EasyRef.from_pretrained(f"models/{STAGE}"), [], 0
    for kind in table["kind"].unique(maintain_order=True):
        for row in table.filter(kind=kind).head(2).iter_rows(named=True):
            target, *references = (store.image(sha) for sha in (row["target"], *row["references"]))
            drawn = model([Request(row["prompt"], references, seed_of(0, "pictures", i))], steps=20, guidance=5.0)
            rows.append(GridRow(KIND[kind], row["prompt"], references, target, drawn))
            i += 1
    expected = np.asarray(draw_grid(rows, ("Drawn now",)), int)
    first, last = (np.asarray(Image.open(f".work/{STAGE}.samples/{n:012}.png"), int) for n in (0, 12))
    assert np.abs(last - expected).max() <= 2
    assert np.abs(first - expected).max() > 20


@pytest.mark.usefixtures("trained")
def test_the_held_out_loss_is_the_mean_of_its_samples_alone_and_the_same_each_time() -> None:
    """At noise and timesteps of its own, whatever the batch: that of the log is of the checkpoint's weights."""
    params = load_params("with.yaml")
    models = load_models(params, Path("models"), None, "fp32")
    models.use(weights.load(Path("models") / STAGE, models.encoder, models.adapter).schedule)
    validate = Validation(params, Inputs(models, TrainingImages(Path("data")), True), Path("data"))
    found = validate()
    assert found == validate()
    logged = [json.loads(row) for row in Path(f".work/{STAGE}.jsonl").read_text().splitlines()]
    assert found == pytest.approx({key: value for key, value in logged[-1].items() if key != "seen"}, rel=1e-6)
    for name, samples in validate.samples.items():
        with torch.no_grad():
            alone = [sample_loss(models, validate.inputs, [s], 0, [f"validation/{i}"]).item() for i, s in enumerate(samples)]
        assert found[f"held_out_{name}"] == pytest.approx(np.mean(alone), rel=1e-5)


def test_held_out_samples_are_as_many_at_once_as_fit_into_memory(place: Path) -> None:
    """At 1024 pixels 32 samples of SDXL with 28 references each would take 25 GiB, and four take 3."""
    params = load_params(place / "params.yaml")
    models = load_models(params, place / "models", None, "fp32")
    seen = set()
    models.unet.register_forward_pre_hook(lambda _module, given: seen.add(len(given[0])))
    for side, most in ((64, 32), (1024, 4)):
        seen.clear()
        validate = Validation(params, Inputs(models, TrainingImages(place / "data"), True), place / "data")
        validate.samples = {"right": (validate.samples["right"] * 34)[:34]}
        validate.images.labels[0] = {**validate.images.labels[0], "height": side, "width": side}
        validate()
        assert seen == {most, 34 % most}


def test_pictures_and_averages_change_no_bit_of_the_training(place: Path, whole: dict[str, bytes]) -> None:
    easyref(place, STAGE, OPTIONS | {"sample_images": 0, "snapshot_images": 0})
    kept = {name for name in whole if ".ema/" not in name and ".samples/" not in name}
    assert results(place) == {name: whole[name] for name in kept}  # those of the training before are gone


@pytest.mark.long
@pytest.mark.parametrize("shard", [None, "true"])
def test_two_processes_leave_the_same_averages_and_pictures(place: Path, whole: dict[str, bytes], shard: str | None) -> None:
    """With a copy of the weights each, and with a share of them each."""
    clean(place)
    for process in start_together(easyref, place, STAGE, OPTIONS, shard=shard):
        assert exit_code(process) == 0
    found = results(place)
    assert found.keys() == whole.keys()
    for name in found:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(BytesIO(data)), int) for data in (found[name], whole[name]))
            assert np.abs(ours - theirs).mean() < 0.05
        elif ".ema/" in name:
            one, two = load(whole[name]), load(found[name])
            assert one.keys() == two.keys()
            assert max((one[n] - two[n]).abs().mean().item() for n in one) < 3 * 3e-4 / 100  # three steps of AdamW


@pytest.mark.long
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
