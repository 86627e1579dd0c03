"""Several processes (gloo, on CPUs) train as one does: the same images in the same order, the same losses; each goes on from the
state of any other number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from easyref.config import Optimisation, parse_params
from easyref.training import stages
from easyref.training.engine import Engine, whole
from easyref.training.trainer import share, train
from tests.processes import exit_code, start, start_together
from tests.projects import small_data
from tests.test_stages import easyref
from tests.test_trainer import PARAMS, task

TINY = {"images": 160, "batch": 8, "microbatch": 4, "save_images": 80, "warmup_images": 0, "cooldown_images": 0, "ema_images": 40}
RATE = 1e-4  # at nano's, and without a warm-up, AdamW makes 1e-5 of rounding
WAYS: dict[str, str | None] = {"ddp": None, "zero2": "false", "full": "true"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a few of the real images and the shipped base models, whose stages were run on one process to 20 updates."""
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["threads"] = 1
    values["split"] |= {"held_out_groups": 1, "held_in_groups": 1, "samples_per_group": 1, "max_references": 2, "held_out_share": 0.2}
    values["align"] |= TINY
    for name in stages.STAGES:
        values[name] |= TINY
        values[name]["lora_rank"] = 2 if name != "pretrain" else 0
        values[name]["max_references"] = 2 if name == "finetune_multi" else 1
    for name in ("align", *stages.STAGES):
        values[name]["learning_rate"] = RATE
    place = tmp_path_factory.mktemp("project")
    (place / "params.yaml").write_text(yaml.safe_dump(values))
    small_data(place / "data", parse_params(values), every=160)
    (place / "models").mkdir()
    (place / "models" / "base").symlink_to(Path("models/base").resolve())
    for name in stages.STAGES:
        assert exit_code(start(easyref, place, name)) == 0
    return place


def result(place: Path, stage: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights, and logged losses of training and of validation."""
    rows = [json.loads(row) for row in (place / ".work" / f"{stage}.jsonl").read_text().splitlines()]
    held_out = [value for row in rows for key, value in row.items() if key.startswith("held_out_")]
    return load_file(place / "models" / stage / "easyref.safetensors"), [row["loss"] for row in rows if "loss" in row], held_out


def same(place: Path, other: Path, stage: str) -> None:
    weights, losses, held_out = result(place, stage)
    found, found_losses, found_held_out = result(other, stage)
    assert losses and held_out
    np.testing.assert_allclose(found_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(found_held_out, held_out, rtol=0, atol=1e-5)  # of weights that differ in their last digits
    assert found.keys() == weights.keys()
    moved = 20 * RATE  # AdamW's steps are about the learning rate, whatever the gradient: where that is noise they differ
    assert max((found[n] - weights[n]).abs().max().item() for n in weights) < moved
    assert max((found[n] - weights[n]).abs().mean().item() for n in weights) < moved / 100


def copied(place: Path, folder: Path) -> Path:
    """Without states; inputs are read ahead there, and encodings shared on disk."""
    shutil.copytree(place, folder, symlinks=True, ignore=shutil.ignore_patterns(".work"))
    values = yaml.safe_load((place / "params.yaml").read_text())
    values["loading"] = {"workers": 2, "memory_gib": 0.05, "disk_gib": 0.05, "folder": ".work"}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("case", ["pretrain ddp", "pretrain full", "finetune_multi zero2", "finetune_multi full"])
def test_two_processes_train_as_one_does(place: Path, tmp_path: Path, case: str) -> None:
    stage, way = case.split()
    other = copied(place, tmp_path / "project")
    shutil.rmtree(other / "models" / stage)
    for process in start_together(easyref, other, stage, shard=WAYS[way]):
        assert exit_code(process) == 0
    same(place, other, stage)
    logs = [f"{name}.{kind}" for name in ("align", stage)[stage != "pretrain" :] for kind in ("jsonl", "speed")]
    left = {path.name for path in (other / ".work").iterdir()}
    assert left - {"encodings.sqlite-wal", "encodings.sqlite-shm"} == {"encodings.sqlite", *logs}


@pytest.mark.long
def test_a_stage_starts_its_own_processes(place: Path, tmp_path: Path) -> None:
    other = copied(place, tmp_path / "project")
    shutil.rmtree(other / "models" / "finetune_single")
    command = [sys.executable, "-m", "easyref.cli", "finetune_single"]
    environment = os.environ | {"EASYREF_LAUNCH": "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --main_process_port 0"}
    done = subprocess.run(command, cwd=other, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetune_single: trains") == 1
    same(place, other, "finetune_single")


@pytest.mark.long
def test_killed_on_two_processes_and_gone_on_with_by_one(place: Path, tmp_path: Path) -> None:
    """And the other way round; the order of the samples is that of one process all the time."""
    other = copied(place, tmp_path / "project")
    state = other / ".work" / "finetune_multi.safetensors"
    shutil.rmtree(other / "models" / "finetune_multi")
    processes = start_together(easyref, other, "finetune_multi", shard="false")
    while not state.exists() and all(process.is_alive() for process in processes):
        time.sleep(0.01)
    for process in processes:
        process.kill()
    assert [exit_code(process) for process in processes] == [-signal.SIGKILL] * 2
    assert exit_code(start(easyref, other, "finetune_multi")) == 0
    same(place, other, "finetune_multi")


KILLS = int(os.environ.get("EASYREF_KILLS", "6"))  # in a row, over all stages and numbers of processes


def everything(place: Path, stage: str) -> dict[str, bytes]:
    """All but kept encodings and speeds, which may differ."""
    folders = (place / "models" / stage, place / "metrics" / stage, place / ".work")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    results = [path for path in files if path.suffix != ".speed" and not path.name.startswith("encodings.")]
    return {str(path.relative_to(place)): path.read_bytes() for path in results}


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", list(stages.STAGES))
def test_killed_at_random_again_and_again_leaves_the_same_bytes(place: Path, tmp_path: Path, stage: str, world: int) -> None:
    """Weights, curves and logs, after kills at any time from the first second on: also in a save, in the warm start, in validation."""

    def run(folder: Path, seconds: float | None = None) -> list[int]:
        processes = start_together(easyref, folder, stage, world=world)
        if seconds is not None:
            processes[0].join(seconds)
            for process in processes:
                process.kill()
        return [exit_code(process) for process in processes]

    whole, killed = copied(place, tmp_path / "whole"), copied(place, tmp_path / "killed")
    for folder in (whole, killed):
        shutil.rmtree(folder / "models" / stage)
    begin = time.monotonic()
    assert run(whole) == [0] * world
    seconds, kills, starts, rng = time.monotonic() - begin, 0, 0, np.random.default_rng()
    while kills < KILLS / 6:
        starts += 1
        codes = run(killed, rng.uniform(0.2, 1.1) * seconds)
        kills += codes[0] == -signal.SIGKILL
        if codes == [0] * world:  # done before it was killed
            assert everything(killed, stage) == everything(whole, stage)
    assert run(killed) == [0] * world
    assert everything(killed, stage) == everything(whole, stage)


def train_and_write(state: Path, out: Path) -> None:
    torch.set_num_threads(1)
    run, engine = task(), Engine(Accelerator(cpu=True))
    train(run, Optimisation(**{**PARAMS, "images": 160, "microbatch": 2}), state, engine)
    weights = {name: whole(parameter).detach() for name, parameter in run.parameters.items()}
    if engine.main:
        save_file(weights, out)


@pytest.mark.long
def test_copies_on_two_processes_become_what_one_becomes(tmp_path: Path) -> None:
    for process in start_together(train_and_write, tmp_path / "two", tmp_path / "two.out"):
        assert exit_code(process) == 0
    assert exit_code(start(train_and_write, tmp_path / "one", tmp_path / "one.out")) == 0
    one, two = ([json.loads(row) for row in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two) == 10 + 11
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    torch.testing.assert_close(load_file(tmp_path / "one.out"), load_file(tmp_path / "two.out"), rtol=1e-4, atol=1e-4)


def test_any_number_of_processes_shares_a_batch_whole() -> None:
    for world in range(1, 9):
        engines = [Engine() for _ in range(world)]
        for rank, engine in enumerate(engines):
            engine.world, engine.rank = world, rank
        for batch, microbatch in ((range(0, 16), 16), (range(32, 48), 4), (range(0, 6), 4)):
            parts = [share(batch, microbatch, engine) for engine in engines]
            assert len({len(own) for own in parts}) == 1
            weights = dict.fromkeys(batch, 0.0)
            for own in parts:
                for numbers, portion in own:
                    assert 1 <= len(numbers) <= microbatch
                    for number in numbers:
                        weights[number] += portion / len(numbers) / world
            np.testing.assert_allclose(list(weights.values()), 1 / len(batch))
