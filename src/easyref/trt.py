"""TensorRT: engines of the exported graphs. One code path for TensorRT 10 and 11; the package is imported inside functions only.

Precision stands in the graph (strongly typed), never in a builder flag. A plan belongs to one GPU, one TensorRT and one graph: `key`
says which, the JSON beside the plan keeps it, and a plan whose key is another one is built again, never tried.

Shapes: a graph's free axes have names (b, h, w, l, n, m); a profile gives each a least, a usual and a largest size.
"""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyref.records import read_json, sha256_json, write_bytes, write_json
from easyref.runtime import MANIFEST, NAMES, EngineError, Engines, check_graphs

Range = tuple[int, int, int]  # least, usual, largest
FIX = "`easyref trt doctor` says what is missing"
SCHEMA = 1  # of the sidecar


@dataclass(frozen=True)
class Sizes:
    """What an engine must be able to take, in a user's words."""

    batch: Range = (1, 1, 4)  # images at once; twice as many in the UNet, with guidance
    size: Range = (512, 1024, 1360)  # pixels of height and width
    references: Range = (1, 4, 28)  # of a sample
    text: Range = (77, 77, 154)  # tokens of a prompt


@dataclass(frozen=True)
class Options:
    optimization_level: int = 3  # 0 (quick to build) … 5
    workspace_mib: int | None = None  # most scratch memory; None: TensorRT decides
    refit: bool = False  # weights can be replaced later
    detailed: bool = False  # layers of the plan can be inspected


Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # least, usual and largest of every input of a graph


def parse_range(text: str, name: str) -> Range:
    """`4` or `1:2:4`.

    Raises:
        ValueError: not one or three ascending positive numbers.
    """
    parts = text.split(":")
    if not all(re.fullmatch(r"\d+", part) for part in parts) or len(parts) not in (1, 3):
        raise ValueError(f"--{name} {text!r}: give one number, or least:usual:largest such as 1:2:4")
    values = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
    if not 0 < values[0] <= values[1] <= values[2]:
        raise ValueError(f"--{name} {text!r}: the three numbers must ascend from 1 on")
    return values[0], values[1], values[2]


def ranges(name: str, sizes: Sizes, shapes: dict[str, Any]) -> dict[str, Range]:
    """Sizes of the free axes of graph `name`. `shapes`: what the manifest says of the model (VAE factor, merged tokens of a reference,
    tokens of the chat form around them)."""
    least, usual, largest = sizes.batch
    guided = (least, 2 * usual, 2 * largest)
    factor, (m_least, m_usual, m_largest), around = shapes["vae_factor"], shapes["merged"], shapes["around"]
    for side in sizes.size:
        if side % factor:
            raise ValueError(f"--size {side}: not a multiple of {factor}; give one")
    h = w = tuple(side // factor for side in sizes.size)
    _, r_usual, r_largest = sizes.references
    one = (1, 1, 1)  # samples are encoded one by one, and one of them is the null reference: a single image
    context = (m_least + 1, r_usual * m_usual + around, r_largest * m_largest + around + sizes.text[2])
    images = (1, r_usual, r_largest)
    of: dict[str, dict[str, Any]] = {
        "unet": {"b": guided, "h": h, "w": w, "l": sizes.text},
        "reference_kv": {"b": (1, usual, largest)},
        "vae_decoder": {"b": sizes.batch, "h": h, "w": w},
        "text_encoder": {"b": sizes.batch},
        "text_encoder_2": {"b": sizes.batch},
        "vision": {"n": images, "m": shapes["merged"]},
        "prefix": {"b": one, "l": context, "n": images, "m": shapes["merged"]},
        "aggregator": {"b": one, "l": context},
    }
    return {axis: (int(r[0]), int(r[1]), int(r[2])) for axis, r in of[name].items()}


def profile(graph: Path, axes: dict[str, Range]) -> Shapes:
    """Shapes of the inputs of an ONNX file, its named axes filled in.

    Raises:
        EngineError: an axis that `axes` does not have.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    shapes: Shapes = {}
    for value in model.graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        least, usual, largest = (tuple(_size(dim, axes, i, graph, value.name) for dim in dims) for i in range(3))
        shapes[value.name] = (least, usual, largest)
    return shapes


def _size(dim: str | int, axes: dict[str, Range], which: int, graph: Path, name: str) -> int:
    if isinstance(dim, int):
        return dim
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+)", dim.replace(" ", ""))
    if not found or found[2] not in axes:
        raise EngineError(f"{graph}: input {name} has an axis {dim!r} that no option sets; make the graphs again")
    return int(found[1] or 1) * axes[found[2]][which]


# -- what is there -----------------------------------------------------------------------------------------------------


def driver() -> str | None:
    """None, or why CUDA's driver cannot be used. TensorRT must not be touched without it: deserialising then ends the process."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1); run where a GPU is"
    code = cuda.cuInit(0)
    return None if code == 0 else f"the NVIDIA driver does not start (cuInit: {code}); see nvidia-smi"


def load() -> Any:
    """The package tensorrt, with a driver below it.

    Raises:
        EngineError: neither package nor driver, or one that does not fit.
    """
    try:
        trt = import_module("tensorrt")
    except ImportError as error:
        raise EngineError(f"TensorRT cannot be imported ({error}); pip install tensorrt-cu13; {FIX}") from error
    if reason := driver():
        raise EngineError(f"TensorRT {trt.__version__} is there, but {reason}; {FIX}")
    if not torch.cuda.is_available():
        raise EngineError(f"torch {torch.__version__} has no CUDA; install its CUDA build; {FIX}")
    if _major(trt) < 10:
        raise EngineError(f"TensorRT {trt.__version__} is too old; pip install 'tensorrt-cu13>=10.16'")
    return trt


def _major(trt: Any) -> int:
    return int(trt.__version__.split(".")[0])


def doctor(folder: Path) -> list[tuple[str, bool, str]]:
    """Name, whether it will do, and what was found or the fix, of everything that engines need."""
    import onnxruntime

    rows = []
    try:
        trt = import_module("tensorrt")
        rows.append(("tensorrt", _major(trt) >= 10, trt.__version__))
    except ImportError as error:
        rows.append(("tensorrt", False, f"{error}; pip install tensorrt-cu13"))
    reason = driver()
    rows.append(("driver", reason is None, reason or "starts"))
    cuda = torch.cuda.is_available()
    rows.append(("torch", cuda, f"{torch.__version__}, " + (device() if cuda else "no CUDA; install its CUDA build")))
    rows.append(("onnxruntime", True, f"{onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"))
    graphs = (folder / MANIFEST).exists()
    rows.append(("graphs", graphs, str(folder) if graphs else f"none in {folder}; `easyref export`"))
    free = shutil.disk_usage(folder if folder.exists() else Path()).free / 2**30
    rows.append(("disk", free > 20, f"{free:.0f} GiB free; engines of SDXL need about 20"))
    return rows


def device() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (SM {major}.{minor})"


# -- build -------------------------------------------------------------------------------------------------------------


def key(graph_sha256: str, shapes: Shapes, options: Options, tensorrt: str, gpu: str) -> str:
    """What a plan is for; another key needs another plan."""
    return sha256_json([SCHEMA, graph_sha256, shapes, asdict(options), tensorrt, gpu])


def graph_digest(manifest: dict[str, Any], name: str) -> str:
    """Of a graph's file and of the one with its weights, where they are apart."""
    return sha256_json({file: digest for file, digest in manifest["files"].items() if file.startswith(f"{name}.onnx")})


@dataclass(frozen=True)
class Step:
    """One engine to build: graph, plan, shapes, and whether the plan that is there will do."""

    name: str
    graph: Path
    plan: Path
    shapes: Shapes
    digest: str  # of the graph
    key: str
    fresh: bool


def steps(graphs: Path, out: Path, sizes: Sizes, options: Options, tensorrt: str, gpu: str) -> list[Step]:
    """What `build` would do. Reads only the graphs: needs neither TensorRT nor a GPU."""
    manifest = check_graphs(graphs)
    found = []
    for name in NAMES:
        path, plan = graphs / f"{name}.onnx", out / f"{name}.plan"
        shapes = profile(path, ranges(name, sizes, manifest["shapes"]))
        digest = graph_digest(manifest, name)
        own = key(digest, shapes, options, tensorrt, gpu)
        sidecar = plan.with_suffix(".json")
        fresh = plan.exists() and sidecar.exists() and read_json(sidecar)["key"] == own
        found.append(Step(name, path, plan, shapes, digest, own, fresh))
    return found


def build(step: Step, options: Options, timing_cache: Path | None = None) -> None:
    """Write `step.plan` and its sidecar.

    Raises:
        EngineError: an operator TensorRT does not take, or a network that it cannot build.
    """
    trt = load()
    logger = trt.Logger(trt.Logger.WARNING)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # what the binding raises where the library gives none
        raise EngineError(f"TensorRT {trt.__version__} does not start here; {FIX}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if _major(trt) < 11 else 0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(step.graph)):
        wrong = parser.get_error(0)
        raise EngineError(f"{step.graph}: TensorRT cannot parse node {wrong.node_name()} ({wrong.node_operator()}): {wrong.desc()}")
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if timing_cache:
        _use_timings(config, timing_cache.read_bytes() if timing_cache.exists() else b"")
    chosen = builder.create_optimization_profile()
    for name, (least, usual, largest) in step.shapes.items():
        chosen.set_shape(name, least, usual, largest)
    config.add_optimization_profile(chosen)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{step.graph}: TensorRT built no engine; its log above says why; more memory: --workspace")
    sidecar = step.plan.with_suffix(".json")
    sidecar.unlink(missing_ok=True)  # a plan without one is built anew, a plan under that of another would pass for it
    write_bytes(step.plan, bytes(plan))
    about = {"key": step.key, "graph": step.digest, "tensorrt": trt.__version__, "gpu": device(), "shapes": step.shapes}
    write_json(sidecar, about)
    if timing_cache:
        write_bytes(timing_cache, bytes(config.get_timing_cache().serialize()))


def _use_timings(config: Any, data: bytes) -> None:
    """Timings of earlier builds, unless they are of another TensorRT or GPU, which TensorRT refuses: then there are none yet."""
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def read_engine(trt: Any, plan: Path) -> Any:
    """The engine of a plan.

    Raises:
        EngineError: of another TensorRT or GPU, or torn.
    """
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineError(f"{plan}: not a plan of TensorRT {trt.__version__} on this GPU; build it again")
    return engine


def refit(plan: Path, graph: Path) -> None:
    """Put the weights of `graph` into a plan that was built with `refit`: the same network, other weights. The plan then is one of
    `graph`; another `build` makes it anew."""
    digest = graph_digest(check_graphs(graph.parent), graph.stem)
    trt = load()
    engine, logger = read_engine(trt, plan), trt.Logger(trt.Logger.WARNING)
    if not engine.refittable:
        raise EngineError(f"{plan}: cannot be refitted; build it with --refit")
    refitter = trt.Refitter(engine, logger)
    reader = trt.OnnxParserRefitter(refitter, logger)
    if not reader.refit_from_file(str(graph)):
        raise EngineError(f"{graph}: does not fit {plan}: {reader.get_error(0).desc()}")
    if missing := refitter.get_missing_weights():
        raise EngineError(f"{graph}: lacks {len(missing)} weights of {plan}, {missing[0]} first; build the engine again")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"{plan}: TensorRT did not take the weights of {graph}")
    sidecar = plan.with_suffix(".json")
    about = read_json(sidecar)
    sidecar.unlink()  # as in `build`
    write_bytes(plan, bytes(engine.serialize()))
    write_json(sidecar, about | {"key": "refitted", "graph": digest})


def inspect(plan: Path) -> str:
    """Inputs, outputs, shapes and layers of a plan, as JSON text of TensorRT."""
    trt = load()
    engine = read_engine(trt, plan)
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# -- run ---------------------------------------------------------------------------------------------------------------


def check_shape(name: str, shape: tuple[int, ...], least: tuple[int, ...], largest: tuple[int, ...], plan: str) -> None:
    if len(shape) != len(least) or not all(a <= size <= b for a, size, b in zip(least, shape, largest, strict=True)):
        raise EngineError(f"{plan}: input {name} of shape {list(shape)} is outside {list(least)} … {list(largest)}; build it for that")


class TensorRTEngine:
    """One plan: tensors in by name, a tensor out or several, all on the GPU. With `cuda_graph` the last shapes are replayed."""

    def __init__(self, plan: Path, cuda_graph: bool = False) -> None:
        self.trt = trt = load()
        self.plan, self.cuda_graph = plan, cuda_graph
        engine = self.engine = read_engine(trt, plan)
        self.context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.shapes: tuple[tuple[int, ...], ...] = ()  # that `replay` is of: another one changes the context below it
        self.replay: tuple[torch.cuda.CUDAGraph, dict[str, Tensor], list[Tensor]] | None = None

    def __call__(self, **inputs: Tensor) -> Any:
        first, *others = self._run(inputs)
        return (first, *others) if others else first

    def profile(self) -> Shapes:
        """Shapes of the inputs that it takes."""
        bounds = {name: [tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, 0)] for name in self.inputs}
        return {name: (least, usual, largest) for name, (least, usual, largest) in bounds.items()}

    def _run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        given = {name: inputs[name].to("cuda", self._dtype(name)).contiguous() for name in self.inputs}
        shapes = tuple(tuple(given[name].shape) for name in self.inputs)
        if self.replay is None or shapes != self.shapes:
            allowed = self.profile()
            for name, shape in zip(self.inputs, shapes, strict=True):
                least, _, largest = allowed[name]
                check_shape(name, shape, least, largest, str(self.plan))
            out = self._launch(given)
            if self.cuda_graph:
                self._capture(shapes, given)
            return out
        graph, held, out = self.replay
        for name, tensor in given.items():
            held[name].copy_(tensor)
        graph.replay()
        return [tensor.clone() for tensor in out]

    def _bind(self, given: dict[str, Tensor]) -> list[Tensor]:
        context = self.context
        for name, tensor in given.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        out = []
        for name in self.outputs:
            out.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtype(name), device="cuda"))
            context.set_tensor_address(name, out[-1].data_ptr())
        return out

    def _launch(self, given: dict[str, Tensor]) -> list[Tensor]:
        out = self._bind(given)
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError(f"{self.plan}: TensorRT did not run it; its log above says why")
        return out

    def _capture(self, shapes: tuple[tuple[int, ...], ...], given: dict[str, Tensor]) -> None:
        held, graph = {name: tensor.clone() for name, tensor in given.items()}, torch.cuda.CUDAGraph()
        out = self._bind(held)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        self.shapes, self.replay = shapes, (graph, held, out)

    def _dtype(self, name: str) -> torch.dtype:
        trt, kind = self.trt, self.engine.get_tensor_dtype(name)
        types = {
            trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64, trt.DataType.INT32: torch.int32, trt.DataType.BOOL: torch.bool,
        }  # fmt: skip
        return types[kind]


def engines(graphs: Path, plans: Path, cuda_graph: bool = False) -> Engines:
    """The engines of a folder of plans, each checked to be of these graphs, this GPU and this TensorRT."""
    trt = load()
    manifest = check_graphs(graphs)
    made = {}
    for name in NAMES:
        sidecar = plans / f"{name}.json"
        if not sidecar.exists():
            raise EngineError(f"{plans}: no engine {name}; `easyref trt build`")
        about = read_json(sidecar)
        if (about["tensorrt"], about["gpu"]) != (trt.__version__, device()):
            there = f"TensorRT {about['tensorrt']} on {about['gpu']}"
            raise EngineError(f"{plans / name}.plan: built by {there}, here is {trt.__version__} on {device()}; `easyref trt build`")
        if about["graph"] != graph_digest(manifest, name):
            raise EngineError(f"{plans / name}.plan: of other graphs than those of {graphs}; `easyref trt build`")
        made[name] = TensorRTEngine(plans / f"{name}.plan", cuda_graph and name == "unet")
    return Engines(made, manifest, f"tensorrt {trt.__version__}", "cuda")
