"""The registry on a real MLflow with SQLite: gate, rollback, pulls, graphs, lineage, the model as MLflow runs it."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, RESOURCE_DOES_NOT_EXIST
from PIL import Image

from easyref import registry, tracking
from easyref.config import Release
from easyref.data.shards import ImageStore
from easyref.pipeline import EasyRef, Request
from easyref.records import read_json, sha256_file, write_json
from easyref.registry import RegistryError

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def evaluation(fidelity: float) -> dict:
    return {"held_out": {"fidelity": {"right": fidelity, "shuffled": 0.0, "none": 0.0}}, "held_in": {"fidelity": {"right": fidelity}}}


def set_fidelity(project: Path, fidelity: float) -> None:
    write_json(project / "metrics" / "evaluate.json", evaluation(fidelity))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with the shipped weights as its finetuned model, and a registry of its own with one version, the champion."""
    project = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, project)
    (project / "models").mkdir()
    (project / "models" / "base").symlink_to(ROOT / "models" / "base")
    (project / "models" / "finetune_multi").symlink_to(ROOT / "models" / "pretrain")
    (project / "data").symlink_to(ROOT / "data")
    (project / "reports").mkdir()
    (project / "reports" / "evaluation.html").write_text("report")
    Image.new("RGB", (8, 8)).save(project / "reports" / "grid.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        set_fidelity(project, 0.10)
        assert registry.gate(project, registry.register(project)).alias == "champion"
        yield project


@pytest.fixture
def release(project: Path):
    """Register the model as if it had been evaluated so, and compare."""

    def run(fidelity: float) -> registry.Registered:
        set_fidelity(project, fidelity)
        return registry.gate(project, registry.register(project))

    return run


def champion(project: Path) -> str | None:
    return registry.alias_version(tracking.connect(project), "champion")


def test_worse_is_challenger_better_is_champion_and_rollback_goes_back(project: Path, release) -> None:
    worse = release(0.05)
    assert (worse.version, worse.alias) == ("2", "challenger") and "under release.min_gain" in worse.reason
    assert champion(project) == "1"
    better = release(0.20)
    assert (better.version, better.alias) == ("3", "champion") and "+0.1000 over the champion" in better.reason
    assert registry.rollback(project) == ("3", "1") and champion(project) == "1"
    with pytest.raises(RegistryError, match="version 1 replaced no other"):
        registry.rollback(project)
    registry.promote(project, "2")
    assert champion(project) == "2" and registry.alias_version(tracking.connect(project), "challenger") is None
    registry.promote(project, "1")
    with pytest.raises(RegistryError, match=r"no version 9; there are: 1, 2, 3"):
        registry.promote(project, "9")


def test_figures_of_other_weights_are_not_registered(project: Path) -> None:
    """After a training by hand."""
    write_json(project / "metrics" / "evaluate.json", evaluation(0.2) | {"settings": {"checkpoint": "of an earlier one"}})
    with pytest.raises(ValueError, match=r"evaluate.json is of other weights than models/finetune_multi; run `easyref evaluate`"):
        registry.register(project)


def test_figures_of_other_samples_are_not_compared(project: Path, release) -> None:
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(re.sub(r"held_out_samples: \d+", "held_out_samples: 7", text))
    try:
        other = release(0.9)
    finally:
        (project / "params.yaml").write_text(text)
    assert other.alias == "challenger" and "evaluated on other samples" in other.reason


@pytest.mark.parametrize(("fidelity", "good"), [(-0.1, False), (0.0, True)])
def test_the_first_must_reach_the_least_fidelity(fidelity: float, good: bool) -> None:
    assert registry.decide(evaluation(fidelity), None, False, Release(min_fidelity=0.0, min_gain=0.0))[0] == good


def test_pull_gives_the_checked_model(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert registry.pull(project, "models:/easyref@champion", folder) == "1"
    for name in ("config.json", "easyref.safetensors"):
        assert (folder / "checkpoint" / name).read_bytes() == (ROOT / "models" / "pretrain" / name).read_bytes()
    weights = folder / "base" / "diffusion" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: its hash is not the one in manifest\.json"):
        registry.check_bundle(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"missing; pull the model again"):
        registry.check_bundle(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.odt").write_text("years of work")
    with pytest.raises(ValueError, match="mine: holds something else than a pulled model, and would be replaced"):
        registry.pull(project, "models:/easyref@champion", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.odt").exists()
    for uri in ("models:/other@champion", "easyref", "models:/easyref"):
        with pytest.raises(RegistryError, match="not an address of the registry"):
            registry.pull(project, uri, folder)
    with pytest.raises(RegistryError, match="no version has the alias best"):
        registry.pull(project, "models:/easyref@best", folder)


def graphs_of(checkpoint: Path, folder: Path) -> Path:
    """A folder as `python -m export` leaves it, with a graph of a few bytes."""
    from export.__main__ import inputs_of

    folder.mkdir()
    (folder / "unet.onnx").write_bytes(b"graph")
    inputs = inputs_of(checkpoint, 20, "fp32", 1e-4, 2.0)
    write_json(folder / "manifest.json", {"inputs": inputs, "files": {"unet.onnx": sha256_file(folder / "unet.onnx")}})
    return folder


def test_graphs_are_attached_to_their_version_and_pulled_with_it(project: Path, tmp_path: Path) -> None:
    version = champion(project)
    assert version
    graphs = graphs_of(project / "models" / "finetune_multi", tmp_path / "graphs")
    assert "onnx      none attached" in registry.trace(project, "models:/easyref@champion")
    kept = registry.cached(project, "models:/easyref@champion")
    assert not (kept / "onnx").exists() and registry.cached(project, f"models:/easyref/{version}") == kept
    registry.attach(project, version, graphs)
    registry.attach(project, version, graphs)
    assert registry.cached(project, "models:/easyref@champion") == kept and (kept / "onnx" / "unet.onnx").read_bytes() == b"graph"
    (kept / "checkpoint" / "easyref.safetensors").write_bytes(b"torn")
    registry.check_bundle(registry.cached(project, "models:/easyref@champion"))
    inode = kept.stat().st_ino
    assert registry.cached(project, "models:/easyref@champion").stat().st_ino == inode, "fetched once"
    registry.pull(project, "models:/easyref@champion", tmp_path / "model")
    assert (tmp_path / "model" / "onnx" / "unet.onnx").read_bytes() == b"graph"
    registry.check_bundle(tmp_path / "model")
    assert f"onnx      sha256 {sha256_file(graphs / 'manifest.json')[:16]}" in registry.trace(project, "models:/easyref@champion")
    (tmp_path / "model" / "onnx" / "unet.onnx").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"unet\.onnx: missing or not the one in manifest\.json"):
        registry.check_bundle(tmp_path / "model")

    manifest = read_json(graphs / "manifest.json")
    manifest["inputs"]["files"]["finetune_multi/easyref.safetensors"] = "0" * 64
    write_json(graphs / "manifest.json", manifest)
    with pytest.raises(ValueError, match="exported from another checkpoint than version 1"):
        registry.attach(project, version, graphs)
    (graphs / "unet.onnx").unlink()
    with pytest.raises(ValueError, match=r"unet\.onnx: missing"):
        registry.attach(project, version, graphs)


def test_a_server_that_cannot_answer_has_not_said_that_there_is_no_champion() -> None:
    class Client:
        def get_model_version_by_alias(self, *_: str) -> None:
            raise MlflowException("down", error_code=code)

    code = INTERNAL_ERROR
    with pytest.raises(MlflowException):
        registry.alias_version(Client(), "champion")
    code = RESOURCE_DOES_NOT_EXIST
    assert registry.alias_version(Client(), "champion") is None


def test_the_report_of_a_release_is_of_its_weights(tmp_path: Path) -> None:
    def written(name: str, weights: str) -> dict:
        write_json(tmp_path / "metrics" / name, {"settings": {"weights": weights}})
        return read_json(tmp_path / "metrics" / name)

    page = tmp_path / "reports" / "evaluation.html"
    page.parent.mkdir()
    page.touch()
    result = written("evaluate.json", "new")
    assert registry.report_of(tmp_path, result) is None, "`make run` has none"
    written("mrbench.json", "old")
    assert registry.report_of(tmp_path, result) is None
    written("mrbench.json", "new")
    assert registry.report_of(tmp_path, result) == page
    page.unlink()
    assert registry.report_of(tmp_path, result) is None


def test_mlflow_runs_the_model(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same image as the pipeline's, from a reference in base64; what is wrong is said in one line."""
    import mlflow

    store = ImageStore(ROOT / "data" / "images")
    reference = store.image(next(iter(store.rows)))
    buffer = io.BytesIO()
    reference.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    tracking.connect(project)
    model = mlflow.pyfunc.load_model("models:/easyref@champion")
    request = {"references": [encoded], "prompt": "farmer", "seed": 3, "steps": 2}
    (made,) = model.predict([request])
    image = Image.open(io.BytesIO(base64.b64decode(made.image)))
    easyref = EasyRef.from_pretrained(ROOT / "models" / "pretrain")
    (expected,) = easyref([Request("farmer", [reference], 3)], 2, 3.0, 1.0)
    assert np.array_equal(np.asarray(image), np.asarray(expected)) and made.seed == 3

    asked = [[request | {"prompt": word, "references": references}] for word, references in (("cat", []), ("farmer", [encoded]))] * 2
    alone = [model.predict(one)[0].image for one in asked]
    with ThreadPoolExecutor(4) as pool:  # as MLflow's server calls it
        assert [found[0].image for found in pool.map(model.predict, asked)] == alone

    with pytest.raises(Exception, match="guidance_scale"):
        model.predict([request | {"guidance_scale": 9.0}])
    for changes, message in (
        ({"steps": 0}, "steps 0: out of 1 to 200"),
        ({"references": ["/etc/passwd"]}, r"references\[0\]: not base64 of an image file"),
        ({"references": ["aGVsbG8="]}, r"references\[0\]: not an image"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict([request | changes])
    reference.save(tmp_path / "a.png")
    monkeypatch.setenv("EASYREF_REFERENCES", str(tmp_path))
    assert model.predict([request | {"references": ["a.png"]}])[0].image == made.image
    for there in ("etc/passwd", "etc/none"):
        with pytest.raises(ValueError, match=r"references\[0\]: not base64 of an image file; paths are taken only below"):
            model.predict([request | {"references": [f"../{tmp_path.name}/../../../../../../../{there}"]}])


def test_trace_reaches_the_shards_and_licences(project: Path) -> None:
    text = registry.trace(project, "models:/easyref/1")
    lock = (ROOT / "dvc.lock").read_text()
    for md5 in re.findall(r"data/split ([0-9a-f]{8})", text):
        assert md5 in lock
    for line in (
        r"version   easyref 1",
        r"stage     pretrain: .*data/split",
        r"shard     images-00000\.tar: \d+ images",
        r"licence   .*: \d+ images",
    ):
        assert re.search(line, text), line


def test_links_have_no_password(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect(project)
    monkeypatch.setattr(registry, "connect", lambda _: client)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@mlflow.example/base/")
    links = registry.links(project, "1")
    assert len(links) == 3 and all(link.startswith("https://mlflow.example/base/") for link in links.values())


def test_manifest_lists_every_file(project: Path, tmp_path: Path) -> None:
    registry.make_bundle(project, tmp_path)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert set(read_json(tmp_path / "manifest.json")) == names - {"manifest.json"}
    (tmp_path / "more.py").write_text("")
    with pytest.raises(ValueError, match="more.py: not in the manifest"):
        registry.check_bundle(tmp_path)
