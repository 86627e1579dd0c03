"""THE loop: killed at any moment and started again it reaches the same bits; batch splits change nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from easyref.config import Optimisation
from easyref.seeds import Order, torch_rng
from easyref.training.trainer import Task, learning_rate, train

PARAMS = {
    "images": 1920, "batch": 8, "microbatch": 8, "learning_rate": 0.01, "weight_decay": 0.01, "warmup_images": 16,
    "cooldown_images": 64, "ema_images": 64, "save_images": 16,
}  # fmt: skip


def task(fingerprint: int = 0) -> Task:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

    def loss(numbers: range) -> torch.Tensor:
        x = torch.stack([torch.randn(64, generator=torch_rng(0, "x", n)) for n in numbers])
        return (model(x) - x.flip(1)).square().mean()

    return Task("test", dict(model.named_parameters()), loss, {"f": fingerprint})


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
from easyref.config import Optimisation
from easyref.training.trainer import train
from test_trainer import PARAMS, task
result = train(task(), Optimisation(**PARAMS), Path({state!r}))
save_file(result, {out!r})
"""


def test_kill_9_and_again_gives_the_same_bits(tmp_path: Path) -> None:
    expected = train(task(), Optimisation(**PARAMS), tmp_path / "whole" / "state.safetensors")
    out, state, log = tmp_path / "result.safetensors", tmp_path / "killed" / "state.safetensors", (tmp_path / "killed" / "state.jsonl")
    script = textwrap.dedent(CHILD.format(tests=str(Path(__file__).parent), state=str(state), out=str(out)))
    kills = 0
    rng = np.random.default_rng(0)
    for _ in range(40):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.time() + 60
        while child.poll() is None and time.time() < deadline:  # let it make some progress, then kill it anywhere
            if state.exists() and state.stat().st_mtime_ns != before:
                time.sleep(float(rng.uniform(0, 0.03)))
                break
            time.sleep(0.001)
        if child.poll() is None and kills < 4:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.wait()
        if out.exists():
            break
    assert kills >= 3
    found = load_file(out)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert log.read_text() == (tmp_path / "whole" / "state.jsonl").read_text()
    assert not list(state.parent.glob(".*.safetensors")) or len(list(state.parent.glob(".*"))) <= kills


def test_any_microbatch_gives_the_same_training(tmp_path: Path) -> None:
    whole = train(task(), Optimisation(**PARAMS), tmp_path / "a.safetensors")
    parts = train(task(), Optimisation(**{**PARAMS, "microbatch": 2}), tmp_path / "b.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-3, atol=2e-4)


def test_changed_parameters_start_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = tmp_path / "state.safetensors"
    train(task(), Optimisation(**{**PARAMS, "images": 32, "cooldown_images": 0}), state)
    changed = Optimisation(**{**PARAMS, "images": 32, "cooldown_images": 0, "learning_rate": 0.02})
    fresh = train(task(), changed, tmp_path / "other.safetensors")
    again = train(task(), changed, state)
    assert "starts from the beginning" in capsys.readouterr().out
    assert all(torch.equal(fresh[n], again[n]) for n in fresh)


def test_torn_state_is_one_clear_line(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    train(task(), Optimisation(**{**PARAMS, "images": 32, "cooldown_images": 0}), state)
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"state\.safetensors: not a training state .* delete it"):
        train(task(), Optimisation(**PARAMS), state)


def test_learning_rate_schedule() -> None:
    p = Optimisation(**PARAMS)
    assert learning_rate(0, p) == pytest.approx(0.01 * 8 / 16)
    assert learning_rate(200, p) == pytest.approx(0.01)
    assert learning_rate(p.images - 32, p) == pytest.approx(0.005)


def test_order_visits_in_proportion_and_depends_only_on_its_key() -> None:
    weights = np.array([1.0, 2.0, 5.0, 0.5, 1.5])
    order = Order(weights, 0, "x")
    drawn = [order[n] for n in range(10_000)]
    np.testing.assert_allclose(np.bincount(drawn) / 10_000, weights / weights.sum(), atol=2e-3)
    again = Order(weights, 0, "x")
    assert [again[n] for n in (7777, 3, 9999)] == [drawn[n] for n in (7777, 3, 9999)]
    assert [Order(weights, 1, "x")[n] for n in range(100)] != drawn[:100]
