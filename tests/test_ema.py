"""Averages of any width after the training, against power-function averages that are written out over the whole history."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from easyref.config import Optimisation
from easyref.model import weights
from easyref.seeds import torch_rng
from easyref.training.ema import WIDTHS, Averages, average, exponent, fit, overlap
from easyref.training.trainer import Task, train
from tests.test_trainer import CONFIG

IMAGES, BATCH, EVERY = 8000, 8, 400


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by a noisy loss, its snapshots, and in `history.safetensors` the weights after each update."""
    place = tmp_path_factory.mktemp("ema")
    torch.set_num_threads(1)
    moving, still = torch.nn.Parameter(torch.zeros(300)), torch.nn.Parameter(torch.ones(2))
    history = []

    def loss(numbers: range) -> torch.Tensor:
        if numbers[0]:
            history.append(moving.detach().clone())
        noise = torch.stack([torch.randn(300, generator=torch_rng("ema", n)) for n in numbers]).mean(0)
        return (moving - 5 - 20 * noise).square().mean() + 0 * still.sum()

    p = Optimisation(
        images=IMAGES, batch=BATCH, microbatch=BATCH, learning_rate=0.02, weight_decay=0.0, warmup_images=0, cooldown_images=0,
        ema_images=0, save_images=IMAGES,
    )  # fmt: skip
    parameters = {"moving": moving, "still": still}
    train(Task("ema", [], parameters, loss, {}, watchers=[Averages(place / "x.ema", EVERY, CONFIG)]), p, place / "x.safetensors")
    history.append(moving.detach().clone())
    save_file({"history": torch.stack(history)}, place / "history.safetensors")
    weights.save(place / "trained", parameters | {"frozen": torch.full((3,), 7.0)}, CONFIG, torch.float32)
    return place


def explicit(place: Path, width: float, images: int = IMAGES) -> torch.Tensor:
    """The mean of the weights after each update, weighed by the integral of τ^γ since the update before."""
    history = load_file(place / "history.safetensors")["history"][: images // BATCH].double()
    t = torch.arange(len(history) + 1, dtype=torch.float64)
    return ((t / t[-1]) ** (exponent(width) + 1)).diff() @ history


def stored(place: Path, images: int, name: str) -> torch.Tensor:
    with safe_open(place / "x.ema" / f"{images:012}.safetensors", "pt") as file:
        return file.get_tensor(name)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.12, 0.25])
def test_a_width_is_the_deviation_of_its_profile(width: float) -> None:
    tau = (np.arange(10**6) + 0.5) / 10**6
    profile = (exponent(width) + 1) * tau ** exponent(width)
    mean = (profile * tau).mean()
    assert np.sqrt((profile * (tau - mean) ** 2).mean()) == pytest.approx(width, rel=1e-4)
    other = np.where(tau < 0.6, 3 * tau**2 / 0.6**3, 0)
    found = overlap(np.array(1.0), np.array(exponent(width)), np.array(0.6), np.array(2.0))
    assert found == pytest.approx((profile * other).mean(), rel=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_training_keeps_is_the_average_of_all_weights_so_far(place: Path, width: float) -> None:
    for images in (EVERY, 3 * EVERY, IMAGES):
        torch.testing.assert_close(
            stored(place, images, f"{width}/moving").double(), explicit(place, width, images), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("width", [0.04, 0.07, 0.12, 0.2])
def test_another_width_is_made_of_20_snapshots_to_a_hundredth(place: Path, width: float) -> None:
    """Of the distance between that average and the nearest stored one."""
    print(average(place / "x.ema", place / "trained", width, place / "made"))
    with safe_open(place / "made" / weights.WEIGHTS, "pt") as file:
        made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = explicit(place, width)
    nearest = min((stored(place, IMAGES, f"{w}/moving").double() - wanted).norm() for w in WIDTHS)
    error = (made["moving"].double() - wanted).norm()
    assert error < 0.01 * nearest, f"{error / nearest:.5f}"
    torch.testing.assert_close(made["still"], torch.ones(2))
    assert torch.equal(made["frozen"], torch.full((3,), 7.0))
    assert weights.read_config(place / "made") == CONFIG


def test_factors_are_those_of_an_average_and_exact_for_what_is_stored() -> None:
    t, gamma = np.repeat([1.0, 2.0, 3.0], 2), np.tile([exponent(w) for w in WIDTHS], 3)
    factors, missed = fit(t, gamma, 3.0, exponent(WIDTHS[1]))
    assert factors == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6) and missed == pytest.approx(0, abs=1e-9)
    factors, missed = fit(t, gamma, 3.0, exponent(0.2))
    assert factors.sum() == pytest.approx(1) and 0.01 < missed < 1


def test_an_averaged_checkpoint_keeps_its_precision(place: Path, tmp_path: Path) -> None:
    whole = load_file(place / "trained" / weights.WEIGHTS)
    for dtype in (torch.float16, torch.float32):
        weights.save(tmp_path / "trained", whole, CONFIG, dtype)
        average(place / "x.ema", tmp_path / "trained", 0.12, tmp_path / "out")
        found = load_file(tmp_path / "out" / weights.WEIGHTS)
        assert {tensor.dtype for tensor in found.values()} == {dtype}
        torch.testing.assert_close(found["moving"].double(), explicit(place, 0.12), rtol=2e-3, atol=2e-2)


def test_what_cannot_be_made_is_one_line(place: Path, tmp_path: Path) -> None:
    trained, few = place / "trained", tmp_path / "few.ema"
    few.mkdir()
    with pytest.raises(ValueError, match="few.ema: no snapshots; set snapshot_images"):
        average(few, trained, 0.12, tmp_path / "out")
    with pytest.raises(ValueError, match="width 0.3: give a share of the training above 0 and below 0.289"):
        average(place / "x.ema", trained, 0.3, tmp_path / "out")
    last = place / "x.ema" / f"{IMAGES:012}.safetensors"
    (few / last.name).write_bytes(last.read_bytes())
    with pytest.raises(ValueError, match=r"width 0.2: 1 snapshots miss \d+.\d% of that average; train with smaller snapshot_images"):
        average(few, trained, 0.2, tmp_path / "out")
    weights.save(tmp_path / "other", {}, CONFIG.model_copy(update={"base_id": "other"}), torch.float32)
    with pytest.raises(ValueError, match="not of the training that made .*other; train the stage to its end"):
        average(few, tmp_path / "other", 0.05, tmp_path / "out")
    (few / last.name).write_bytes(last.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a snapshot that can be read; delete it to do without"):
        average(few, trained, 0.05, tmp_path / "out")
    assert not (tmp_path / "out").exists()
