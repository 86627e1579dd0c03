"""THE loop. Every training of the project (base models and the three stages) is a `Task` that runs through `train`.

Progress is counted in images. All randomness of image number n comes from (seed, purpose, n), so a run that was killed and
started again by the same command goes on to bit-identical weights, and any split of a batch into microbatches and processes draws the
same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easyref.config import Optimisation
from easyref.progress import bar
from easyref.records import clear_temporaries, write_bytes
from easyref.training.broken import Describe, save_broken
from easyref.training.engine import Engine, whole
from easyref.training.state import load_optimizer, load_state, optimizer_tensors, restore, save_state
from easyref.training.status import COUNTS, Status

#: Parameters that a run may go on with other values of.
FREE = ("microbatch", "save_images", "keep_states", "recompute", "compile", "sample_images")
ADVICE = "the state before is kept; lower learning_rate, or see what is odd about the images"


class Watcher:
    """Sees a training between its updates, on every process, and changes nothing of it."""

    def begin(self, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """What it keeps, by name: part of the exact state."""
        return {}

    def updated(self, seen: int, batch: int) -> None:
        """After each update."""

    def pause(self, seen: int, engine: Engine) -> None:
        """Before each update and after the last; again where a run goes on."""


def consecutive(numbers: range, most: int) -> list[range]:
    return [numbers[start : start + most] for start in range(0, len(numbers), most)]


@dataclass
class Task:
    """What one training is: named trainable parameters with a learning-rate factor each, and a loss over image numbers.

    `loss(numbers)` returns the mean loss over the images of the endless order at those numbers, as a scalar tensor.
    `inputs` is everything besides `Optimisation` that, if changed, makes a saved state another one's (parameters, hashes).
    """

    name: str
    modules: Sequence[nn.Module]  # that the loss runs
    parameters: dict[str, nn.Parameter]
    loss: Callable[[Sequence[int]], torch.Tensor]
    inputs: dict[str, Any]
    factors: dict[str, float] = field(default_factory=dict)  # by parameter name; 1 where absent
    validate: Callable[[], dict[str, float]] | None = None
    shard: bool = False  # whether FSDP2 may share out the modules
    split: Callable[[range, int], Sequence[Sequence[int]]] = consecutive  # an update into microbatches of at most so many images
    ahead: Callable[[Iterator[Sequence[int]]], Iterator[Sequence[int]]] = iter  # the same microbatches, when their inputs are there
    watchers: Sequence[Watcher] = ()
    describe: Describe | None = None  # of images whose loss is not finite


def learning_rate(seen: int, p: Optimisation) -> float:
    """Constant, after a linear warm-up, before a linear cool-down (both in images); after `restart.at` the same once more."""
    start, end, peak, cooldown = 0, p.images, p.learning_rate, p.cooldown_images
    if p.restart and seen >= p.restart.at:
        start, peak, cooldown = p.restart.at, p.restart.learning_rate, p.restart.cooldown_images
    elif p.restart:
        end = p.restart.at
    up = min(1.0, (seen - start + p.batch) / p.warmup_images) if p.warmup_images else 1.0
    down = min(1.0, (end - seen) / cooldown) if cooldown else 1.0
    return peak * up * down


def train(task: Task, p: Optimisation, state_path: Path, engine: Engine | None = None, allow: Collection[str] = ()) -> None:
    """Run `task` to `p.images` images, resuming from `state_path` when it holds a state.

    Leaves the result in `task.parameters`: the weight average when `p.ema_images` > 0.
    The state file stays until the caller has stored the result and deletes it.

    Raises:
        ValueError: the state was saved under other values than those in force; `allow` names those that may differ.
        FloatingPointError: loss or gradient is not finite; the images at fault are in STATE.broken.json.
    """
    engine = engine or Engine()
    task.parameters = engine.wrap(task.modules, task.parameters, task.shard)
    names = {parameter: name for name, parameter in task.parameters.items()}
    weights = list(task.parameters.values())
    optimizer = _optimizer(task, p)
    average = [w.detach().clone() for w in weights] if p.ema_images else []
    averages = {names[w]: a for w, a in zip(weights, average, strict=False)}
    watched = {name: tensor for watcher in task.watchers for name, tensor in watcher.begin(task.parameters).items()}
    inputs = _flat({**task.inputs, **p.model_dump(mode="json", exclude=set(FREE))})
    seen, saved = 0, -1
    losses: list[float] = []  # of the updates since the last row of the log
    log = state_path.with_suffix(".jsonl")
    status = Status(state_path.with_suffix(".speed"), weights[0].device, engine.world)
    broken = state_path.with_suffix(f".broken{f'-{engine.rank}' if engine.rank else ''}.json")
    for file in (broken, broken.with_suffix(".safetensors")):
        file.unlink(missing_ok=True)
    if found := load_state(state_path):
        tensors, counters = found
        if "inputs" not in counters:
            raise ValueError(f"{state_path}: saved by an earlier easyref, which named its values otherwise; delete it to start again")
        _check_inputs(task.name, state_path, counters["inputs"], inputs, allow)
        seen = saved = counters["seen"]
        losses = counters["losses"]
        restore(task.parameters, "weights", tensors)
        restore(averages, "average", tensors)
        restore(watched, "watched", tensors)
        load_optimizer(optimizer, names, tensors)
        del found, tensors  # as large as all that trains: what is mapped would keep its file on the disk
    engine.wait()
    if engine.main:
        clear_temporaries(state_path)
        if seen:
            _cut_log(log, seen)
            print(f"{task.name}: goes on at {seen} of {p.images} images")
        else:
            for path in (log, status.path):
                path.unlink(missing_ok=True)

    if status.device.type in COUNTS and seen < p.images and not engine.sharding:
        (numbers, _), *_ = share(range(seen, seen + p.batch), p.microbatch, engine, task.split)
        backward = partial(engine.backward, partial(task.loss, numbers), last=False)
        status.count(partial(task.loss, numbers), backward, len(numbers), engine.dtype)
        optimizer.zero_grad(set_to_none=True)
    updates = (range(start, start + p.batch) for start in range(seen, p.images, p.batch))
    ready = task.ahead(numbers for update in updates for numbers, _ in share(update, p.microbatch, engine, task.split))
    progress = bar(p.images, task.name, initial=seen, disable=not engine.main)
    while True:
        for watcher in task.watchers:
            watcher.pause(seen, engine)
        last = seen >= p.images
        pause = seen != saved and (last or seen % p.save_images < p.batch)  # the first update there or behind
        if pause and task.validate:
            row = engine.run(task.validate)
            if not all(map(math.isfinite, row.values())):
                progress.close()
                raise FloatingPointError(f"{task.name}: held-out loss at image {seen} is not finite: {row}; {ADVICE}")
            engine.say(f"{task.name} at {seen}: " + " · ".join(f"{key} {value:.5f}" for key, value in row.items()))
            if engine.main:
                _log(log, {"seen": seen, **row})
        if pause and seen:
            tensors = {f"weights/{n}": w for n, w in task.parameters.items()}
            tensors |= {f"average/{n}": a for n, a in averages.items()}
            tensors |= {f"watched/{n}": t for n, t in watched.items()}
            tensors |= optimizer_tensors(optimizer, names)
            counters = {"seen": seen, "losses": losses, "inputs": inputs, "time": time.time()}
            gathered = engine.gather(tensors)
            if engine.main:
                save_state(state_path, gathered, counters, p.keep_states)
            del gathered, tensors
        if last:
            break
        # -- single training step -----------------------------------------------------------------------------
        status.begin()
        rate = learning_rate(seen, p)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        parts = share(range(seen, seen + p.batch), p.microbatch, engine, task.split)
        values = []
        for i, (numbers, portion) in enumerate(parts):
            with status.waiting():
                next(ready)
            values.append(engine.backward(partial(_weighted, task.loss, numbers, portion), last=i == len(parts) - 1))
        total = engine.sum(sum(values)) / engine.world
        norm = whole(nn.utils.clip_grad_norm_(weights, 1.0)).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            own = [(numbers, value) for (numbers, _), value in zip(parts, values, strict=True)]
            alone = task.loss if engine.world == 1 else None  # several processes run a model together
            progress.close()
            raise FloatingPointError(f"{task.name}: {save_broken(broken, seen, own, alone, task.describe)}; {ADVICE}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += p.batch
        for watcher in task.watchers:
            watcher.updated(seen, p.batch)
        if average:
            half_life = min(p.ema_images, max(0.1 * seen, p.batch))
            torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - 0.5 ** (p.batch / half_life))
        status.end(p.batch)
        # ------------------------------------------------------------------------------------------------------
        losses.append(total)
        progress.update(p.batch)
        if len(losses) * p.batch >= min(p.save_images, 1600) or seen >= p.images:
            mean = sum(losses) / len(losses)
            if engine.main:
                _log(log, {"seen": seen, "loss": mean, "learning_rate": rate})
                progress.set_postfix({"loss": f"{mean:.4f}", **status.row(seen)})
            losses.clear()
    progress.close()
    with torch.no_grad():
        for weight, kept in zip(weights, average, strict=False):
            weight.copy_(kept)
    engine.settle()


def share(
    batch: range, microbatch: int, engine: Engine, split: Callable[[range, int], Sequence[Sequence[int]]] = consecutive
) -> list[tuple[Sequence[int], float]]:
    """The microbatches of one process, each with the weight of its mean loss, so that the mean over processes of their sums is the
    mean over the batch. All processes get as many, if need be one that weighs nothing: they meet in each."""
    size = min(microbatch, -(-len(batch) // engine.world))
    parts = split(batch, size)
    own: list[tuple[Sequence[int], float]] = [(n, len(n) / len(batch) * engine.world) for n in parts[engine.rank :: engine.world]]
    return own + [(parts[0], 0.0)] * (-(-len(parts) // engine.world) - len(own))


def _weighted(loss: Callable[[Sequence[int]], torch.Tensor], numbers: Sequence[int], portion: float) -> torch.Tensor:
    return loss(numbers) * portion


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat


def _check_inputs(name: str, path: Path, before: dict[str, Any], now: dict[str, Any], allow: Collection[str]) -> None:
    """ValueError unless what differs is allowed."""
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key) and key not in allow]
    if differ:
        shown = ", ".join(f"{key} was {before.get(key)!r:.40} and is {now.get(key)!r:.40}" for key in differ)
        raise ValueError(
            f"{name}: {path} was saved under other values: {shown}; put them back, go on with the new ones by "
            f"{' '.join(f'--allow {key}' for key in differ)}, or delete the file to start from the beginning"
        )


def _optimizer(task: Task, p: Optimisation) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": p.learning_rate, "betas": (0.9, 0.99), "weight_decay": p.weight_decay}
    if p.optimizer == "adamw":
        return torch.optim.AdamW(_groups(task), **common, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("optimizer adamw8bit needs bitsandbytes; `pip install easyref[bitsandbytes]`, or optimizer: adamw") from None
    if any(hasattr(parameter, "full_tensor") for parameter in task.parameters.values()):
        raise ValueError("optimizer adamw8bit cannot take shards; launch without --use_fsdp, or optimizer: adamw")
    return bitsandbytes.optim.AdamW8bit(_groups(task), **common)


def _groups(task: Task) -> list[dict]:
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in task.parameters.items():
        by_factor.setdefault(task.factors.get(name, 1.0), []).append(parameter)
    return [{"params": params, "factor": factor} for factor, params in by_factor.items()]


def _log(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def _cut_log(path: Path, seen: int) -> None:
    """Drop log rows after `seen`: they will be written again, with the same values."""
    if path.exists():
        rows = path.read_text().splitlines()
        kept = [f"{row}\n" for row in rows if row.endswith("}") and json.loads(row)["seen"] <= seen]
        write_bytes(path, "".join(kept).encode())
