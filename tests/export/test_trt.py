"""TensorRT without a GPU: every name the code uses is one of TensorRT's, and all that does not need an engine is real."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from typer.testing import CliRunner

from easyref import trt as ours
from easyref.cli import app
from easyref.records import sha256_file, write_json
from easyref.runtime import NAMES, EngineError
from easyref.trt import Options, Sizes, Step, build, check_shape, engines, graph_digest, key, parse_range, profile, ranges, refit
from export.graphs import Graph
from export.verify import VerifyError, verify

API = json.loads((Path(__file__).parent / "tensorrt-11.4-api.json").read_text())
#: What the variables of trt.py hold.
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig", "engine": "ICudaEngine",
    "context": "IExecutionContext", "chosen": "IOptimizationProfile", "refitter": "Refitter", "reader": "OnnxParserRefitter",
    "inspector": "EngineInspector", "wrong": "ParserError",
}  # fmt: skip
SHAPES = {"layers": 8, "vae_factor": 8, "merged": [60, 145, 290], "around": 120}


def test_every_name_of_tensorrt_is_in_its_api() -> None:
    used = set()
    for node in ast.walk(ast.parse(Path(ours.__file__).read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == "trt" and node.attr != "__version__":
            used.add(node.attr)
            assert node.attr in API, f"line {node.lineno}: trt.{node.attr}"
        elif isinstance(node.value, ast.Name) and node.value.id in CLASSES:
            used.add(node.attr)
            assert node.attr in API[CLASSES[node.value.id]], f"line {node.lineno}: {node.value.id}.{node.attr}"
        elif isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute) and node.value.func.attr in API:
            used.add(node.attr)
            assert node.attr in API[node.value.func.attr], f"line {node.lineno}: {node.value.func.attr}.{node.attr}"
        elif isinstance(node.value, ast.Attribute) and node.value.attr in API:
            used.add(node.attr)
            assert node.attr in API[node.value.attr], f"line {node.lineno}: {node.value.attr}.{node.attr}"
        elif isinstance(node.value, ast.Attribute) and node.value.attr in CLASSES:  # self.engine.…
            used.add(node.attr)
            assert node.attr in API[CLASSES[node.value.attr]], f"line {node.lineno}: {node.value.attr}.{node.attr}"
    assert len(used) > 35


@pytest.mark.parametrize("text", ["", "0", "1:2", "3:2:4", "1:4:2", "a", "1:2:3:4", "-1", "1.5"])
def test_a_range_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="--batch"):
        parse_range(text, "batch")
    assert parse_range("4", "batch") == (4, 4, 4) and parse_range("1:2:4", "batch") == (1, 2, 4)


def graph(path: Path) -> Path:
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["b", 4, "h", "w"])
    patches = helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["b", "4*m"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", 4, "h", "w"])
    made = helper.make_graph([helper.make_node("Identity", ["sample"], ["out"])], "g", [sample, patches], [out])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_profiles_fill_in_the_named_axes(tmp_path: Path) -> None:
    path = graph(tmp_path / "g.onnx")
    found = profile(path, {"b": (1, 2, 8), "h": (64, 128, 170), "w": (64, 128, 170), "m": (60, 145, 290)})
    assert found == {"sample": ((1, 4, 64, 64), (2, 4, 128, 128), (8, 4, 170, 170)), "patches": ((1, 240), (2, 580), (8, 1160))}
    with pytest.raises(EngineError, match="input patches has an axis '4\\*m' that no option sets"):
        profile(path, {"b": (1, 2, 8), "h": (1, 1, 1), "w": (1, 1, 1)})
    assert ranges("unet", Sizes(batch=(1, 2, 4)), SHAPES) == {
        "b": (1, 4, 8), "h": (64, 128, 170), "w": (64, 128, 170), "l": (77, 77, 154)
    }  # fmt: skip
    context = ranges("prefix", Sizes(references=(1, 4, 28)), SHAPES)["l"]
    assert context[0] <= 60 + 20 and context[2] >= 28 * 290 + 28 * 2 + 154
    with pytest.raises(ValueError, match="--size 100: not a multiple of 8"):
        ranges("unet", Sizes(size=(96, 100, 104)), SHAPES)


def test_a_key_is_of_everything(tmp_path: Path) -> None:
    shapes = profile(graph(tmp_path / "g.onnx"), dict.fromkeys("bhwm", (1, 2, 3)))
    other = profile(tmp_path / "g.onnx", dict.fromkeys("bhwm", (1, 2, 4)))
    keys = {
        key("a", shapes, Options(), "11.4", "H100"), key("b", shapes, Options(), "11.4", "H100"),
        key("a", other, Options(), "11.4", "H100"), key("a", shapes, Options(refit=True), "11.4", "H100"),
        key("a", shapes, Options(), "11.5", "H100"), key("a", shapes, Options(), "11.4", "H200"),
    }  # fmt: skip
    assert len(keys) == 6


def test_a_shape_outside_the_profile_names_the_bounds() -> None:
    check_shape("sample", (2, 4), (1, 4), (8, 4), "unet.plan")
    for shape in ((9, 4), (2, 4, 1), (2, 5)):
        with pytest.raises(EngineError, match=r"unet.plan: input sample of shape \[.*\] is outside \[1, 4\] … \[8, 4\]"):
            check_shape("sample", shape, (1, 4), (8, 4), "unet.plan")


@pytest.mark.skipif(ours.driver() is None, reason="a GPU is here")
def test_without_a_gpu_everything_says_what_is_missing(tmp_path: Path) -> None:
    for words in (["trt", "build"], ["trt", "inspect", str(graph(tmp_path / "g.onnx"))], ["trt", "run", "--ref", "README.md"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code and isinstance(done.exception, (ValueError, RuntimeError))
        assert len(str(done.exception).splitlines()) == 1
    done = CliRunner().invoke(app, ["trt", "doctor"])
    assert done.exit_code == 1 and "pip install tensorrt-cu13" in done.output and "no NVIDIA driver" in done.output


# -- a stand-in with TensorRT's names, and no others, for the order of the calls ------------------------------------------


class Named:
    """An object of a TensorRT class: only its names, and what `given` says they are."""

    def __init__(self, cls: str, calls: list, **given: Any) -> None:
        self.__dict__.update(_cls=cls, _calls=calls, _given=given)

    def __getattr__(self, name: str) -> Any:
        assert name in API[self._cls], f"{self._cls} has no {name}"
        if name in self._given:
            value = self._given[name]
            return (lambda *a: (self._calls.append((name, *a)), value(*a))[1]) if callable(value) else value
        return lambda *a: self._calls.append((name, *a))

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in API[self._cls], f"{self._cls} has no {name}"
        self._calls.append((name, value))


ENUMS = ("NetworkDefinitionCreationFlag", "ProfilingVerbosity", "MemoryPoolType", "BuilderFlag")


def stand_in(
    calls: list, version: str, parses: bool = True, plan: bytes | None = b"plan", taken: tuple = (b"", b"old"), reads: bool = True
) -> Any:
    """`taken`: what a timing cache may be made of; `reads`: whether a plan is one."""
    enum = lambda cls: SimpleNamespace(**{n: i for i, n in enumerate(API[cls]) if n.isupper() or "_" in n})  # noqa: E731
    wrong = Named("ParserError", calls, node_name=lambda: "n7", node_operator=lambda: "Foo", desc=lambda: "no Foo")
    caches = {data: Named("ITimingCache", calls, serialize=lambda data=data: data + b"new") for data in (b"", b"old")}
    used: list = [None]

    def use(cache: Named, ignore_mismatch: bool) -> bool:
        used[:] = [cache if cache in [caches[data] for data in taken] else None]
        return used[0] is not None

    config = Named("IBuilderConfig", calls, create_timing_cache=caches.get, set_timing_cache=use, get_timing_cache=lambda: used[0])
    builder = Named(
        "Builder", calls, create_network=lambda flags: Named("INetworkDefinition", calls), create_builder_config=lambda: config,
        create_optimization_profile=lambda: Named("IOptimizationProfile", calls), build_serialized_network=lambda n, c: plan,
    )  # fmt: skip
    engine = Named("ICudaEngine", calls, refittable=True, serialize=lambda: b"refitted")
    logger = lambda severity: Named("Logger", calls)  # noqa: E731
    logger.WARNING = 1  # type: ignore[attr-defined]
    return SimpleNamespace(
        __version__=version, Logger=logger, Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: Named("OnnxParser", calls, parse_from_file=lambda p: parses, get_error=lambda i: wrong),
        Runtime=lambda logger: Named("Runtime", calls, deserialize_cuda_engine=lambda data: engine if reads else None),
        Refitter=lambda engine, logger: Named("Refitter", calls, get_missing_weights=lambda: [], refit_cuda_engine=lambda: True),
        OnnxParserRefitter=lambda refitter, logger: Named("OnnxParserRefitter", calls, refit_from_file=lambda p: True),
        **{name: enum(name) for name in ENUMS},
    )  # fmt: skip


def step(tmp_path: Path) -> Step:
    path = graph(tmp_path / "g.onnx")
    return Step("g", path, tmp_path / "g.plan", profile(path, dict.fromkeys("bhwm", (1, 2, 3))), "d", "k", False)


@pytest.mark.parametrize("version", ["10.16.1", "11.4.0"])
def test_build_asks_for_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    calls: list = []
    monkeypatch.setattr(ours, "load", lambda: stand_in(calls, version))
    monkeypatch.setattr(ours, "device", lambda: "H100 (SM 9.0)")
    (tmp_path / "cache").write_bytes(b"old")
    build(step(tmp_path), Options(optimization_level=4, workspace_mib=2, refit=True), tmp_path / "cache")
    strongly_typed = 1 << API["NetworkDefinitionCreationFlag"].index("STRONGLY_TYPED")
    assert ("create_network", strongly_typed if version < "11" else 0) in calls
    assert ("builder_optimization_level", 4) in calls and ("create_timing_cache", b"old") in calls
    assert ("set_memory_pool_limit", API["MemoryPoolType"].index("WORKSPACE"), 2 * 2**20) in calls
    assert [c for c in calls if c[0] == "set_flag"] == [("set_flag", API["BuilderFlag"].index("REFIT"))]
    assert ("set_shape", "sample", (1, 4, 1, 1), (2, 4, 2, 2), (3, 4, 3, 3)) in calls
    order = [c[0] for c in calls]
    assert order.index("set_shape") < order.index("add_optimization_profile") < order.index("build_serialized_network")
    assert (tmp_path / "g.plan").read_bytes() == b"plan" and (tmp_path / "cache").read_bytes() == b"oldnew"
    about = json.loads((tmp_path / "g.json").read_text())
    assert (about["key"], about["graph"], about["gpu"]) == ("k", "d", "H100 (SM 9.0)")
    files = {"g.onnx": sha256_file(tmp_path / "g.onnx"), **{f"{name}.onnx": sha256_file(tmp_path / "g.onnx") for name in NAMES}}
    for name in NAMES:
        shutil.copy(tmp_path / "g.onnx", tmp_path / f"{name}.onnx")
    write_json(tmp_path / "manifest.json", {"files": files, "shapes": SHAPES})
    refit(tmp_path / "g.plan", tmp_path / "g.onnx")
    assert (tmp_path / "g.plan").read_bytes() == b"refitted"
    after = json.loads((tmp_path / "g.json").read_text())
    assert after["key"] != "k" and after["graph"] == graph_digest({"files": files}, "g") != "d"


def test_engines_of_other_graphs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "load", lambda: stand_in([], "11.4.0"))
    monkeypatch.setattr(ours, "device", lambda: "H100 (SM 9.0)")
    made: list[str] = []
    monkeypatch.setattr(ours, "TensorRTEngine", lambda plan, cuda_graph: made.append(plan.stem))
    for name in NAMES:
        graph(tmp_path / f"{name}.onnx")
    manifest = {"files": {f"{name}.onnx": sha256_file(tmp_path / f"{name}.onnx") for name in NAMES}, "shapes": SHAPES}
    write_json(tmp_path / "manifest.json", manifest)
    right = {"tensorrt": "11.4.0", "gpu": "H100 (SM 9.0)"}
    for name in NAMES:
        write_json(tmp_path / f"{name}.json", right | {"graph": graph_digest(manifest, name)})
    assert list(engines(tmp_path, tmp_path).engines) == made == list(NAMES)
    for wrong, message in (
        ({"graph": "x"}, "of other graphs"),
        ({"gpu": "H200"}, "built by .* on H200"),
        ({"tensorrt": "10"}, "TensorRT 10"),
    ):
        write_json(tmp_path / "vision.json", right | {"graph": graph_digest(manifest, "vision")} | wrong)
        with pytest.raises(EngineError, match=message):
            engines(tmp_path, tmp_path)


@pytest.mark.parametrize("kept", [b"of another GPU", b"old"], ids=["not read", "refused"])
def test_timings_of_another_tensorrt_or_gpu_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes) -> None:
    """TensorRT makes nothing of them, or does not take what it made."""
    monkeypatch.setattr(ours, "load", lambda: stand_in([], "11.4.0", taken=(b"",)))
    monkeypatch.setattr(ours, "device", lambda: "H100 (SM 9.0)")
    (tmp_path / "cache").write_bytes(kept)
    build(step(tmp_path), Options(), tmp_path / "cache")
    assert (tmp_path / "g.plan").exists() and (tmp_path / "cache").read_bytes() == b"new"


def test_a_plan_of_another_gpu_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "load", lambda: stand_in([], "11.4.0", reads=False))
    for name in NAMES:
        graph(tmp_path / f"{name}.onnx")
    files = {f"{name}.onnx": sha256_file(tmp_path / f"{name}.onnx") for name in NAMES}
    write_json(tmp_path / "manifest.json", {"files": files, "shapes": SHAPES})
    (tmp_path / "unet.plan").write_bytes(b"plan")
    for read in (lambda: refit(tmp_path / "unet.plan", tmp_path / "unet.onnx"), lambda: ours.inspect(tmp_path / "unet.plan")):
        with pytest.raises(EngineError, match=r"unet.plan: not a plan of TensorRT 11.4.0 on this GPU; build it again"):
            read()


class Plan(ours.TensorRTEngine):
    """An engine of a profile, run by torch."""

    def __init__(self, shapes: ours.Shapes, module: torch.nn.Module) -> None:
        self.shapes_taken, self.module, self.seen = shapes, module, []

    def profile(self) -> ours.Shapes:
        return self.shapes_taken

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        for name, value in inputs.items():
            least, _, largest = self.shapes_taken[name]
            check_shape(name, tuple(value.shape), least, largest, "x.plan")
        self.seen.append([tuple(value.shape) for value in inputs.values()])
        return self.module(**inputs)


class Double(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return 2 * sample


def test_an_engine_is_verified_within_its_profile() -> None:
    shapes = {"sample": ((1, 4, 64, 64), (2, 4, 128, 128), (8, 4, 170, 170))}
    b, h, w = (torch.export.Dim(name) for name in "bhw")
    drawn = Graph("unet", Double(), {"sample": torch.randn(2, 4, 9, 11)}, {"sample": {0: b, 2: h, 3: w}}, ("noise",))
    plan = Plan(shapes, Double())
    assert len(verify(drawn, plan, 0.0)) == 2 and plan.seen == [[(1, 4, 64, 64)], [(2, 4, 128, 128)]]
    made = [(f"batch {n}", {"sample": torch.ones(n, 4, 64, 64)}) for n in (1, 9, 8)]
    assert [d.case for d in verify(replace(drawn, cases=made), plan, 0.0)] == ["batch 1", "batch 8"]
    with pytest.raises(VerifyError, match="unet: no case has shapes that the engine takes; build it for other --size"):
        verify(replace(drawn, cases=made[1:2]), plan, 0.0)


def test_the_encoder_takes_what_a_run_gives_it() -> None:
    """Samples one by one, among them the null reference, whatever batch and references an engine is for."""
    sizes = Sizes(batch=(4, 4, 8), references=(3, 4, 8))
    for name in ("vision", "prefix", "aggregator", "reference_kv"):
        found = ranges(name, sizes, SHAPES)
        assert found.get("n", (1,))[0] == 1 and found.get("b", (1,))[0] == 1
        assert found.get("l", (1,))[0] <= SHAPES["merged"][0] + 1
    assert ranges("unet", sizes, SHAPES)["b"] == (4, 8, 16) and ranges("text_encoder", sizes, SHAPES)["b"] == (4, 4, 8)


def test_a_build_that_fails_says_where_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in (({"parses": False}, r"cannot parse node n7 \(Foo\): no Foo"), ({"plan": None}, "built no engine")):
        monkeypatch.setattr(ours, "load", lambda given=given: stand_in([], "11.4.0", **given))
        with pytest.raises(EngineError, match=message):
            build(step(tmp_path), Options())
    assert {p.name for p in tmp_path.iterdir()} == {"g.onnx"}
