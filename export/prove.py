"""`python -m export.prove CHECKPOINT OUT`: a GPU machine from end to end. Graphs, engines, verified against torch, timed: proof.json.

Without a GPU it says what is missing and ends; `--provider cpu` goes the same way with ONNX Runtime in the place of the engines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image

from easyref.pipeline import EasyRef, Request
from easyref.records import write_json
from easyref.runtime import EngineError, Engines
from easyref.trt import Options, Sizes, build, device, doctor, engines, load, parse_range, steps
from export import start
from export.__main__ import run as export
from export.verify import verify


def prove(
    checkpoint: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Argument()],
    provider: Annotated[Literal["tensorrt", "cpu"], typer.Option()] = "tensorrt",
    size: Annotated[str, typer.Option()] = "512:1024:1360",
    text: Annotated[str, typer.Option()] = "77:77:154",
    tolerance: Annotated[float, typer.Option("--rtol")] = 1e-2,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """Graphs, engines, verification and timings of a checkpoint."""
    missing = [f"{name}: {found}" for name, good, found in doctor(out / "onnx") if not good and name != "graphs"]
    if provider == "tensorrt" and missing:
        raise EngineError("; ".join(missing))
    export(checkpoint, out / "onnx")
    if provider == "tensorrt":
        sizes = Sizes(size=parse_range(size, "size"), text=parse_range(text, "text"))
        for step in steps(out / "onnx", out / "engines", sizes, Options(), load().__version__, device()):
            begin = time.monotonic()
            if not step.fresh:
                build(step, Options(), out / "engines" / "timing.cache")
            print(f"{step.name}: built in {time.monotonic() - begin:.0f} s")
        made = engines(out / "onnx", out / "engines", cuda_graph=True)
    else:
        made = Engines.onnxruntime(out / "onnx", provider)
    from export.graphs import graphs

    on_cpu = EasyRef.from_pretrained(checkpoint, device="cpu")
    worst = {graph.name: max(d.largest for d in verify(graph, made.engines[graph.name], tolerance)) for graph in graphs(on_cpu)}
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))]
    requests = [Request("", images, 0)]
    with_torch, with_engines = EasyRef.from_pretrained(checkpoint), EasyRef.from_pretrained(checkpoint, engines=made)
    drawn = [np.asarray(e(requests, 8, 3.0)[0], np.float64) for e in (with_torch, with_engines)]
    methods = {"torch": with_torch, "engines": with_engines}
    timings = {name: _milliseconds(partial(e, requests, 8, 3.0), rounds) for name, e in methods.items()}
    result: dict[str, Any] = {
        "provider": provider, "device": device() if torch.cuda.is_available() else "cpu", "largest_difference": worst,
        "image_difference": float(np.abs(drawn[0] - drawn[1]).max()), "image_ms_of_8_steps": timings,
    }  # fmt: skip
    write_json(out / "proof.json", result)
    share = timings["engines"] / timings["torch"]
    print(f"{out / 'proof.json'}: images {result['image_difference']:.0f} of 255 off, {share:.2f} of torch's time")


def _milliseconds(call: Callable[[], Any], rounds: int) -> float:
    call()
    took = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(1000 * (time.perf_counter() - begin))
    return statistics.median(took)


if __name__ == "__main__":
    start("prove", prove)
