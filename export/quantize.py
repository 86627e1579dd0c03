"""INT8 or FP8 in the UNet's graph, by nvidia-modelopt: weights in 8 bits, Q/DQ nodes before convolutions and linear layers. Their
ranges come from what the UNet sees while our pipeline draws from references and prompts of the training groups.

modelopt wants another onnx than this project has, so it runs in an environment of its own, whose Python EASYREF_MODELOPT names.

    training groups → EasyRef with the graphs, inputs of the UNet kept → samples.npz → quantize_worker.py → unet.onnx in 8 bits
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from easyref.data.captions import caption
from easyref.data.dataset import TrainingImages
from easyref.pipeline import EasyRef, Request
from easyref.records import sha256_file, write_json
from easyref.runtime import MANIFEST, EngineError, Engines
from easyref.seeds import numpy_rng
from export.verify import verify_quantized

CALIBRATED, COMPARED = 8, 8  # training groups whose drawings calibrate; others that are drawn to compare
STEPS, GUIDANCE, MAX_REFERENCES = 8, 3.0, 4
WORKER = Path(__file__).parent / "quantize_worker.py"
FIX = "python -m venv quantize; quantize/bin/pip install 'nvidia-modelopt[onnx]'; export EASYREF_MODELOPT=quantize/bin/python"


def modelopt() -> dict[str, str]:
    """The Python that has nvidia-modelopt, and the versions in it.

    Raises:
        EngineError: none is named, or it has none.
    """
    python = os.environ.get("EASYREF_MODELOPT")
    if not python:
        raise EngineError(f"--quantize needs nvidia-modelopt in an environment of its own: {FIX}")
    names = ("nvidia-modelopt", "onnx", "onnxruntime")
    ask = f"from importlib.metadata import version; print(*map(version, {names}))"
    try:
        done = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineError(f"EASYREF_MODELOPT={python}: no Python with nvidia-modelopt; {FIX}") from error
    return {"python": python, **dict(zip(names, done.stdout.split(), strict=True))}


def inputs_of(mode: str, dtype: str, decibels: float, data: Path) -> dict[str, Any]:
    """What a quantized UNet depends on besides its graph. One clear line for what is missing."""
    if dtype != "fp32":
        raise ValueError(f"--quantize {mode} starts from single precision; leave --dtype {dtype} out")
    versions = {name: version for name, version in modelopt().items() if name != "python"}
    groups = data / "split" / "groups.parquet"
    if not groups.exists():
        raise FileNotFoundError(f"{groups}: --quantize calibrates on training groups; `dvc pull split` fetches them")
    return {"mode": mode, "decibels": decibels, "groups": sha256_file(groups), "versions": versions}


def requests(images: TrainingImages, count: int) -> list[Request]:
    """The prompt of one image of a group, and others of it as references; always the same groups."""
    rng, made = numpy_rng("calibration"), list[Request]()
    for number in rng.choice(len(images.groups), count, replace=False):
        target, *others = rng.permutation(images.groups[number][1])
        references = [images.store.image(images.sha256s[item]) for item in others[:MAX_REFERENCES]]
        made.append(Request(caption(images.labels[target]), references, len(made)))
    return made


def calibration(checkpoint: Path, engines: Engines, asked: list[Request]) -> dict[str, np.ndarray]:
    """Inputs of the UNet's graph in every step, stacked by name, while the `engines` draw."""
    rows: list[dict[str, Tensor]] = []
    unet = engines.engines["unet"]

    def keep(**inputs: Tensor) -> Tensor:
        rows.append(inputs)
        return unet(**inputs)

    engines.engines = {**engines.engines, "unet": keep}
    easyref = EasyRef.from_pretrained(checkpoint, engines=engines)
    for request in asked:
        easyref([request], STEPS, GUIDANCE)
    return {name: np.stack([row[name].cpu().numpy() for row in rows]) for name in rows[0]}


def to_8_bits(samples: dict[str, np.ndarray], graph: Path, mode: str) -> str:
    """Put `graph` into 8 bits, in its place. The hash of the samples that calibrated it.

    Raises:
        EngineError: modelopt failed; its last line.
    """
    with TemporaryDirectory(dir=graph.parent.parent, prefix=f".{graph.stem}.") as scratch:
        file = Path(scratch) / "samples.npz"
        np.savez(file, allow_pickle=False, **samples)
        for path in graph.parent.glob(f"{graph.name}*"):  # its weights may lie beside it
            shutil.move(path, scratch)
        words = [modelopt()["python"], str(WORKER), f"{scratch}/{graph.name}", str(file), mode, str(graph)]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        if done.returncode:
            raise EngineError(f"{graph.name}: modelopt failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        return sha256_file(file)


def quantize(checkpoint: Path, folder: Path, about: dict[str, Any], data: Path) -> dict[str, Any]:
    """Put the UNet of `folder` into 8 bits and draw with it. `about`: the manifest of the graphs; returned is what it is then.

    Raises:
        VerifyError: its images are too far from torch's.
    """
    graph, how = folder / "unet.onnx", about["inputs"]["quantize"]
    asked = requests(TrainingImages(data), CALIBRATED + COMPARED)
    samples = calibration(checkpoint, Engines.onnxruntime(folder), asked[:CALIBRATED])
    before = _bytes(graph)
    digest = to_8_bits(samples, graph, how["mode"])
    about |= {"files": {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}}
    write_json(folder / MANIFEST, about)
    found = verify_quantized(checkpoint, folder, asked[CALIBRATED:], STEPS, GUIDANCE, how["decibels"])
    mean, after = sum(found) / len(found), _bytes(graph)
    sizes = f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB"
    print(f"unet in {how['mode']}: {sizes}; PSNR of images {mean:.1f} dB in the mean, {min(found):.1f} at least")
    made = {"samples": len(samples["timestep"]), "samples_sha256": digest, "bytes": [before, after], "psnr_db": found}
    return about | {"quantized": made}


def _bytes(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
