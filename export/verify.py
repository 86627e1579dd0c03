"""Compare ONNX graphs, run by ONNX Runtime, with torch: over timesteps, batches, sizes and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from easyref.pipeline import EasyRef, Request
from easyref.runtime import Engines, Outputs
from easyref.trt import Shapes, TensorRTEngine
from export.graphs import Graph


class VerifyError(RuntimeError):
    """An output differs by more than is allowed; the message says which, by how much."""


@dataclass(frozen=True)
class Difference:
    case: str
    largest: float  # |ONNX - torch|, of the largest |torch|


def cases(graph: Graph, profile: Shapes | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Inputs of other batches, sizes, timesteps and scales than the graph was exported with; with the `profile` of an engine only such
    as it takes, drawn of its least and usual shapes."""
    for label, inputs in graph.cases:
        if profile is None or all(_between(profile[name], tuple(value.shape)) for name, value in inputs.items()):
            yield label, inputs
    if graph.cases:
        return
    rng = torch.Generator().manual_seed(1)

    def draw(example: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=rng).to(example.dtype) if example.is_floating_point() else example

    shapes = {}
    if profile:
        shapes = {f"{which} shapes": {name: profile[name][i] for name in graph.inputs} for i, which in enumerate(("least", "usual"))}
    else:
        for batch, height, width, length in ((1, 8, 8, 24), (2, 16, 8, 24), (3, 7, 13, 5)):
            sizes = {"b": batch, "h": height, "w": width, "l": length}
            shapes[f"batch {batch}, {height}x{width}"] = {name: _shape(graph, name, sizes) for name in graph.inputs}
    for label, of in shapes.items():
        values = {name: draw(example, of[name]) for name, example in graph.inputs.items()}
        if "timestep" in values:
            for step in (0, 1, 500, 999):
                yield f"{label}, timestep {step}", values | {"timestep": torch.tensor(step)}
        elif "scale" in values:
            for scale in (0.0, 0.5, 1.0):
                yield f"{label}, scale {scale}", values | {"scale": torch.full_like(values["scale"], scale)}
        else:
            yield label, values


def _shape(graph: Graph, name: str, sizes: dict[str, int]) -> tuple[int, ...]:
    free = {axis: sizes[dim.__name__] for axis, dim in graph.free[name].items()}
    return tuple(free.get(axis, size) for axis, size in enumerate(graph.inputs[name].shape))


def _between(bounds: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> bool:
    least, _, largest = bounds
    return all(a <= size <= b for a, size, b in zip(least, shape, largest, strict=True))


def several(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@torch.no_grad()
def verify(graph: Graph, run: Callable[..., Outputs], tolerance: float) -> list[Difference]:
    """All cases of one graph, run by an engine of it.

    Raises:
        VerifyError: the first output that differs by more than `tolerance` of its largest value, or is not finite.
    """
    found = []
    for case, inputs in cases(graph, run.profile() if isinstance(run, TensorRTEngine) else None):
        for name, ours, theirs in zip(graph.outputs, several(graph.module(**inputs)), several(run(**inputs)), strict=True):
            largest = (theirs.cpu().double() - ours.double()).abs().max().item() / (ours.abs().max().item() or 1.0)
            if not largest <= tolerance:  # also not a number
                raise VerifyError(
                    f"{graph.name}: {name} differs by {largest:.2e} of its largest value at {case}; allowed {tolerance:.0e}"
                )
            found.append(Difference(case, largest))
    if not found:
        raise VerifyError(f"{graph.name}: no case has shapes that the engine takes; build it for other --size, --batch or --references")
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


def verify_quantized(
    checkpoint: Path, folder: Path, requests: Sequence[Request], steps: int, guidance: float, least: float
) -> list[float]:
    """PSNR, in dB, of each image drawn by the graphs of `folder` against torch's. Single pixels of 8 bits tell little, so no largest
    difference: a whole image does.

    Raises:
        VerifyError: their mean is below `least`.
    """
    found = []
    drawers = (
        EasyRef.from_pretrained(checkpoint, device="cpu"),
        EasyRef.from_pretrained(checkpoint, engines=Engines.onnxruntime(folder)),
    )
    for request in requests:
        ours, theirs = (np.asarray(drawer([request], steps, guidance)[0], np.float64) for drawer in drawers)
        found.append(10 * float(np.log10(255**2 / max(float(((ours - theirs) ** 2).mean()), 1e-3))))
    mean = float(np.mean(found))
    if not mean >= least:
        raise VerifyError(f"images of the quantized UNet: PSNR {mean:.1f} dB to torch's in the mean; wanted {least:.0f} dB")
    return found
