"""THE loop: killed at any moment and started again it reaches the same bits; batch splits change nothing."""

import json
import re
import resource
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from easyref.config import Optimisation
from easyref.model.weights import CheckpointConfig
from easyref.seeds import Order, torch_rng
from easyref.training import status, trainer
from easyref.training.ema import Averages
from easyref.training.engine import Engine
from easyref.training.state import load_state, remove_state, save_state
from easyref.training.trainer import Task, Watcher, learning_rate, train
from tests.model.conftest import reference_config
from tests.processes import exit_code, start

CONFIG = CheckpointConfig(
    reference=reference_config(), lora_rank=None, lora_alpha=None, has_mllm=False, mllm_id="m", mllm_revision=None, base_id="b",
    base_revision=None,
)  # fmt: skip
PARAMS = {
    "images": 1920, "batch": 8, "microbatch": 8, "learning_rate": 0.01, "weight_decay": 0.01, "warmup_images": 16,
    "cooldown_images": 64, "ema_images": 64, "save_images": 16,
}  # fmt: skip


def task(fingerprint: int = 0) -> Task:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        x = torch.stack([torch.randn(64, generator=torch_rng(0, "x", n)) for n in numbers])
        return (model(x) - x.flip(1)).square().mean()

    weights = dict(model.named_parameters())
    return Task("test", [model], weights, loss, {"f": fingerprint}, validate=lambda: {"held_out": weights["0.weight"].sum().item()})


def trained(p: Optimisation, state: Path, *watchers: Watcher) -> dict[str, torch.Tensor]:
    """`task` run to its end."""
    run = task()
    run.watchers = watchers
    train(run, p, state)
    return {name: parameter.detach() for name, parameter in run.parameters.items()}


def stopped(p: Optimisation, state: Path, at: int, *watchers: Watcher) -> None:
    """`task`, interrupted before image `at`."""
    stopping = task()
    stopping.watchers = watchers
    loss = stopping.loss

    def stop(numbers: Sequence[int]) -> torch.Tensor:
        if numbers[0] >= at:
            raise KeyboardInterrupt
        return loss(numbers)

    stopping.loss = stop
    with pytest.raises(KeyboardInterrupt):
        train(stopping, p, state)


def train_and_write(state: Path, out: Path) -> None:
    torch.set_num_threads(1)
    snapshots = Averages(state.with_suffix(".ema"), 320, CONFIG)
    save_file(trained(Optimisation(**PARAMS), state, snapshots), out)


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
    assert {path.name for path in killed.iterdir()} == {
        "state.safetensors",
        "state.jsonl",
        "state.speed",
        "state.ema",
        "out.safetensors",
    }
    snapshots = {f"state.ema/{seen:012}.safetensors" for seen in range(320, 1921, 320)}
    assert {str(path.relative_to(killed)) for path in killed.glob("state.ema/*")} == snapshots
    for name in ("out.safetensors", "state.jsonl", *snapshots):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_stopped_between_two_rows_of_the_log_goes_on_to_the_same_log(tmp_path: Path) -> None:
    p = Optimisation(**(PARAMS | {"images": 4800, "batch": 80, "microbatch": 80, "save_images": 2400}))
    train(task(), p, tmp_path / "whole.safetensors")
    state = tmp_path / "stopped.safetensors"
    stopped(p, state, at=2800)
    train(task(), p, state)
    assert state.with_suffix(".jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_any_microbatch_gives_the_same_training(tmp_path: Path) -> None:
    """Of equal sizes, and of what a task makes of an update: other sizes, another order."""
    values = PARAMS | {"images": 640}
    whole = trained(Optimisation(**values), tmp_path / "a.safetensors")
    parts = trained(Optimisation(**values | {"microbatch": 2}), tmp_path / "b.safetensors")
    uneven = task()
    uneven.split = lambda numbers, most: [[numbers[i] for i in part] for part in ([5], [0, 7, 2], [1, 3, 4, 6])]
    train(uneven, Optimisation(**values), tmp_path / "c.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, parts[name], rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(tensor, uneven.parameters[name].detach(), rtol=1e-3, atol=2e-4)


def test_inputs_are_read_in_the_order_of_the_training_from_where_it_goes_on(tmp_path: Path) -> None:
    p = Optimisation(**(PARAMS | {"images": 64, "microbatch": 4, "cooldown_images": 0, "save_images": 32}))
    for last, wanted in ((44, range(48)), (64, range(32, 64))):
        run, read, used = task(), list[int](), list[int]()

        def loss(numbers: Sequence[int], run_loss=run.loss, read=read, used=used, last=last) -> torch.Tensor:
            used.extend(numbers)
            assert read == used
            if numbers[0] == last:
                raise KeyboardInterrupt
            return run_loss(numbers)

        def ahead(order: Iterator[Sequence[int]], read=read) -> Iterator[Sequence[int]]:
            for numbers in order:
                read.extend(numbers)
                yield numbers

        run.loss, run.ahead = loss, ahead
        with suppress(KeyboardInterrupt):
            train(run, p, tmp_path / "state.safetensors")
        assert used == list(wanted)


def test_the_speed_stands_beside_the_log_and_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FLOP counted (by hand: two layers of 64 x 256, forward and for the gradients of weights and, but for the first, of inputs)
    and 40 inputs a row that are waited for."""
    p = Optimisation(**(PARAMS | {"images": 640, "save_images": 320}))
    train(task(), p, tmp_path / "plain.safetensors")
    monkeypatch.setattr(status, "COUNTS", {"cpu"})
    monkeypatch.setattr(trainer, "COUNTS", {"cpu"})
    monkeypatch.setattr(status, "matmul_rate", lambda *_: 1e9)
    slow = task()

    def ahead(order: Iterator[Sequence[int]]) -> Iterator[Sequence[int]]:
        for numbers in order:
            time.sleep(0.01)
            yield numbers

    slow.ahead = ahead
    begin = time.perf_counter()
    train(slow, p, tmp_path / "counted.safetensors")
    seconds = time.perf_counter() - begin
    assert (tmp_path / "counted.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    for name, parameter in load_file(tmp_path / "plain.safetensors").items():
        assert torch.equal(parameter, load_file(tmp_path / "counted.safetensors")[name])
    rows = [json.loads(row) for row in (tmp_path / "counted.speed").read_text().splitlines()]
    assert [row["seen"] for row in rows] == [320, 640]
    assert sum(320 / row["images_per_second"] for row in rows) < seconds
    for row in rows:
        assert 40 * 0.01 <= row["waiting"] * 320 / row["images_per_second"] < seconds
        assert row["mfu"] == pytest.approx(row["images_per_second"] * 5 * 2 * 64 * 256 / 1e9) and 0.05 < row["memory_gib"] < 16
    assert all("mfu" not in json.loads(row) for row in (tmp_path / "plain.speed").read_text().splitlines())


def test_changed_parameters_refuse_to_go_on_unless_allowed_by_name(tmp_path: Path) -> None:
    short, state = {**PARAMS, "images": 32, "cooldown_images": 0}, tmp_path / "state.safetensors"
    train(task(), Optimisation(**short), state)
    before = state.read_bytes()
    changed = Optimisation(**{**short, "learning_rate": 0.02, "images": 64})
    line = (
        "state.safetensors was saved under other values: f was 0 and is 1, images was 32 and is 64, learning_rate was 0.01 and is 0.02"
    )
    with pytest.raises(ValueError, match=re.escape(line)):
        train(task(1), changed, state)
    with pytest.raises(ValueError, match="under other values: learning_rate was"):
        train(task(), changed, state, allow=["images"])
    assert state.read_bytes() == before
    train(task(), changed, state, allow=["images", "learning_rate"])
    rows = [json.loads(row) for row in state.with_suffix(".jsonl").read_text().splitlines()]
    assert [(row["seen"], row["learning_rate"]) for row in rows if "loss" in row] == [(16, 0.01), (32, 0.01), (48, 0.02), (64, 0.02)]
    train(task(), Optimisation(**{**changed.model_dump(), "microbatch": 4, "save_images": 8}), state)  # change nothing that is learned


def test_earlier_states_are_kept_and_taken_when_the_newest_is_torn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept = {**PARAMS, "images": 80, "cooldown_images": 0, "keep_states": 3}
    whole, p, state = (
        trained(Optimisation(**kept), tmp_path / "whole.safetensors"),
        Optimisation(**kept),
        tmp_path / "state.safetensors",
    )
    train(task(), p, state)
    names = ["state.000000000048.safetensors", "state.000000000064.safetensors", "state.safetensors"]
    assert sorted(path.name for path in tmp_path.glob("state*.safetensors")) == names
    for name in names[1:]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:500])
    again = trained(p, state)
    assert "the one at image 48 is taken" in capsys.readouterr().out
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    assert state.with_suffix(".jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    remove_state(state)
    assert not list(tmp_path.glob("state*.safetensors"))


def train_on_a_full_disk(state: Path, most: int) -> None:
    """No file of this process may have more than `most` bytes: what fails is the write, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    with pytest.raises(
        RuntimeError, match=r"state\.safetensors: the state at image 48 could not be saved \(.*\); the one before is kept"
    ):
        train(task(), Optimisation(**PARAMS), state)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_a_state_is_mapped_so_that_the_processes_of_a_machine_hold_it_once(tmp_path: Path) -> None:
    def own_mib() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    save_state(tmp_path / "run.safetensors", {"weights/w": torch.ones(2**24)}, {"seen": 8})
    before = own_mib()
    found = load_state(tmp_path / "run.safetensors")
    assert found and found[0]["weights/w"].sum() == 2**24
    assert own_mib() - before < 16, "of 64"


def test_a_state_that_was_saved_or_loaded_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as large as all that trains, three times: the main process would hold two of them at the next save."""
    held: list[weakref.ref] = []

    class Copies(Engine):
        def gather(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            held.extend(map(weakref.ref, copies.values()))
            return copies

    class Looks(Watcher):
        def updated(self, seen: int, batch: int) -> None:
            assert held or seen <= 8
            assert not [ref for ref in held if ref() is not None]

    def loading(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        if found := load_state(path):
            held.extend(weakref.ref(tensor) for name, tensor in found[0].items() if name.startswith("weights/"))
        return found

    monkeypatch.setattr(trainer, "load_state", loading)
    for images in (32, 64):
        run, p = task(), Optimisation(**PARAMS | {"images": images, "cooldown_images": 0, "save_images": 8})
        run.watchers = [Looks()]
        train(run, p, tmp_path / "state.safetensors", Copies(), allow=["images"])


def test_snapshots_of_what_a_training_does_not_go_on_with_go(tmp_path: Path) -> None:
    """`easyref ema` would take the last of them for the end of the training."""
    p = Optimisation(**PARAMS | {"images": 96, "cooldown_images": 0, "save_images": 32})
    state = tmp_path / "state.safetensors"

    def snapshots() -> Averages:
        return Averages(tmp_path / "state.ema", 16, CONFIG)

    stopped(p, state, 56, snapshots())
    assert [int(path.stem) for path in sorted((tmp_path / "state.ema").iterdir())] == [16, 32, 48]
    run = task()
    run.watchers = [snapshots()]
    train(run, p.model_copy(update={"images": 40, "learning_rate": 0.02}), state, allow=["images", "learning_rate"])
    assert [int(path.stem) for path in sorted((tmp_path / "state.ema").iterdir())] == [16, 32]


def test_a_state_is_saved_by_the_first_update_at_or_behind_its_image(tmp_path: Path) -> None:
    trained(Optimisation(**PARAMS | {"images": 104, "save_images": 20}), tmp_path / "state.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "state.jsonl").read_text().splitlines()]
    assert [row["seen"] for row in rows if "held_out" in row] == [0, 24, 40, 64, 80, 104]


def test_a_full_disk_is_one_clear_line_and_keeps_the_last_state(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    stopped(Optimisation(**PARAMS), state, at=32)
    before = state.read_bytes()
    assert exit_code(start(train_on_a_full_disk, state, len(before) // 2)) == 0
    assert state.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors", "state.jsonl", "state.speed"}


def test_a_state_of_an_earlier_version_is_one_clear_line(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    save_file({}, state, {"easyref": json.dumps({"seen": 16, "fingerprint": "f"})})
    with pytest.raises(ValueError, match=r"state\.safetensors: saved by an earlier easyref.* delete it"):
        train(task(), Optimisation(**PARAMS), state)


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


def test_moments_in_8_bits_take_a_quarter_of_the_memory_and_go_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    p = Optimisation(**{**PARAMS, "images": 160, "optimizer": "adamw8bit"})
    whole = trained(p, tmp_path / "whole.safetensors")
    plain = trained(Optimisation(**{**PARAMS, "images": 160}), tmp_path / "plain.safetensors")
    assert not all(torch.equal(whole[n], plain[n]) for n in whole)
    assert all((whole[n] - plain[n]).abs().mean() < 0.1 * plain[n].abs().mean() for n in whole)
    sizes = {
        name: sum(t.nbytes for key, t in load_file(tmp_path / f"{name}.safetensors").items() if key.startswith("optimizer/"))
        for name in ("whole", "plain")
    }
    assert sizes["whole"] < 0.3 * sizes["plain"]
    state = tmp_path / "state.safetensors"
    stopped(p, state, at=80)
    again = trained(p, state)
    assert all(torch.equal(whole[n], again[n]) for n in whole)


BROKEN = PARAMS | {"images": 64, "cooldown_images": 0, "microbatch": 4}


def failing(loss: Callable[[Sequence[int], torch.nn.Parameter], torch.Tensor]) -> Task:
    weight = torch.nn.Parameter(torch.ones(3))
    made = {"weight": weight}

    def describe(number: int) -> tuple[dict, dict[str, torch.Tensor]]:
        return {"prompt": f"image {number}"}, {f"latents/{number}": torch.tensor(number)}

    return Task("test", [], made, lambda numbers: loss(numbers, weight), {}, describe=describe)


def test_a_broken_image_is_named_with_its_microbatch_and_the_state_before_is_kept(tmp_path: Path) -> None:
    x = torch.ones(64)
    x[45] = torch.nan
    p, state = Optimisation(**BROKEN), tmp_path / "state.safetensors"
    said = r"loss is not finite in the update at image 40, from images 45, which are in .*state\.broken\.json; the state before is kept"
    for _ in range(2):  # the same command fails in the same way
        with pytest.raises(FloatingPointError, match=said):
            train(failing(lambda numbers, weight: (x[list(numbers)] * weight.sum()).mean()), p, state)
        found = json.loads((tmp_path / "state.broken.json").read_text())
        assert [(row["number"], row["prompt"]) for row in found["images"]] == [(n, f"image {n}") for n in range(44, 48)]
        assert [isinstance(row["loss"], float) for row in found["images"]] == [True, False, True, True]
        assert load_file(tmp_path / "state.broken.safetensors").keys() == {f"latents/{n}" for n in range(44, 48)}
        kept = load_state(state)
        assert kept and kept[1]["seen"] == 32 and kept[0]["weights/weight"].isfinite().all()
    x[45] = 1.0
    train(failing(lambda numbers, weight: (x[list(numbers)] * weight.sum()).mean()), p, state)
    assert not list(tmp_path.glob("*broken*"))


def test_a_gradient_or_a_held_out_loss_that_is_not_finite_saves_nothing(tmp_path: Path) -> None:
    p, state = Optimisation(**(BROKEN | {"save_images": 8})), tmp_path / "state.safetensors"
    with pytest.raises(FloatingPointError, match="gradient is not finite in the update at image 16, from images 16, 17, 18, 19 and 4"):
        train(failing(lambda numbers, weight: (weight * (numbers[0] < 16)).abs().sqrt().sum()), p, state)
    kept = load_state(state)
    assert kept and kept[1]["seen"] == 16 and kept[0]["weights/weight"].isfinite().all()
    state.unlink()
    task = failing(lambda numbers, weight: weight.square().sum())
    task.validate = lambda: {"held_out": float("inf") if state.exists() else 1.0}
    with pytest.raises(FloatingPointError, match=r"held-out loss at image 16 is not finite: \{'held_out': inf\}; the state before"):
        train(task, p, state)
    kept = load_state(state)
    assert kept and kept[1]["seen"] == 8
