"""`python -m export CHECKPOINT OUT`: ONNX graphs of a checkpoint, verified against torch, with a manifest of hashes."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from easyref import records
from easyref.model.weights import read_config
from easyref.records import alone, atomic_folder, changed_file, read_json, sha256_file, write_json
from easyref.runtime import MANIFEST, Engine
from export import start

DTYPE = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {"fp32": (1e-4, 2.0), "fp16": (1e-2, 16.0)}  # of an output's largest value; of an image, against torch in fp32
DECIBELS = {"int8": 30.0, "fp8": 30.0}  # least mean PSNR of images that the quantized UNet draws, against torch in fp32
VERSIONS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
WORK = Path(".work") / "export"


def inputs_of(checkpoint: Path, opset: int, dtype: str, tolerance: float, image_tolerance: float, quantize: dict | None = None) -> dict:
    """All that the graphs and what is said of them depend on. `quantize`: the same of a quantized UNet."""
    import onnxruntime

    own = read_config(checkpoint).base_id.startswith("base/")  # else the hub's, at the revision that the checkpoint's config names
    base = sorted(path for path in (checkpoint.parent / "base").rglob("*") if path.is_file()) if own else []
    code = sorted([*Path(__file__).parent.glob("*.py"), *(Path(records.__file__).parent / "model").glob("*.py")])
    files = {str(path.relative_to(checkpoint.parent)): sha256_file(path) for path in [*sorted(checkpoint.iterdir()), *base]}
    return {
        "opset": opset, "dtype": dtype, "tolerance": tolerance, "image_tolerance": image_tolerance, "files": files,
        "code": [sha256_file(path) for path in code],
        "versions": {**{name: version(name) for name in VERSIONS}, "onnxruntime": onnxruntime.__version__},  # or onnxruntime-gpu
        "quantize": quantize,
    }  # fmt: skip


def fresh(out: Path, inputs: dict) -> bool:
    """Whether `out` holds whole graphs of just these inputs."""
    if not (out / MANIFEST).exists():
        return False
    manifest = read_json(out / MANIFEST)
    return manifest["inputs"] == inputs and changed_file(out, manifest["files"]) is None


def run(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder; its base models beside it.")] = Path("models/finetune_multi"),
    out: Annotated[Path, typer.Argument(help="Folder for the graphs.")] = Path("out/onnx"),
    opset: Annotated[int, typer.Option(min=18, max=24)] = 20,
    dtype: Annotated[Literal["fp32", "fp16"], typer.Option(help="Precision of weights and outputs.")] = "fp32",
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest difference to torch, of an output's largest value.")] = None,
    image_tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest difference of whole images, of 255 grey levels.")
    ] = None,
    quantize: Annotated[Literal["int8", "fp8"] | None, typer.Option(help="The UNet in 8 bits, by nvidia-modelopt.")] = None,
    decibels: Annotated[float | None, typer.Option(min=0, help="Least mean PSNR of images drawn with 8 bits.")] = None,
    data: Annotated[Path, typer.Option(help="With --quantize: its training groups calibrate.")] = Path("data"),
) -> None:
    """ONNX graphs of a checkpoint, verified against torch."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint; `make run` trains one, or name another")
    from easyref.pipeline import EasyRef
    from export import quantize as quantizing
    from export.graphs import export_graph, graphs, shapes_of
    from export.verify import verify, verify_images

    usual, usual_of_images = TOLERANCE[dtype]
    tolerance = usual if tolerance is None else tolerance
    image_tolerance = usual_of_images if image_tolerance is None else image_tolerance
    how = quantizing.inputs_of(quantize, dtype, DECIBELS[quantize] if decibels is None else decibels, data) if quantize else None
    inputs = inputs_of(checkpoint, opset, dtype, tolerance, image_tolerance, how)
    if fresh(out, inputs):
        print(f"{out}: up to date")
        return
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise ValueError(f"{out}: holds something else than graphs, which would be lost; name another folder")
    with alone(WORK), atomic_folder(out) as folder:
        easyref = EasyRef.from_pretrained(checkpoint, dtype=DTYPE[dtype], device="cpu")
        rows = []
        for graph in graphs(easyref):
            begin = time.monotonic()
            path = folder / f"{graph.name}.onnx"
            export_graph(graph, path, opset)
            found = verify(graph, Engine(path), tolerance)
            worst = max(found, key=lambda d: d.largest)
            rows.append({"graph": graph.name, "cases": len(found), "largest": worst.largest, "at": worst.case})
            size, seconds = path.stat().st_size / 2**20, time.monotonic() - begin
            print(f"{graph.name}: {size:.1f} MiB in {seconds:.0f} s; {len(found)} cases, at most {worst.largest:.1e} off")
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
        about: dict[str, Any] = {"inputs": inputs, "files": files, "shapes": shapes_of(easyref), "verified": rows}
        write_json(folder / MANIFEST, about)
        levels = verify_images(EasyRef.from_pretrained(checkpoint, device="cpu"), checkpoint, folder, image_tolerance)
        print(f"images: at most {levels:.0f} of 255 off")
        about |= {"images_off": levels}
        if quantize:
            about = quantizing.quantize(checkpoint, folder, about, data)
        write_json(folder / MANIFEST, about)
    print(f"{out}: {', '.join(files)}")


if __name__ == "__main__":
    start("export", run)
