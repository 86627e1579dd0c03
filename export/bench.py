"""`easyref bench export`: what the export of a preset's models takes, with random weights: no network, no checkpoint.

Models of the preset's shapes are made on the meta device, get memory in half precision once, and random weights there. Each part is
exported in a process of its own, then each graph is loaded and run by ONNX Runtime in another one, and compared with torch. Inputs are
small (latents of 9x11, one reference of four tokens): what counts here are the weights.

Units: seconds, also of CPU time, for machines that do other things as well; GiB. `peak` is the largest resident memory of a process,
with the file pages that it maps.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from easyref.config import Params
from easyref.model import shapes
from easyref.model.adapter import Adapter
from easyref.model.reference import ReferenceEncoder, ReferenceProcessor
from easyref.progress import machine, track
from easyref.records import write_json
from easyref.runtime import Engine
from easyref.training.models import reference_config
from export.graphs import Graph, decoder_graph, encoder_graphs, export_graph, unet_graphs

PARTS = ("unet", "reference_encoder", "vae_decoder")
GIB = 2**30


def bench_export(params: Params, base: Path, folder: Path, out: Path, opset: int = 20) -> dict[str, Any]:
    """Measure and write `out`. `base`: models/base, for the tokenizer and shapes not in model/shapes.py; `folder`: for the graphs,
    deleted one after the other."""
    rows: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    result = {
        "preset": params.preset, "precision": "fp16", "opset": opset, "parts": parts, "graphs": rows,
        **machine("torch", "onnx", "onnxscript", "onnxruntime"),
    }  # fmt: skip
    for part in track(PARTS, "bench: export", len(PARTS), "parts"):
        exported, peak = _alone(export_part, params, base, part, folder / part, opset)
        parts[part] = {"parameters": exported["parameters"], "build_s": exported["build_s"], "export_peak_gib": peak}
        for name, row, inputs, expected in exported["graphs"]:
            loaded, peak = _alone(load_graph, folder / part / f"{name}.onnx", inputs, expected)
            rows[name] = {**row, **loaded, "load_peak_gib": peak}
            write_json(out, result)  # hours are possible: what is known stays
        shutil.rmtree(folder / part)
    return result


def _alone(call: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """Its result, and the peak memory of the process it had for itself."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_with_peak, call, *given).result()


def _with_peak(call: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    found = call(*given)
    return found, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)


@torch.no_grad()
def export_part(params: Params, base: Path, part: str, folder: Path, opset: int) -> dict[str, Any]:
    """Graphs of one part in `folder`: of each what it took, inputs, and torch's output."""
    begin = time.monotonic()
    with SinglePrecisionKernels():
        made = part_graphs(params, base, part)
    parameters = sum(p.numel() for p in {p for graph in made for p in graph.module.parameters()})
    found: dict[str, Any] = {"parameters": parameters, "build_s": round(time.monotonic() - begin, 1), "graphs": []}
    folder.mkdir(parents=True, exist_ok=True)
    for graph in made:
        begin, cpu = time.monotonic(), time.process_time()
        export_graph(graph, folder / f"{graph.name}.onnx", opset)
        row: dict[str, Any] = {"export_s": round(time.monotonic() - begin, 1), "export_cpu_s": round(time.process_time() - cpu, 1)}
        row["files_gib"] = {path.name: round(path.stat().st_size / GIB, 3) for path in sorted(folder.glob(f"{graph.name}.onnx*"))}
        with SinglePrecisionKernels():
            found["graphs"].append((graph.name, row, graph.inputs, graph.module(**graph.inputs)))
    return found


def load_graph(path: Path, inputs: dict[str, Tensor], expected: Tensor) -> dict[str, Any]:
    begin = time.monotonic()
    engine = Engine(path)
    loaded = time.monotonic()
    output = engine(**inputs).double()
    ran, largest = time.monotonic(), expected.double().abs().max()
    off = (output - expected.double()).abs().max() / largest
    if not off < 0.05:  # also not a number
        raise RuntimeError(f"{path.name}: {off:.2e} of the largest value off torch's; these graphs are not right")
    return {"load_s": round(loaded - begin, 1), "run_s": round(ran - loaded, 1), "difference": float(off)}


def part_graphs(params: Params, base: Path, part: str) -> list[Graph]:
    values = shapes.configs(str(params.base.diffusion_id), str(params.base.mllm_id), base)
    with torch.device("meta"):
        models = shapes.build(values)
    unet, mllm, vae = (models[name].requires_grad_(False) for name in ("unet", "mllm", "vae"))
    unet.half(), vae.half()
    if part == "unet":
        Adapter.install(unet, params.reference.num_tokens, None, None)
        randomize(unet)
        return unet_graphs(unet, params.reference.num_tokens)
    if part == "vae_decoder":
        randomize(vae)
        return [decoder_graph(vae, torch.float16)]
    full = reference_config(params, mllm.config, unet.config.cross_attention_dim)
    side = 2 * full.merge_size * full.patch_size
    config = full.model_copy(update={"min_pixels": side**2, "max_pixels": side**2})
    encoder = ReferenceEncoder(mllm, config, torch.Generator().manual_seed(0)).half()
    randomize(encoder)
    for module in encoder.modules():
        if "Rotary" in type(module).__name__:
            encoder.mllm._init_weights(module)  # frequencies are no parameters
    return encoder_graphs(encoder, ReferenceProcessor.from_pretrained(str(base / "mllm"), config), references=((1,),))


def randomize(model: nn.Module) -> None:
    """Memory for a model of the meta device, and random weights that keep the size of what passes through them."""
    model.to_empty(device="cpu")
    rng = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5, generator=rng)
        else:
            p.fill_(float(name.endswith("weight")))  # of a norm; biases are zero


class SinglePrecisionKernels(TorchFunctionMode):
    """Matrix products of half precision in single precision, each result rounded: as ONNX Runtime does it on a CPU, and in a
    hundredth of the time of torch's own kernels."""

    FUNCTIONS = (F.linear, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.bmm)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in self.FUNCTIONS:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.float16 else t, (args, kwargs or {}))
        return func(*args, **kwargs).half()
