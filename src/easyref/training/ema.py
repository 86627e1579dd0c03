"""Post-hoc EMA (arXiv 2312.02696, §3): a weight average of any width, chosen after the training.

At image t the power-function average of exponent γ weighs the weights of image τ ≤ t by τ^γ. A training keeps two such averages and
stores both every so many images; afterwards a sum of the stored ones, by least squares over their profiles, is the average of any other
exponent. A width is the profile's standard deviation as a share of the training so far; a narrow one has a large exponent.

Letters: S stored averages · t images seen · γ exponent.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from easyref.model import weights
from easyref.model.weights import CheckpointConfig
from easyref.training.engine import Engine
from easyref.training.state import read_counters, save_state
from easyref.training.trainer import Watcher

WIDTHS = (0.05, 0.10)
WIDEST = 12**-0.5  # γ = 0, the plain mean
MOST_MISSED = 0.01  # of the wanted profile's square


def exponent(width: float) -> float:
    """γ of a width: width² = (γ+1) / ((γ+2)²(γ+3))."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def share(gamma: float, seen: int, batch: int) -> float:
    """What the weights at `seen` images, `batch` after the ones before, get in the average: 1 - β (eq. 2)."""
    return 1 - (1 - batch / seen) ** (gamma + 1)


def overlap(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """∫ p_a p_b of the profiles p(τ) = (γ+1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t."""
    end = np.minimum(t_a, t_b)
    both = gamma_a + gamma_b + 1
    return (gamma_a + 1) * (gamma_b + 1) * (end / t_a) ** gamma_a * (end / t_b) ** gamma_b * end / (t_a * t_b * both)


def fit(t_S: np.ndarray, gamma_S: np.ndarray, t: float, gamma: float) -> tuple[np.ndarray, float]:
    """Factors of the stored profiles whose sum is nearest to the profile (t, γ), and the share of its square that is missed.

    Unlike in the paper they sum to 1, as the weights of an average do: few profiles would else shrink the model.
    """
    gram_SS = overlap(t_S[:, None], gamma_S[:, None], t_S, gamma_S)
    wanted_S = overlap(t_S, gamma_S, np.array(t), np.array(gamma))
    ones_S = np.ones(len(t_S))
    system = np.block([[gram_SS, ones_S[:, None]], [ones_S, 0]])  # with a Lagrange multiplier
    factors_S = np.linalg.lstsq(system, np.append(wanted_S, 1), rcond=None)[0][:-1]
    square = float(overlap(np.array(t), np.array(gamma), np.array(t), np.array(gamma)))
    return factors_S, 1 - float(2 * wanted_S @ factors_S - factors_S @ gram_SS @ factors_S) / square


class Averages(Watcher):
    """Two averages of a training's weights, stored in `folder` every `every` images; 0: none. Snapshots stay until the next training
    begins; one that goes on writes those after its state again."""

    def __init__(self, folder: Path, every: int, config: CheckpointConfig) -> None:
        self.folder, self.every, self.config = folder, every, config
        self.kept: dict[str, Tensor] = {}

    def begin(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        if self.every:
            self.parameters = list(parameters.values())
            self.kept = {f"{width}/{name}": w.detach().clone() for width in WIDTHS for name, w in parameters.items()}
        return self.kept

    def updated(self, seen: int, batch: int) -> None:
        current = [w.detach() for w in self.parameters] if self.every else []
        for i, width in enumerate(WIDTHS if self.every else ()):
            average = list(self.kept.values())[i * len(current) : (i + 1) * len(current)]
            torch._foreach_lerp_(average, current, share(exponent(width), seen, batch))

    def pause(self, seen: int, engine: Engine) -> None:
        for later in self.folder.glob("*.safetensors") if engine.main else ():
            if int(later.stem) > seen:  # of a training before, or of this one under values that it does not go on with
                later.unlink()
        if seen and self.every and seen % self.every == 0:
            about = {"seen": seen, "config": self.config.model_dump(mode="json")}
            gathered = engine.gather(self.kept)
            if engine.main:
                save_state(self.folder / f"{seen:012}.safetensors", gathered, about)


def average(folder: Path, checkpoint: Path, width: float, out: Path) -> str:
    """Write the checkpoint `out`: `checkpoint` with the average of `width` at the last snapshot of `folder`. Returns what was done.

    Raises:
        ValueError: no snapshots, or of another training, or too few for this width.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"width {width:g}: give a share of the training above 0 and below {WIDEST:.3f}, which is the plain mean")
    config = weights.read_config(checkpoint)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no snapshots; set snapshot_images in the stage's parameters and train it")
    stored: list[dict[str, Any]] = []
    for file in files:
        if not (about := read_counters(file)):
            raise ValueError(f"{file}: not a snapshot that can be read; delete it to do without")
        if CheckpointConfig.model_validate(about["config"]) != config:
            raise ValueError(f"{file}: not of the training that made {checkpoint}; train the stage to its end")
        stored.append(about)
    t_S = np.repeat([float(about["seen"]) for about in stored], len(WIDTHS))
    gamma_S = np.tile([exponent(w) for w in WIDTHS], len(stored))
    factors_S, missed = fit(t_S, gamma_S, t_S[-1], exponent(width))
    if missed > MOST_MISSED:
        raise ValueError(
            f"width {width:g}: {len(files)} snapshots miss {missed:.1%} of that average; train with smaller snapshot_images, "
            f"or ask for one nearer to {WIDTHS[0]:g} and {WIDTHS[1]:g}"
        )
    with ExitStack() as opened:
        whole = opened.enter_context(safe_open(checkpoint / weights.WEIGHTS, "pt"))
        snapshots = [opened.enter_context(safe_open(file, "pt")) for file in files]
        dtype = next(whole.get_tensor(name).dtype for name in whole.keys())  # noqa: SIM118
        averaged = {name.split("/", 1)[1] for name in snapshots[0].keys()}  # noqa: SIM118 (no mapping)
        tensors = {}
        for name in whole.keys():  # noqa: SIM118
            if name not in averaged:
                tensors[name] = whole.get_tensor(name)
                continue
            total = torch.zeros(whole.get_slice(name).get_shape(), dtype=torch.float64)
            for factor, (snapshot, w) in zip(factors_S, ((s, w) for s in snapshots for w in WIDTHS), strict=True):
                total += float(factor) * snapshot.get_tensor(f"{w}/{name}").double()
            tensors[name] = total.float()
    weights.save(out, tensors, config, dtype)
    done = f"{len(averaged)} tensors averaged over {len(files)} snapshots up to image {t_S[-1]:.0f}"
    return f"{out}: {done}, {max(missed, 0):.1e} of the average missed"
