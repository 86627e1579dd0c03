"""The plain loop that our trainer is measured against computes the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from easyref.cli import app
from easyref.config import load_params
from easyref.data.dataset import TrainingImages
from easyref.records import read_json
from easyref.training import bench, stages

torch.set_num_threads(1)


@pytest.mark.parametrize("name", list(stages.STAGES))
def test_the_plain_loop_has_the_losses_and_gradients_of_ours(name: str) -> None:
    params = load_params("presets/nano.yaml")
    p = bench.as_published(getattr(params, name), name, 32)
    way = bench.Way(params, p, name, Path("models"), TrainingImages(Path("data")))
    found = []
    for loss in (way.task().loss, way.plain_loss):
        value = loss(range(6))
        value.backward()
        found.append((value.item(), {n: t.grad for n, t in way.trained.items()}))
        for tensor in way.trained.values():
            tensor.grad = None
    (ours, gradients), (plain, others) = found
    assert ours == pytest.approx(plain, rel=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=2e-3, atol=1e-6, msg=key)


@pytest.mark.long
def test_bench_train_measures_all_stages(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "train", "--images", "32", "--passes", "1", "--out", str(tmp_path / "train.json")])
    assert done.exit_code == 0, done.output
    found = read_json(tmp_path / "train.json")
    for name in stages.STAGES:
        speed, row = found[name]["images_per_s"], found[name]
        np.testing.assert_allclose(row["speedup_over_plain_loop"], speed["ours"] / speed["plain_loop"], rtol=1e-2)
        assert f"{name}: {speed['ours']:.1f} images/s" in done.output


def test_a_pass_is_whole_batches(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "train", "--images", "40", "--out", str(tmp_path / "train.json")])
    assert "--images 40: no multiple of pretrain.batch 32" in str(done.exception)
