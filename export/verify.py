"""Compare ONNX graphs, run by ONNX Runtime, with torch: over timesteps, batches, sizes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from easyref.pipeline import EasyRef, Request
from easyref.runtime import Engines, Outputs
from export.graphs import Graph


class VerifyError(RuntimeError):
    """An output differs by more than is allowed; the message says which, by how much."""


@dataclass(frozen=True)
class Difference:
    case: str
    largest: float  # |ONNX - torch|, of the largest |torch|


def cases(graph: Graph) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Inputs of other batches, sizes, timesteps and scales than the graph was exported with."""
    if graph.cases:
        yield from graph.cases
        return
    rng = torch.Generator().manual_seed(1)

    def draw(name: str, free: dict[int, int]) -> Tensor:
        example = graph.inputs[name]
        shape = [free.get(axis, size) for axis, size in enumerate(example.shape)]
        return torch.randn(shape, generator=rng).to(example.dtype) if example.is_floating_point() else example

    for batch, height, width, length in ((1, 8, 8, 24), (2, 16, 8, 24), (3, 7, 13, 5)):
        sizes = {"b": batch, "h": height, "w": width, "l": length}
        free = {name: {axis: sizes[dim.__name__] for axis, dim in axes.items()} for name, axes in graph.free.items()}
        values = {name: draw(name, free[name]) for name in graph.inputs}
        label = f"batch {batch}, {height}x{width}"
        if "timestep" in values:
            for step in (0, 1, 500, 999):
                yield f"{label}, timestep {step}", values | {"timestep": torch.tensor(step)}
        elif "scale" in values:
            for scale in (0.0, 0.5, 1.0):
                yield f"{label}, scale {scale}", values | {"scale": torch.full_like(values["scale"], scale)}
        else:
            yield label, values


def several(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@torch.no_grad()
def verify(graph: Graph, run: Callable[..., Outputs], tolerance: float) -> list[Difference]:
    """All cases of one graph, run by an engine of it.

    Raises:
        VerifyError: the first output that differs by more than `tolerance` of its largest value, or is not finite.
    """
    found = []
    for case, inputs in cases(graph):
        for name, ours, theirs in zip(graph.outputs, several(graph.module(**inputs)), several(run(**inputs)), strict=True):
            largest = (theirs.cpu().double() - ours.double()).abs().max().item() / (ours.abs().max().item() or 1.0)
            if not largest <= tolerance:  # also not a number
                raise VerifyError(
                    f"{graph.name}: {name} differs by {largest:.2e} of its largest value at {case}; allowed {tolerance:.0e}"
                )
            found.append(Difference(case, largest))
    return found


def verify_images(torch_easyref: EasyRef, checkpoint: Path, folder: Path, tolerance: float, steps: int = 4) -> float:
    """Whole images, drawn by torch and by the graphs of `folder`: the largest difference, in grey levels of 255.

    Raises:
        VerifyError: more than `tolerance`.
    """
    rng = np.random.default_rng(0)
    engines = EasyRef.from_pretrained(checkpoint, engines=Engines.onnxruntime(folder))
    most = torch_easyref.encoder.config.max_references
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 80, 3), np.uint8)) for _ in range(min(8, most))]
    worst = 0.0
    for scale in (0.0, 0.5, 1.0):
        for count in {1, 2, len(pictures)}:
            requests = [Request("a cat", pictures[:count], 0), Request("farmer", pictures[-count:], 1)]
            ours, theirs = ([np.asarray(i, np.float64) for i in e(requests, steps, 3.0, scale)] for e in (torch_easyref, engines))
            largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
            if not largest <= tolerance:
                raise VerifyError(f"images of {count} references at scale {scale}: {largest:.0f} of 255 off; allowed {tolerance:.0f}")
            worst = max(worst, largest)
    return worst
