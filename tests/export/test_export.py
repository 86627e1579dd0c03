"""ONNX graphs of the shipped weights against torch; what is stale, wrong or falls back is found."""

from pathlib import Path

import onnx
import pytest
import torch

from easyref.pipeline import EasyRef
from export.__main__ import fresh, inputs_of, run
from export.graphs import Graph, graphs
from export.verify import VerifyError, cases, session, verify

pytestmark = pytest.mark.long
torch.set_num_threads(1)
CHECKPOINT = Path("models/pretrain")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "onnx"
    run(CHECKPOINT, out, 20, 1e-4)
    return out


@pytest.fixture(scope="module")
def made() -> dict[str, Graph]:
    return {graph.name: graph for graph in graphs(EasyRef.from_pretrained(CHECKPOINT))}


def test_graphs_equal_torch_and_carry_no_paths(out: Path, made: dict[str, Graph]) -> None:
    for name, graph in made.items():
        found = verify(graph, out / f"{name}.onnx", 1e-4)
        assert len({d.case for d in found}) == len(list(cases(graph))) >= 3
        assert str(Path.cwd()).encode() not in (out / f"{name}.onnx").read_bytes()
        model = onnx.load(out / f"{name}.onnx")
        assert [i.name for i in model.graph.input] == list(graph.inputs)


def test_other_weights_are_found_out_by_name_and_size(out: Path, made: dict[str, Graph]) -> None:
    weight = made["unet"].module.unet.conv_out.weight
    with torch.no_grad():
        weight.mul_(1.01)
        with pytest.raises(VerifyError, match=r"unet: noise differs by .* at batch 1, 8x8, timestep 0; allowed 1e-04"):
            verify(made["unet"], out / "unet.onnx", 1e-4)
        weight.div_(1.01)


def test_a_provider_that_is_not_there_is_an_error(out: Path) -> None:
    with pytest.raises(VerifyError, match=r"asked for CUDAExecutionProvider, ONNX Runtime took CPUExecutionProvider"):
        session(out / "reference_kv.onnx", "CUDAExecutionProvider")


def test_stale_or_torn_graphs_are_not_reused(out: Path, capsys: pytest.CaptureFixture) -> None:
    inputs = inputs_of(CHECKPOINT, 20, 1e-4)
    run(CHECKPOINT, out, 20, 1e-4)
    assert "up to date" in capsys.readouterr().out
    assert not fresh(out, inputs_of(CHECKPOINT, 21, 1e-4))
    assert not fresh(out, inputs | {"files": {}})
    path = out / "vae_decoder.onnx"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert not fresh(out, inputs)
    path.write_bytes(data)
    assert fresh(out, inputs)
