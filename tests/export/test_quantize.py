"""8 bits in the UNet: what calibrates it, what is missing in one line; with nvidia-modelopt (EASYREF_MODELOPT) the whole way."""

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from easyref.cli import app
from easyref.data.dataset import TrainingImages
from easyref.model.weights import CONFIG, WEIGHTS, read_config, save
from easyref.pipeline import EasyRef
from easyref.records import alone, read_json, read_table, sha256_file, write_json
from easyref.runtime import EngineError, Engines
from export.__main__ import WORK, fresh, inputs_of
from export.graphs import graphs
from export.quantize import CALIBRATED, COMPARED, GUIDANCE, STEPS, calibration, modelopt, requests, to_8_bits
from export.quantize import inputs_of as inputs_of_8_bits
from export.verify import VerifyError, verify_quantized

CHECKPOINT, DATA = Path("models/pretrain"), Path("data")


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["export", str(CHECKPOINT), str(tmp_path / "onnx"), "--quantize", "int8"]
    monkeypatch.delenv("EASYREF_MODELOPT", raising=False)
    with pytest.raises(EngineError, match="--quantize needs nvidia-modelopt in an environment of its own: python -m venv"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    for python in (sys.executable, str(tmp_path / "none")):  # this project's own environment has none
        monkeypatch.setenv("EASYREF_MODELOPT", python)
        with pytest.raises(EngineError, match=r"EASYREF_MODELOPT=.*: no Python with nvidia-modelopt; python -m venv") as error:
            CliRunner().invoke(app, words, catch_exceptions=False)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="--quantize fp8 starts from single precision; leave --dtype fp16 out"):
        inputs_of_8_bits("fp8", "fp16", 30.0, DATA)
    assert not (tmp_path / "onnx").exists()


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    with pytest.raises(ValueError, match="holds something else than graphs"):
        CliRunner().invoke(app, ["export", str(CHECKPOINT), str(tmp_path)], catch_exceptions=False)
    assert (tmp_path / "0.png").exists()


def test_two_exports_at_once_do_not_delete_each_others_graphs(tmp_path: Path) -> None:
    """What a killed one left beside the folder is deleted by the next: it must not be that of one at work."""
    with alone(WORK), pytest.raises(ValueError, match="another run is at work there"):
        CliRunner().invoke(app, ["export", str(CHECKPOINT), str(tmp_path / "onnx")], catch_exceptions=False)
    assert not (tmp_path / "onnx").exists()


def test_graphs_are_stale_with_another_version_of_what_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ONNX Runtime is the package onnxruntime-gpu; CLIP's layers in the text encoders' graphs are transformers'."""

    def installed(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("export.__main__.version", installed)
    versions = inputs_of(CHECKPOINT, 20, "fp32", 1e-4, 2.0)["versions"]
    assert versions["onnxruntime"] == onnxruntime.__version__ and versions["transformers"] == versions["torch"] == "1.0"


def test_a_model_of_the_hub_is_told_by_its_checkpoint(tmp_path: Path) -> None:
    """As the registry bundles it: base models are in both, or in neither."""
    for part in ("base", "pretrain"):
        shutil.copytree(CHECKPOINT.parent / part, tmp_path / part, copy_function=os.link)
    files = inputs_of(tmp_path / "pretrain", 20, "fp32", 1e-4, 2.0)["files"]
    assert any(name.startswith("base/") for name in files)
    config, named = read_config(CHECKPOINT), load_file(CHECKPOINT / WEIGHTS)
    save(tmp_path / "hub", named, config.model_copy(update={"base_id": "org/sdxl", "mllm_id": "org/qwen"}), torch.float16)
    assert inputs_of(tmp_path / "hub", 20, "fp32", 1e-4, 2.0)["files"].keys() == {f"hub/{CONFIG}", f"hub/{WEIGHTS}"}


def test_groups_that_calibrate_are_of_the_training_split_and_not_those_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    images, seen = TrainingImages(DATA), list[str]()
    read = images.store.image
    monkeypatch.setattr(images.store, "image", lambda sha256: (seen.append(sha256), read(sha256))[1])
    asked = requests(images, CALIBRATED + COMPARED)
    splits = dict(read_table(DATA / "split" / "images.parquet", ("sha256", "split")).iter_rows())
    assert {splits[sha256] for sha256 in seen} == {"train"} and all(request.prompt for request in asked)
    pictures = [tuple(image.tobytes() for image in request.references) for request in asked]
    assert len(set(pictures)) == len(asked) and all(pictures)
    again = requests(images, CALIBRATED + COMPARED)
    assert [tuple(image.tobytes() for image in request.references) for request in again] == pictures


@torch.no_grad()
def test_calibration_keeps_what_the_unet_sees() -> None:
    """With torch modules as engines: noise of the seed first, the scheduler's timesteps, keys and values of the references."""
    easyref = EasyRef.from_pretrained(CHECKPOINT, device="cpu")
    engines = Engines({graph.name: graph.module for graph in graphs(easyref)}, {"files": {}, "inputs": {"files": {}}}, "torch")
    asked = requests(TrainingImages(DATA), 2)
    rows = calibration(CHECKPOINT, engines, asked)
    assert {len(column) for column in rows.values()} == {2 * STEPS} and rows["timestep"].dtype == np.int64
    plain = EasyRef.from_pretrained(CHECKPOINT, device="cpu")
    plain.pipe.scheduler.set_timesteps(STEPS)
    assert rows["timestep"].tolist() == 2 * [int(t) for t in plain.pipe.scheduler.timesteps]
    for number, request in enumerate(asked):
        first = number * STEPS
        noise = torch.randn(rows["sample"][0][:1].shape, generator=torch.Generator().manual_seed(request.seed))
        scaled = plain.pipe.scheduler.scale_model_input(
            noise * plain.pipe.scheduler.init_noise_sigma, plain.pipe.scheduler.timesteps[0]
        )
        assert all(np.allclose(half, scaled[0], atol=1e-5) for half in rows["sample"][first])  # without and with the prompt
        kv = plain.encode([[], request.references], ["", request.prompt])[:, 0]
        assert np.allclose(rows["reference_kv"][first : first + STEPS], kv, atol=1e-4)


@pytest.mark.long
@pytest.mark.skipif("EASYREF_MODELOPT" not in os.environ, reason="no environment with nvidia-modelopt (EASYREF_MODELOPT)")
def test_the_unet_in_8_bits_draws_like_torch(tmp_path: Path) -> None:
    out, words = tmp_path / "onnx", ["export", str(CHECKPOINT), str(tmp_path / "onnx"), "--quantize", "int8"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0 and "unet in int8: 38." in done.output and " dB in the mean" in done.output
    manifest = read_json(out / "manifest.json")
    made, how = manifest["quantized"], manifest["inputs"]["quantize"]
    assert made["bytes"][1] < 0.4 * made["bytes"][0] and made["bytes"][1] == (out / "unet.onnx").stat().st_size
    assert np.mean(made["psnr_db"]) >= how["decibels"] == 30 and made["samples"] == CALIBRATED * STEPS
    weights = {
        tensor.name: tensor.data_type for tensor in onnx.load(out / "unet.onnx").graph.initializer if np.prod(tensor.dims) > 10_000
    }
    full = {name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT}
    assert all("time_emb" in name or "add_emb" in name or "conv_shortcut" in name for name in full)
    assert sum(kind == onnx.TensorProto.INT8 for kind in weights.values()) > 70

    assert CliRunner().invoke(app, words).output == f"{out}: up to date\n"
    same = inputs_of(CHECKPOINT, 20, "fp32", 1e-4, 2.0, how)
    assert fresh(out, same) and not fresh(out, inputs_of(CHECKPOINT, 20, "fp32", 1e-4, 2.0))
    assert (
        not fresh(out, same | {"quantize": how | {"mode": "fp8"}})
        and modelopt()["nvidia-modelopt"] == how["versions"]["nvidia-modelopt"]
    )

    asked = requests(TrainingImages(DATA), CALIBRATED + COMPARED)
    plain = tmp_path / "plain.onnx"
    easyref = EasyRef.from_pretrained(CHECKPOINT, device="cpu")
    from export.graphs import export_graph

    unet = next(graph for graph in graphs(easyref) if graph.name == "unet")
    export_graph(unet, plain, 20)
    samples = calibration(CHECKPOINT, Engines.onnxruntime(out), asked[:2])
    for mode, scale in (("fp8", 1.0), ("int8", 0.01)):  # ranges of what is a hundred times too small
        (tmp_path / mode).mkdir()
        folder = shutil.copytree(out, tmp_path / mode / "onnx")
        shutil.copy(plain, folder / "unet.onnx")
        given = {name: value * np.float32(scale) if value.dtype == np.float32 else value for name, value in samples.items()}
        to_8_bits(given, folder / "unet.onnx", mode)
        write_json(folder / "manifest.json", manifest | {"files": manifest["files"] | {"unet.onnx": sha256_file(folder / "unet.onnx")}})
        if mode == "fp8":
            assert len(verify_quantized(CHECKPOINT, folder, asked[-2:], STEPS, GUIDANCE, 20)) == 2
        else:
            with pytest.raises(VerifyError, match=r"images of the quantized UNet: PSNR .* dB to torch's in the mean; wanted 30 dB"):
                verify_quantized(CHECKPOINT, folder, asked[-2:], STEPS, GUIDANCE, 30)
