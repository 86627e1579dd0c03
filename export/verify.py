"""Compare ONNX graphs, run by ONNX Runtime, with torch: over timesteps, batches, sizes and scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.graphs import Graph


class VerifyError(RuntimeError):
    """An output differs by more than is allowed; the message says which, by how much."""


@dataclass(frozen=True)
class Difference:
    case: str
    largest: float  # |ONNX - torch|, of the largest |torch|


def session(path: Path, provider: str = "CPUExecutionProvider") -> Any:
    """An ONNX Runtime session that runs on `provider`.

    Raises:
        VerifyError: ONNX Runtime fell back to another provider, which it does silently.
    """
    import onnxruntime

    made = onnxruntime.InferenceSession(str(path), providers=[provider])
    if made.get_providers()[0] != provider:
        raise VerifyError(f"{path}: asked for {provider}, ONNX Runtime took {made.get_providers()[0]}; install what {provider} needs")
    return made


def cases(graph: Graph) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Inputs of other batches, sizes, timesteps and scales than the graph was exported with."""
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


@torch.no_grad()
def verify(graph: Graph, path: Path, tolerance: float) -> list[Difference]:
    """All cases of one graph.

    Raises:
        VerifyError: the first output that differs by more than `tolerance` of its largest value, or is not finite.
    """
    run, found = session(path), []
    for case, inputs in cases(graph):
        expected = graph.module(**inputs)
        for name, ours, theirs in zip(graph.outputs, [expected], run.run(None, {k: v.numpy() for k, v in inputs.items()}), strict=True):
            scale = ours.abs().max().item() or 1.0
            largest = float(np.abs(theirs.astype(np.float64) - ours.double().numpy()).max()) / scale
            if not largest <= tolerance:  # also not a number
                raise VerifyError(
                    f"{graph.name}: {name} differs by {largest:.2e} of its largest value at {case}; allowed {tolerance:.0e}"
                )
            found.append(Difference(case, largest))
    return found
