"""THE loop. Every training of the project (base models and the three stages) is a `Task` that runs through `train`.

Progress is counted in images. All randomness of image number n comes from (seed, purpose, n), so a run that was killed and
started again by the same command goes on to bit-identical weights, and any split into batch × microbatch draws the same.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from easyref.config import Optimisation
from easyref.progress import bar
from easyref.records import clear_temporaries, sha256_json, write_bytes
from easyref.training.state import load_optimizer, load_state, optimizer_tensors, save_state


@dataclass
class Task:
    """What one training is: named trainable parameters with a learning-rate factor each, and a loss over image numbers.

    `loss(numbers)` returns the mean loss over the images of the endless order at those numbers, as a scalar tensor.
    `fingerprint` is everything that, if changed, makes a saved state meaningless (parameters, input hashes).
    """

    name: str
    parameters: dict[str, nn.Parameter]
    loss: Callable[[range], torch.Tensor]
    fingerprint: dict
    factors: dict[str, float] = field(default_factory=dict)  # by parameter name; 1 where absent
    validate: Callable[[], dict[str, float]] | None = None


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


def train(task: Task, p: Optimisation, state_path: Path) -> None:
    """Run `task` to `p.images` images, resuming from `state_path` when it holds a state of the same fingerprint.

    Leaves the result in `task.parameters`: the weight average when `p.ema_images` > 0.
    The state file stays until the caller has stored the result and deletes it.
    """
    names = {parameter: name for name, parameter in task.parameters.items()}
    weights = list(task.parameters.values())
    optimizer = torch.optim.AdamW(_groups(task), lr=p.learning_rate, betas=(0.9, 0.99), weight_decay=p.weight_decay, fused=True)
    average = [w.detach().clone() for w in weights] if p.ema_images else []
    fingerprint = sha256_json({**task.fingerprint, "optimisation": p.model_dump()})
    seen, saved = 0, -1
    losses: list[float] = []  # of the updates since the last row of the log
    log = state_path.with_suffix(".jsonl")
    clear_temporaries(state_path)
    if state_path.exists():
        tensors, counters = load_state(state_path)
        if counters["fingerprint"] == fingerprint:
            seen = saved = counters["seen"]
            losses = counters["losses"]
            _restore(task.parameters, average, tensors)
            load_optimizer(optimizer, names, tensors)
            _cut_log(log, seen)
            print(f"{task.name}: goes on at {seen} of {p.images} images")
        else:
            print(f"{task.name}: parameters or inputs changed since {state_path} was saved; starts from the beginning")
    if seen == 0:
        log.unlink(missing_ok=True)

    progress = bar(p.images, task.name, initial=seen)
    while True:
        last = seen >= p.images
        pause = seen != saved and (last or seen % p.save_images == 0)
        if pause and task.validate:
            _log(log, {"seen": seen, **task.validate()})
        if pause and seen:
            tensors = {f"weights/{n}": w for n, w in task.parameters.items()}
            tensors |= {f"average/{names[w]}": a for w, a in zip(weights, average, strict=False)}
            tensors |= optimizer_tensors(optimizer, names)
            save_state(state_path, tensors, {"seen": seen, "losses": losses, "fingerprint": fingerprint, "time": time.time()})
        if last:
            break
        # -- single training step -----------------------------------------------------------------------------
        rate = learning_rate(seen, p)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        total = 0.0
        for start in range(seen, seen + p.batch, p.microbatch):
            loss = task.loss(range(start, start + p.microbatch)) * (p.microbatch / p.batch)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{task.name}: loss is {total} at image {seen}; lower learning_rate, the state before is kept")
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += p.batch
        if average:
            half_life = min(p.ema_images, max(0.1 * seen, p.batch))
            torch._foreach_lerp_(average, [w.detach() for w in weights], 1 - 0.5 ** (p.batch / half_life))
        # ------------------------------------------------------------------------------------------------------
        losses.append(total)
        progress.update(p.batch)
        if len(losses) * p.batch >= min(p.save_images, 1600) or seen >= p.images:
            mean = sum(losses) / len(losses)
            progress.set_postfix(loss=f"{mean:.4f}")
            _log(log, {"seen": seen, "loss": mean, "learning_rate": rate})
            losses.clear()
    progress.close()
    with torch.no_grad():
        for weight, kept in zip(weights, average, strict=False):
            weight.copy_(kept)


def _groups(task: Task) -> list[dict]:
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, parameter in task.parameters.items():
        by_factor.setdefault(task.factors.get(name, 1.0), []).append(parameter)
    return [{"params": params, "factor": factor} for factor, params in by_factor.items()]


@torch.no_grad()
def _restore(parameters: dict[str, nn.Parameter], average: list[torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weights/{name}"])
    for name, mean in zip(parameters, average, strict=False):
        mean.copy_(tensors[f"average/{name}"])


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
