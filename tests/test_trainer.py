"""THE loop: killed at any moment and started again it reaches the same bits; batch splits change nothing."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from easyref.config import Optimisation
from easyref.seeds import Order, torch_rng
from easyref.training.trainer import Task, learning_rate, train
from tests.processes import exit_code, start

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

    weights = dict(model.named_parameters())
    return Task("test", weights, loss, {"f": fingerprint}, validate=lambda: {"held_out": weights["0.weight"].sum().item()})


def trained(p: Optimisation, state: Path) -> dict[str, torch.Tensor]:
    """`task` run to its end."""
    run = task()
    train(run, p, state)
    return {name: parameter.detach() for name, parameter in run.parameters.items()}


def train_and_write(state: Path, out: Path) -> None:
    torch.set_num_threads(1)
    save_file(trained(Optimisation(**PARAMS), state), out)


def test_kill_9_and_again_gives_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert exit_code(start(train_and_write, whole / "state.safetensors", whole / "out.safetensors")) == 0
    kills, rng, state = 0, np.random.default_rng(), killed / "state.safetensors"
    while not (killed / "out.safetensors").exists():
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = start(train_and_write, state, killed / "out.safetensors")
        if kills < 20:  # it makes some progress, then dies anywhere
            while process.is_alive() and (state.stat().st_mtime_ns if state.exists() else 0) == before:
                time.sleep(0.001)
            process.join(rng.uniform(0, 0.1))
            process.kill()
        kills += exit_code(process) == -signal.SIGKILL
    assert kills >= 2
    assert {path.name for path in killed.iterdir()} == {"state.safetensors", "state.jsonl", "out.safetensors"}
    for name in ("out.safetensors", "state.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_stopped_between_two_rows_of_the_log_goes_on_to_the_same_log(tmp_path: Path) -> None:
    p = Optimisation(**(PARAMS | {"images": 4800, "batch": 80, "microbatch": 80, "save_images": 2400}))
    train(task(), p, tmp_path / "whole.safetensors")
    stopping, state = task(), tmp_path / "stopped.safetensors"
    loss = stopping.loss

    def stop(numbers: range) -> torch.Tensor:
        if numbers.start >= 2800:
            raise KeyboardInterrupt
        return loss(numbers)

    stopping.loss = stop
    with pytest.raises(KeyboardInterrupt):
        train(stopping, p, state)
    train(task(), p, state)
    assert state.with_suffix(".jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_any_microbatch_gives_the_same_training(tmp_path: Path) -> None:
    whole = trained(Optimisation(**PARAMS), tmp_path / "a.safetensors")
    parts = trained(Optimisation(**{**PARAMS, "microbatch": 2}), tmp_path / "b.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-3, atol=2e-4)


def test_changed_parameters_start_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = tmp_path / "state.safetensors"
    train(task(), Optimisation(**{**PARAMS, "images": 32, "cooldown_images": 0}), state)
    changed = Optimisation(**{**PARAMS, "images": 32, "cooldown_images": 0, "learning_rate": 0.02})
    fresh = trained(changed, tmp_path / "other.safetensors")
    again = trained(changed, state)
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


def test_the_rate_falls_to_zero_and_rises_again_at_a_restart() -> None:
    round_1 = {**PARAMS, "images": 400, "warmup_images": 40, "cooldown_images": 100, "learning_rate": 1.0e-2}
    p = Optimisation(**round_1, restart={"at": 200, "learning_rate": 5.0e-3, "cooldown_images": 80})  # type: ignore[arg-type]
    points = {100: 1e-2, 150: 5e-3, 199: 1e-4, 360: 2.5e-3, 300: 5e-3, 400: 0.0}
    assert {seen: learning_rate(seen, p) for seen in points} == pytest.approx(points)
    assert learning_rate(200, p) == pytest.approx(5e-3 * p.batch / 40)
    with pytest.raises(ValueError, match="restart.at"):
        Optimisation(**round_1, restart={"at": 350, "learning_rate": 5.0e-3, "cooldown_images": 80})  # type: ignore[arg-type]
