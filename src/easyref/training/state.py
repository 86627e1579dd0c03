"""Exact training state in one safetensors file: weights, AdamW moments, weight average, and the counters as metadata.

One atomic rename is the whole commit, so a kill at any moment, also during a save, leaves the last good state.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from easyref.records import atomic_path


def save_state(path: Path, tensors: dict[str, torch.Tensor], counters: dict) -> None:
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"easyref": json.dumps(counters)})


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            counters = json.loads(file.metadata()["easyref"])
            return {k: file.get_tensor(k) for k in file.keys()}, counters  # noqa: SIM118 (safe_open is no mapping)
    except Exception as error:
        raise ValueError(f"{path}: not a training state that can be read ({error}); delete it to start from the beginning") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts, by parameter name."""
    return {
        f"adamw/{names[p]}/{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.nn.Parameter, str], tensors: dict[str, torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            prefix = f"adamw/{names[p]}/"
            found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if found:
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
