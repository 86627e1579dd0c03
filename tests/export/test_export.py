"""ONNX graphs of the shipped weights against torch; what is stale, wrong or falls back is found."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from easyref.cli import app
from easyref.config import load_params
from easyref.pipeline import EasyRef
from easyref.records import read_json
from easyref.runtime import NAMES, Engine, EngineError, Engines, check_graphs
from easyref.trt import Sizes, profile, ranges
from export import graphs as making
from export.__main__ import fresh, inputs_of, run
from export.bench import export_part, load_graph
from export.graphs import Graph, export_graph, graphs
from export.verify import VerifyError, cases, several, verify, verify_images

pytestmark = pytest.mark.long
torch.set_num_threads(1)
CHECKPOINT = Path("models/pretrain")
HOW: tuple = (20, "fp32", 1e-4, 2.0)  # opset, precision, tolerance of an output, of an image


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "onnx"
    run(CHECKPOINT, out, *HOW)
    return out


@pytest.fixture(scope="module")
def made() -> dict[str, Graph]:
    return {graph.name: graph for graph in graphs(EasyRef.from_pretrained(CHECKPOINT))}


def test_graphs_equal_torch_and_carry_no_paths(out: Path, made: dict[str, Graph]) -> None:
    for name, graph in made.items():
        found = verify(graph, Engine(out / f"{name}.onnx"), 1e-4)
        assert len({d.case for d in found}) == len(list(cases(graph))) >= 3
        assert name not in ("vision", "prefix", "aggregator") or "24 references" in {d.case for d in found}
        assert str(Path.cwd()).encode() not in (out / f"{name}.onnx").read_bytes()
        model = onnx.load(out / f"{name}.onnx")
        assert [i.name for i in model.graph.input] == list(graph.inputs)


def test_other_weights_are_found_out_by_name_and_size(out: Path, made: dict[str, Graph]) -> None:
    weight = made["unet"].module.unet.conv_out.weight
    with torch.no_grad():
        weight.mul_(1.01)
        with pytest.raises(VerifyError, match=r"unet: noise differs by .* at batch 1, 8x8, timestep 0; allowed 1e-04"):
            verify(made["unet"], Engine(out / "unet.onnx"), 1e-4)
        weight.div_(1.01)


def test_a_provider_that_is_not_there_is_an_error(out: Path) -> None:
    with pytest.raises(EngineError, match=r"asked for CUDAExecutionProvider, ONNX Runtime took CPUExecutionProvider"):
        Engine(out / "reference_kv.onnx", "CUDAExecutionProvider")
    with pytest.raises(EngineError, match=r"provider 'npu': not one of cpu, cuda, tensorrt"):
        Engines.onnxruntime(out, "npu")


def test_stale_or_torn_graphs_are_not_reused(out: Path, capsys: pytest.CaptureFixture) -> None:
    inputs = inputs_of(CHECKPOINT, *HOW)
    assert CliRunner().invoke(app, ["export", str(CHECKPOINT), str(out)]).output == f"{out}: up to date\n"
    run(CHECKPOINT, out, *HOW)
    assert "up to date" in capsys.readouterr().out
    assert not fresh(out, inputs_of(CHECKPOINT, 21, *HOW[1:]))
    assert not fresh(out, inputs | {"files": {}})
    path = out / "vae_decoder.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert not fresh(out, inputs)
    path.write_bytes(data)
    assert fresh(out, inputs)


def test_generate_draws_with_the_graphs(out: Path, tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (70, 50), colour).save(tmp_path / f"{name}.png")
    words = ["generate", "--model", str(CHECKPOINT), "--prompt", "farmer", "--steps", "3", "--weight", "2", "--weight", "0.5"]
    words += [part for name in ("a", "b") for part in ("--ref", str(tmp_path / f"{name}.png"))]
    for backend in ("torch", "onnxruntime"):
        done = CliRunner().invoke(app, [*words, "--backend", backend, "--graphs", str(out), "--out", str(tmp_path / backend)])
        assert done.exit_code == 0, done.output
    ours, theirs = (np.asarray(Image.open(tmp_path / b / "0.png"), np.float64) for b in ("torch", "onnxruntime"))
    assert ours.std() > 5 and np.abs(ours - theirs).max() <= 2


def test_other_images_are_found_out(out: Path) -> None:
    easyref = EasyRef.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        easyref.encoder.reference_tokens.mul_(3)
    with pytest.raises(VerifyError, match=r"images of \d references at scale 0.5: \d+ of 255 off; allowed 2"):
        verify_images(easyref, CHECKPOINT, out, 2)


def test_graphs_that_are_not_whole_are_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no graphs; make them with"):
        Engines.onnxruntime(tmp_path)
    torn = tmp_path / "torn"
    shutil.copytree(out, torn)
    (torn / "vision.onnx").write_bytes((torn / "vision.onnx").read_bytes()[:-1])
    with pytest.raises(EngineError, match="vision.onnx: missing or not what was written"):
        Engines.onnxruntime(torn)


def test_graphs_of_another_checkpoint_are_refused(out: Path, tmp_path: Path) -> None:
    """They have all the weights: what the checkpoint says would not be drawn."""
    other = tmp_path / "pretrain"
    shutil.copytree(CHECKPOINT, other)
    with open(other / "easyref.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"0000")
    with pytest.raises(EngineError, match=r"easyref.safetensors: not what the graphs were made of; `easyref export .*pretrain`"):
        EasyRef.from_pretrained(other, base="models", engines=Engines.onnxruntime(out))


def test_with_graphs_no_weights_are_loaded(out: Path) -> None:
    easyref = EasyRef.from_pretrained(CHECKPOINT, engines=Engines.onnxruntime(out))
    pipe = easyref.pipe
    modules = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, easyref.encoder.mllm)
    assert {p.device.type for module in modules for p in module.parameters()} == {"meta"}


def test_large_weights_lie_beside_the_graph(made: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "EXTERNAL", 0)
    graph = made["reference_kv"]
    (tmp_path / "a").mkdir()
    export_graph(graph, tmp_path / "a" / "reference_kv.onnx", 20)
    weights = sum(p.nbytes for name, p in graph.module.named_parameters() if "_ip" in name)
    (tmp_path / "a").rename(tmp_path / "b")  # the graph names its file, no place
    files = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
    assert files.keys() == {"reference_kv.onnx", "reference_kv.onnx.data"}
    assert files["reference_kv.onnx.data"] >= weights > 10 * files["reference_kv.onnx"]
    verify(graph, Engine(tmp_path / "b" / "reference_kv.onnx"), 1e-4)


def test_bench_export_makes_models_of_shapes_alone(tmp_path: Path) -> None:
    """The smallest part of the nano preset, as `easyref bench export` measures it."""
    found = export_part(load_params("presets/nano.yaml"), Path("models/base"), "vae_decoder", tmp_path / "graphs", 20)
    ((name, row, inputs, expected),) = found["graphs"]
    path = tmp_path / "graphs" / f"{name}.onnx"
    assert row["files_gib"][path.name] > 0 and found["parameters"] > 100_000 and expected.std() > 0
    assert load_graph(path, inputs, expected)["difference"] < 0.01
    with pytest.raises(RuntimeError, match=r"vae_decoder.onnx: .* off torch's; these graphs are not right"):
        load_graph(path, inputs, 1.2 * expected)


def test_trt_commands_run_on_the_cpu(out: Path, tmp_path: Path) -> None:
    """The same commands without a GPU: what would be built, and ONNX Runtime in the place of the engines."""
    words = ["trt", "build", "--dry-run", "--onnx-dir", str(out), "--size", "64:64:128", "--text", "24", "--references", "1:2:8"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.output.count(".plan, key") == len(NAMES) and "  sample: 1x8x8x8, 2x8x8x8, 8x8x16x16\n" in done.output
    done = CliRunner().invoke(app, ["trt", "verify", str(CHECKPOINT), "--onnx-dir", str(out), "--provider", "cpu", "--rtol", "1e-4"])
    assert done.exit_code == 0 and done.output.count(" cases, at most ") == len(NAMES), done.output
    Image.new("RGB", (70, 50), "red").save(tmp_path / "a.png")
    words = ["trt", "run", "--ref", str(tmp_path / "a.png"), "--model", str(CHECKPOINT), "--provider", "cpu", "--onnx-dir", str(out)]
    done = CliRunner().invoke(app, [*words, "--denoising-steps", "2", "--output-dir", str(tmp_path / "out")])
    assert done.exit_code == 0 and Image.open(tmp_path / "out" / "0.png").size == (64, 64), done.output


def test_profiles_hold_for_the_graphs(out: Path) -> None:
    """Inputs of the least, usual and largest shapes run."""
    sizes = Sizes(batch=(1, 1, 2), size=(64, 64, 128), references=(1, 2, 3), text=(8, 24, 24))
    shapes = check_graphs(out)["shapes"]
    rng = np.random.default_rng(0)
    for name, engine in Engines.onnxruntime(out).engines.items():
        found = profile(out / f"{name}.onnx", ranges(name, sizes, shapes))
        kinds = {value.name: value.type.tensor_type.elem_type for value in onnx.load(out / f"{name}.onnx").graph.input}
        for which in range(3):
            inputs = {}
            for value, of in found.items():
                kind = onnx.helper.tensor_dtype_to_np_dtype(kinds[value])
                drawn = rng.standard_normal(of[which]) if kind.kind == "f" else np.full(of[which], kind.kind == "b")
                inputs[value] = torch.from_numpy(np.asarray(drawn).astype(kind))
            assert all(torch.isfinite(output).all() for output in several(engine(**inputs))), (name, which)


def test_half_precision_is_as_good_as_it_can_be(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(CHECKPOINT, tmp_path / "half", 20, "fp16")
    assert "images: at most " in capsys.readouterr().out
    for name in NAMES:
        tensors = onnx.load(tmp_path / "half" / f"{name}.onnx").graph.initializer
        kinds = {tensor.data_type for tensor in tensors if np.prod(tensor.dims) > 4096}  # smaller ones: frequencies of sinusoids
        assert kinds == {onnx.TensorProto.FLOAT16}, name


def test_the_proof_of_a_machine_goes_the_same_way_on_the_cpu(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "onnx")
    words = [sys.executable, "-m", "export.prove", str(CHECKPOINT), str(tmp_path), "--provider", "cpu", "--rounds", "1"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "proof.json")
    assert f"{tmp_path / 'onnx'}: up to date" in done.stdout and set(found["image_ms_of_8_steps"]) == {"torch", "engines"}
    worst = found["largest_difference"]
    assert set(worst) == set(NAMES) and max(worst.values()) < 1e-4 and found["image_difference"] <= 2
