"""Exact training state in one safetensors file: weights, AdamW moments, weight average, and the counters as metadata.

One atomic rename is the whole commit, so a kill at any moment, also during a save, leaves the last good state. The file says nothing of
processes: shares of a tensor are put together in it, and any number of processes goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from easyref.records import atomic_path
from easyref.training.engine import like


def save_state(path: Path, tensors: Mapping[str, torch.Tensor], counters: dict[str, Any], keep: int = 1) -> None:
    """The `keep` - 1 states before this one stay beside it. `tensors`: whole, in main memory (`Engine.gather`)."""
    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary, {"easyref": json.dumps(counters)})
            if keep > 1 and (before := read_counters(path)):
                path.rename(path.with_suffix(f".{before['seen']:012}.safetensors"))
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"{path}: the state at image {counters['seen']} could not be saved ({error}); the one before is kept"
        ) from error
    for old in _earlier(path)[max(0, keep - 1) :]:
        old.unlink()


def remove_state(path: Path) -> None:
    """And those kept beside it."""
    for file in (path, *_earlier(path)):
        file.unlink(missing_ok=True)


def _earlier(path: Path) -> list[Path]:
    """States before `path` that were kept, the newest first."""
    return sorted(path.parent.glob(f"{path.stem}.{'[0-9]' * 12}.safetensors"), reverse=True)


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state at `path`, else the newest of those before it that can be read; None if there is none. Its tensors are mapped, not
    read: all processes of a machine hold the file once, and each only pages that it asks for.

    Raises:
        ValueError: there are states, and none can be read.
    """
    files = [file for file in (path, *_earlier(path)) if file.exists()]
    for file in files:
        if counters := read_counters(file):
            if file != files[0]:
                print(f"{files[0]}: not a training state that can be read; the one at image {counters['seen']} is taken")
            return load_file(file), counters
    if files:
        raise ValueError(f"{files[0]}: not a training state that can be read; delete it to start from the beginning")
    return None


def read_counters(file: Path) -> dict[str, Any] | None:
    """None for what is absent or torn: the header says how long a file is."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads(opened.metadata()["easyref"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


@torch.no_grad()
def restore(live: Mapping[str, torch.Tensor], kind: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors `kind`/NAME into those by name."""
    if lacking := [name for name in live if f"{kind}/{name}" not in tensors]:
        raise ValueError(f"the training state has no {kind}/{lacking[0]}, which what is in force needs; it cannot go on with that")
    for name, tensor in live.items():
        tensor.copy_(like(tensor, tensors[f"{kind}/{name}"]))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """The optimizer's moments and step counts, by parameter name."""
    return {
        f"optimizer/{names[p]}/{key}": value.clone() if key.startswith("qmap") else torch.as_tensor(value)  # one for all parameters
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    python_steps = not isinstance(optimizer, torch.optim.AdamW)  # bitsandbytes counts them in Python
    for group in optimizer.param_groups:
        for p in group["params"]:
            prefix = f"optimizer/{names[p]}/"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                step = found.pop("step")
                moments = {key: like(p, value) for key, value in found.items()}
                optimizer.state[p] = {"step": int(step) if python_steps else step.to(p.device), **moments}
