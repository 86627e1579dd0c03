"""The verbs of easyref. Only typer is imported here; everything heavy inside the commands.

A verb that is also a stage has the name of its DVC stage and of its section in params.yaml.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from easyref.drawing import Artist, Reference, Wish

app = typer.Typer(
    help="Several reference images and a prompt in, a new image that keeps what they have in common out.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

bench = typer.Typer(help="Measure, and write the figures to benchmarks/.", no_args_is_help=True)
app.add_typer(bench, name="bench")

trt = typer.Typer(help="TensorRT engines of the exported graphs.", no_args_is_help=True)
app.add_typer(trt, name="trt")

DATA, MODELS, METRICS = Path("data"), Path("models"), Path("metrics")
WORK = Path(".work")
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameter file.")]
PARAMS = Path("params.yaml")
EngineName = Annotated[Literal["local", "ray"], typer.Option(help="This machine, or Ray (RAY_ADDRESS: a cluster).")]
GRAPHS, ENGINES = Path("out/onnx"), Path("out/engines")


@app.command()
def ingest(params: ParamsFile = PARAMS) -> None:
    """Images of the source (emoji, folder, tar, table, upstream JSON) → checked tar shards, images.parquet, rejects.parquet."""
    from easyref.config import load_params
    from easyref.data.ingest import ingest as run
    from easyref.records import alone

    with alone(WORK / "data"):
        counts = run(load_params(params), DATA / "images", WORK / "ingest")
    print(", ".join(f"{v} {k.replace('_', ' ')}" for k, v in counts.items()))


@app.command()
def embed(params: ParamsFile = PARAMS, engine: EngineName = "local") -> None:
    """Images, captions, detected subjects and faces → vectors, for groups that are learned."""
    from easyref.config import load_params
    from easyref.data.embed import embed as run
    from easyref.records import alone

    with alone(WORK / "data"):
        counts = run(load_params(params).embed, DATA / "images", DATA / "embeddings", WORK / "embed", engine)
    print(", ".join(f"{n} {part}s" for part, n in sorted(counts.items())))


@app.command()
def group(params: ParamsFile = PARAMS, engine: EngineName = "local") -> None:
    """Which images share something, by labels or by what they look like → groups.parquet."""
    from easyref.config import load_params
    from easyref.data.group import group_stage
    from easyref.records import alone

    with alone(WORK / "data"):
        table = group_stage(load_params(params), DATA, METRICS / "group.json", WORK / "group", engine)
    print(f"{len(table)} groups: " + ", ".join(f"{k} {n}" for k, n in sorted(table["kind"].value_counts().iter_rows())))


@app.command()
def split(params: ParamsFile = PARAMS) -> None:
    """Held-out, held-in and training groups, leave-one-out samples."""
    from easyref.config import load_params
    from easyref.data.shards import ImageStore
    from easyref.data.split import split_images
    from easyref.records import FACE_COLUMNS, atomic_folder, read_table, write_table

    values = load_params(params)
    groups, faces = DATA / "groups" / "groups.parquet", DATA / "groups" / "faces.parquet"
    tables = split_images(ImageStore(DATA / "images"), read_table(groups), values.split, values.seed)
    if faces.exists():
        tables["faces"] = read_table(faces, FACE_COLUMNS)
    with atomic_folder(DATA / "split") as folder:
        for name, table in tables.items():
            write_table(folder / f"{name}.parquet", table)
    print(", ".join(f"{k} {n}" for k, n in sorted(tables["images"]["split"].value_counts().iter_rows())))
    if "held_out" not in tables["samples"]["split"]:
        print(
            "no held-out samples, by which every training is judged: split.held_out_share is too small, or names, near duplicates and "
            "groups connect the images (folders or captions of their own tell them apart), or held-out groups have under four images"
        )


@app.command()
def report(params: ParamsFile = PARAMS) -> None:
    """What the data is: counts, sizes, groups to look at, rejects with their reasons → reports/data.html."""
    from easyref.config import load_params
    from easyref.data.report import report as run

    values = load_params(params)
    out = Path("reports") / "data.html"
    run(values.report, DATA, METRICS / "group.json", out, values.seed)
    print(out)


@bench.command("group")
def bench_group(
    n: Annotated[str, typer.Option("--n", help="How many vectors, with commas between.")] = "1e5,1e6",
    workers: Annotated[int, typer.Option(min=1)] = 2,
    memory_gib: Annotated[float, typer.Option(min=0, help="As group.memory_gib.")] = 1.0,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/group.json"),
) -> None:
    """Time, memory, precision and recall of learned grouping on planted groups."""
    from easyref.data.bench import bench_group as run

    try:
        counts = [int(float(word)) for word in n.split(",")]
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--n {n!r}: not numbers with commas between; try --n 1e5,1e6") from error
    if min(counts) < 1000:
        raise ValueError(f"--n {n}: too few to measure; give 1000 or more")
    run(sorted(counts), out, workers, memory_gib)


@bench.command("infer")
def bench_infer(
    rounds: Annotated[int, typer.Option(min=10)] = 60,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/infer.json"),
) -> None:
    """What references cost in a step and when they are encoded, beside the plain UNet and diffusers' IP-Adapter."""
    from easyref.model.bench import bench_infer as run

    found = run(out, str(MODELS / "base" / "mllm"), rounds)
    for name in ("adapter_over_plain", "adapter_over_diffusers_ip_adapter", "new_prompt_over_first_encode"):
        low, high = found["intervals"][name]
        print(f"{name} {found[name]:.3f} ({low:.3f} to {high:.3f})")


@bench.command("export")
def bench_export(
    params: ParamsFile = Path("presets/sdxl.yaml"),
    folder: Annotated[Path, typer.Option(help="For the graphs, while they are needed: 10 GiB for SDXL.")] = WORK / "bench_export",
    out: Annotated[Path, typer.Option()] = Path("benchmarks/export.json"),
) -> None:
    """Time, memory and bytes of the export of a preset's models, and of loading it, with random weights."""
    _project()
    from easyref.config import load_params
    from export.bench import bench_export as run

    found = run(load_params(params), MODELS / "base", folder, out)
    for name, row in found["graphs"].items():
        size = sum(row["files_gib"].values())
        print(f"{name}: {size:.2f} GiB in {row['export_s']:.0f} s, loaded in {row['load_s']:.0f} s, {row['difference']:.1e} off")


@bench.command("train")
def bench_train(
    images: Annotated[int, typer.Option(min=32, help="Samples of a pass; a multiple of the batch.")] = 256,
    passes: Annotated[int, typer.Option(min=1)] = 4,
    params: ParamsFile = PARAMS,
    out: Annotated[Path, typer.Option()] = Path("benchmarks/train.json"),
) -> None:
    """Images a second of the three stages, beside a plain loop of the published recipe."""
    from easyref.config import load_params
    from easyref.training.bench import bench_train as run
    from easyref.training.stages import STAGES

    found = run(load_params(params), DATA, MODELS, out, images, passes)
    for name in STAGES:
        row = found[name]
        print(
            f"{name}: {row['images_per_s']['ours']:.1f} images/s, {row['speedup_over_plain_loop']:.2f} times the plain loop's, "
            f"{row['speedup_over_published_microbatch']:.2f} times with its microbatch of {row['published_microbatch']}"
        )


ImageFolder = Annotated[Path | None, typer.Argument(help="Its images (easyref/evaluation/protocols.py); none: held-out ones.")]
Samples = Annotated[int, typer.Option(min=1, help="The first so many of a seeded order.")]


def _protocol(name: Literal["single", "dreambench"], folder: Path | None, samples: int, params: Path, out: Path) -> None:
    from easyref.config import load_params
    from easyref.evaluation.mrbench_stage import protocol_bench
    from easyref.evaluation.summary import table
    from easyref.records import alone

    with alone(WORK / "evaluate"):
        result = protocol_bench(load_params(params), name, folder, samples, DATA, MODELS, out, WORK / "evaluate")[name]
    print("\n".join(["", *table(name, result), "", f"figures: {out}", f"picture: {out.with_suffix('.png')}"]))


@bench.command("single")
def bench_single(
    folder: ImageFolder = None, samples: Samples = 96, params: ParamsFile = PARAMS, out: Path = Path("benchmarks/single.json")
) -> None:
    """One reference and its caption (NAME.txt beside NAME.png): what is drawn against the reference itself."""
    _protocol("single", folder, samples, params, out)


@bench.command("dreambench")
def bench_dreambench(
    folder: Annotated[Path, typer.Argument(help="Subjects and prompts (easyref/evaluation/protocols.py).")],
    samples: Samples = 750,
    params: ParamsFile = PARAMS,
    out: Path = Path("benchmarks/dreambench.json"),
) -> None:
    """FOLDER/SUBJECT/*.png in the prompts of FOLDER/prompts.txt (`a {} on the beach`), one reference a subject; FOLDER/classes.txt has
    what a subject is called (`colorful_sneaker,sneaker`)."""
    _protocol("dreambench", folder, samples, params, out)


@app.command()
def upstream(out: Annotated[Path, typer.Argument(help="Folder for data.json and images; an earlier one there is replaced.")]) -> None:
    """The training groups as the JSON and images that the published training code reads."""
    from easyref.data.upstream import write_upstream

    print(f"{out}: {write_upstream(DATA, out)} entries")


@app.command()
def base(params: ParamsFile = PARAMS) -> None:
    """The frozen base models: trained here (nano) or pulled from the hub at pinned revisions (sdxl)."""
    from easyref.config import load_params
    from easyref.training.base import base as run

    run(load_params(params), DATA, MODELS / "base", METRICS / "base", WORK / "base")


Allow = Annotated[
    list[str] | None, typer.Option(help="A value, named as in the refusal to go on from a saved state, that may be another one now.")
]


def _stage(name: str, params: Path, allow: list[str] | None) -> None:
    if launch := os.environ.pop("EASYREF_LAUNCH", None):
        command = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(launch), "-m", "easyref.cli", *sys.argv[1:]]
        os.execv(sys.executable, command)
    from easyref.config import load_params
    from easyref.training.stages import STAGES, run_stage

    run_stage(load_params(params), name, DATA, MODELS, MODELS / name, METRICS / name, WORK, STAGES[name].starts_from, allow or ())


@app.command()
def pretrain(params: ParamsFile = PARAMS, allow: Allow = None) -> None:
    """Stage 1, alignment: the MLLM but for its last layer is frozen, after a warm start if there is one (training/stages.py)."""
    _stage("pretrain", params, allow)


@app.command("finetune_single")
def finetune_single(params: ParamsFile = PARAMS, allow: Allow = None) -> None:
    """Stage 2: the whole MLLM and LoRA train too."""
    _stage("finetune_single", params, allow)


@app.command("finetune_multi")
def finetune_multi(params: ParamsFile = PARAMS, allow: Allow = None) -> None:
    """Stage 3: the same with references from groups."""
    _stage("finetune_multi", params, allow)


@app.command()
def ema(
    stage: Annotated[Literal["pretrain", "finetune_single", "finetune_multi"], typer.Argument(help="Trained with snapshot_images.")],
    width: Annotated[float, typer.Option(help="Of the average, as a share of the training: .05 to .2 are usual.")],
    out: Annotated[Path | None, typer.Option(help="Checkpoint folder; default: models/STAGE-ema-WIDTH.")] = None,
) -> None:
    """A checkpoint with the weights averaged over another width of the training, chosen afterwards."""
    from easyref.training.ema import average

    print(average(WORK / f"{stage}.ema", MODELS / stage, width, out or MODELS / f"{stage}-ema-{width:g}"))


@app.command()
def evaluate(params: ParamsFile = PARAMS) -> None:
    """Right, shuffled and no references on held-out and held-in groups → metrics and the picture that proves it."""
    from easyref.config import load_params
    from easyref.evaluation.stage import evaluate_stage
    from easyref.records import alone

    with alone(WORK / "evaluate"):
        evaluate_stage(load_params(params), DATA, MODELS, Path(), WORK / "evaluate")


@app.command()
def mrbench(params: ParamsFile = PARAMS) -> None:
    """The same samples by every baseline (average, concatenation, LoRA, copy …) → metrics and reports/evaluation.html."""
    from easyref.config import load_params
    from easyref.evaluation.mrbench_stage import mrbench_stage
    from easyref.records import alone
    from easyref.training.group_lora import group_lora

    with alone(WORK / "evaluate"):
        mrbench_stage(load_params(params), DATA, MODELS, Path(), WORK / "evaluate", group_lora)


@app.command()
def ablate(
    name: Annotated[str, typer.Argument(help="tokens, layer, attention, stages or drops.")],
    share: Annotated[float, typer.Option(help="Of the training lengths in the parameters.")] = 0.05,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples a variant.")] = 48,
    params: ParamsFile = PARAMS,
) -> None:
    """Train the stages again with one thing changed, and compare the variants → metrics/ablate, reports/ablate."""
    from easyref.ablate import ablate as run
    from easyref.ablate import table
    from easyref.config import load_params
    from easyref.records import alone

    with alone(WORK / "ablate"):
        print(table(run(load_params(params), name, share, samples, DATA, MODELS, Path(), WORK / "ablate")))


@app.command()
def summary() -> None:
    """The last evaluation in a few lines, the table of all methods, and where report and picture are."""
    from easyref.evaluation.summary import summary as text

    print(text(Path()))


Model = Annotated[str, typer.Option(help="Checkpoint, pulled model, or models:/easyref@champion.")]
MODEL = str(MODELS / "finetune_multi")
Backend = Literal["torch", "onnxruntime", "tensorrt"]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights under torch; bf16: half the memory, for a GPU.")]
#: Options that do nothing with other ones.
OF_BACKENDS = {
    "graphs": ("onnxruntime", "tensorrt"),
    "provider": ("onnxruntime",),
    "engines": ("tensorrt",),
    "cuda_graph": ("tensorrt",),
}


def _checkpoint(model: str) -> tuple[Path, Path, str]:
    """Its checkpoint folder, its graphs, and its name in pictures."""
    if model.startswith("models:/"):
        from easyref.registry import cached

        folder, name = cached(Path(), model), model
    else:
        folder, name = Path(model), Path(model).resolve().name
    attached = folder / "onnx" if (folder / "onnx").is_dir() else GRAPHS
    if (folder / "checkpoint").is_dir():  # a bundle of the registry
        folder /= "checkpoint"
    if not folder.is_dir():  # before the imports that take seconds
        raise FileNotFoundError(f"{folder}: no such checkpoint; `make run` trains one; or --model models/pretrain, of `dvc pull`")
    return folder, attached, name


def _artist(
    model: str, references: int, backend: Backend, graphs: Path | None, engines: Path, provider: str, cuda_graph: bool,
    precision: Precision = "fp32",
) -> Artist:  # fmt: skip
    """What draws; refused before it is loaded when it takes fewer `references`, or its graphs have a precision of their own."""
    if precision != "fp32" and backend != "torch":
        raise ValueError(f"--precision {precision} is torch's; `easyref export --dtype` sets that of graphs")
    folder, attached, name = _checkpoint(model)
    from easyref.drawing import Artist
    from easyref.model.weights import read_config
    from easyref.runtime import Engines

    limit = read_config(folder).reference.max_references
    if references > limit:
        raise ValueError(f"{references} references, the model takes at most {limit}; give fewer --ref")
    drawn_by: Engines | None = None
    if backend == "onnxruntime":
        drawn_by = Engines.onnxruntime(graphs or attached, provider)
    if backend == "tensorrt":
        from easyref.trt import engines as load

        drawn_by = load(graphs or attached, engines, cuda_graph)
    return Artist.load(folder, name, drawn_by, backend, precision)


def _draw(artist: Artist, wish: Wish, references: list[Reference], batches: list[list[int]], seeds: list[int], out: Path) -> None:
    """`out`/SEED.png of each of `seeds`, which lie in `batches` that are drawn together."""
    from easyref.progress import track
    from easyref.records import write_bytes

    out.mkdir(parents=True, exist_ok=True)  # what cannot be is told before the drawing
    for batch in track(batches, "generate", len(batches), "batches"):
        for seed, png in zip(batch, artist.draw(wish, references, batch), strict=True):
            if seed in seeds:
                write_bytes(out / f"{seed}.png", png)
                print(out / f"{seed}.png", flush=True)


def _batches(seeds: list[int]) -> list[list[int]]:
    from easyref.drawing import MAX_BATCH

    return [seeds[start : start + MAX_BATCH] for start in range(0, len(seeds), MAX_BATCH)]


@app.command()
def generate(
    ctx: typer.Context,
    ref: Annotated[list[Path] | None, typer.Option("--ref", help="A reference image; repeat for more.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="How much each reference counts, in the same order; 1 each.")] = None,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "",
    negative_prompt: Annotated[str, typer.Option(help="What to avoid.")] = "",
    model: Model = MODEL,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise: another seed, another image.")] = 0,
    num: Annotated[int, typer.Option(min=1, max=64, help="Images to make, with seeds seed, seed+1 …")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Of the denoising.")] = 30,
    guidance: Annotated[float, typer.Option(min=1.0, max=50.0, help="Classifier-free guidance; 1: none.")] = 3.0,
    scale: Annotated[str, typer.Option(help="Strength of the references; or by block: down_blocks=0.5,up_blocks.0=1.5.")] = "1.0",
    negative_ref: Annotated[list[Path] | None, typer.Option(help="An image to lead away from; repeat for more.")] = None,
    window: Annotated[tuple[float, float], typer.Option(help="The share of the steps in which references count: 0 0.6.")] = (0.0, 1.0),
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    origin: Annotated[Path | None, typer.Option("--from", help="Draw this PNG of easyref's again; other options change it.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images, SEED.png; those of that name are replaced.")] = Path("out"),
    backend: Annotated[Backend, typer.Option(help="What draws.")] = "torch",
    precision: Precision = "fp32",
    graphs: Annotated[Path | None, typer.Option(help="Exported graphs; default: those of the pulled model, else out/onnx.")] = None,
    engines: Annotated[Path, typer.Option(help="Engines of `easyref trt build`.")] = ENGINES,
    provider: Annotated[str, typer.Option(help="Of ONNX Runtime: cpu, cuda, tensorrt.")] = "cpu",
    cuda_graph: Annotated[bool, typer.Option("--use-cuda-graph", help="Replay the steps of an engine (TensorRT).")] = False,
) -> None:
    """New images that keep what the references have in common. Their settings stand in the PNG."""
    from easyref.drawing import Reference, Settings, Wish, find, parse_scale

    wish = Wish.of(
        prompt=prompt, negative_prompt=negative_prompt, steps=steps, guidance=guidance, scale=parse_scale(scale), window=window,
        width=width, height=height,
    )  # fmt: skip
    given = {name for name in ctx.params if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"}
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name, backends in OF_BACKENDS.items():
        if name in given and backend not in backends:
            print(
                f"easyref: {options[name]} does nothing with --backend {backend}, only with {' and '.join(backends)}", file=sys.stderr
            )
    paths, weights, against, settings = ref or [], weight, negative_ref or [], None
    first = seed
    if origin:
        settings = Settings.read(origin)
        if settings is None:
            raise ValueError(f"{origin}: no settings in it; name a PNG that easyref drew")
        wish = Wish(**{name: getattr(wish if name in given else settings, name) for name in Wish.model_fields})
        positive = [used for used in settings.references if not used.negative]
        weights = weight or [used.weight for used in positive]
        first = seed if "seed" in given else settings.seed
        folders = [origin.parent, Path()]
        paths = find(positive, paths, folders)
        against = find([used for used in settings.references if used.negative], against, folders)
    seeds = list(range(first, first + num))
    batches = _batches(seeds)
    if settings and not given & {"seed", "num"}:  # one of the batch that it was drawn in
        batches, seeds = [settings.batch], [settings.seed]
    if not paths and not settings:
        raise ValueError("no reference; give at least one with --ref")
    if weights and len(weights) != len(paths):
        raise ValueError(f"{len(weights)} --weight for {len(paths)} --ref; give one for each")
    references = [Reference.read(path, weight=w) for path, w in zip(paths, weights or [1.0] * len(paths), strict=True)]
    references += [Reference.read(path, negative=True) for path in against]
    artist = _artist(model, len(paths), backend, graphs, engines, provider, cuda_graph, precision)
    if settings and (settings.model_sha256, settings.backend, settings.precision) != (artist.sha256, backend, precision):
        by = f"{settings.model} {settings.model_sha256[:12]} on {settings.backend} in {settings.precision}"
        print(f"easyref: {origin} was drawn by {by}", file=sys.stderr)
    _draw(artist, wish, references, batches, seeds, out)


Host = Annotated[str, typer.Option(help="Where to listen; other machines need the token in EASYREF_TOKEN.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
Waiting = Annotated[int, typer.Option(min=0, help="Drawings that may wait for the one at work; more are told when to come again.")]


def _serve(
    model: str, host: str, port: int, max_waiting: int, backend: Backend, precision: Precision, page: bool, browser: bool
) -> None:
    from easyref.serve import check_host, serve

    token = os.environ.get("EASYREF_TOKEN") or None
    check_host(host, token)
    serve(_artist(model, 0, backend, None, ENGINES, "cpu", False, precision), host, port, max_waiting, token, page, browser)


@app.command()
def ui(
    model: Model = MODEL,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    max_waiting: Waiting = 16,
    backend: Annotated[Backend, typer.Option(help="What draws.")] = "torch",
    precision: Precision = "fp32",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """A page to draw with: drop references, weigh them, say what to draw. On this machine only, unless told otherwise."""
    _serve(model, host, port, max_waiting, backend, precision, True, browser)


@app.command()
def serve(
    model: Model = MODEL,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_waiting: Waiting = 16,
    backend: Annotated[Backend, typer.Option(help="What draws.")] = "torch",
    precision: Precision = "fp32",
) -> None:
    """The model over HTTP: POST /generate, GET /health (easyref/serve.py has the rest)."""
    _serve(model, host, port, max_waiting, backend, precision, False, False)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder; its base models beside it.")] = MODELS / "finetune_multi",
    out: Annotated[Path, typer.Argument(help="Folder for the graphs.")] = GRAPHS,
    opset: Annotated[int, typer.Option(min=18, max=24)] = 20,
    dtype: Annotated[Literal["fp32", "fp16"], typer.Option(help="Precision of weights and outputs.")] = "fp32",
    quantize: Annotated[Literal["int8", "fp8"] | None, typer.Option(help="The UNet in 8 bits, by nvidia-modelopt.")] = None,
) -> None:
    """A checkpoint → ONNX graphs, each and whole images compared with torch (`python -m export` has more options)."""
    _project()
    from export.__main__ import run

    run(checkpoint, out, opset, dtype, quantize=quantize)


def _project() -> None:
    """The build programs lie in the project, not in the package."""
    if not Path("export").is_dir():
        raise FileNotFoundError("export/: not here; run this in the project's folder")
    sys.path.insert(0, str(Path.cwd()))


Graphs = Annotated[Path, typer.Option("--onnx-dir", help="Folder of `easyref export`.")]
Plans = Annotated[Path, typer.Option("--engine-dir", help="Folder of the engines.")]
Provider = Annotated[Literal["tensorrt", "cpu", "cuda"], typer.Option(help="tensorrt: engines; cpu, cuda: ONNX Runtime.")]


@trt.command("build")
def trt_build(
    graphs: Graphs = GRAPHS,
    plans: Plans = ENGINES,
    batch: Annotated[str, typer.Option(help="Images at once: one number, or least:usual:largest.")] = "1:1:4",
    size: Annotated[str, typer.Option(help="Pixels of height and width.")] = "512:1024:1360",
    references: Annotated[str, typer.Option(help="References of a sample.")] = "1:4:28",
    text: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "77:77:154",
    optimization_level: Annotated[int, typer.Option("--builderOptimizationLevel", "--optimization-level", min=0, max=5)] = 3,
    workspace: Annotated[int | None, typer.Option(min=1, help="Most scratch memory, MiB.")] = None,
    timing_cache: Annotated[Path | None, typer.Option("--timingCacheFile", "--timing-cache")] = ENGINES / "timing.cache",
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced later.")] = False,
    detailed: Annotated[bool, typer.Option("--detailed", help="Keep what `trt inspect` shows of the layers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be built; needs no GPU.")] = False,
) -> None:
    """Engines of all graphs; those that fit what is asked for are kept."""
    from easyref.progress import track
    from easyref.trt import Options, Sizes, build, device, load, parse_range, steps

    given = {"batch": batch, "size": size, "references": references, "text": text}
    sizes = Sizes(**{name: parse_range(value, name) for name, value in given.items()})
    options = Options(optimization_level, workspace, refit, detailed)
    here = ("any", "any") if dry_run else (load().__version__, device())
    todo = steps(graphs, plans, sizes, options, *here)
    if dry_run:
        for step in todo:
            print(f"{step.plan}, key {step.key[:12]}")
            for name, shapes in step.shapes.items():
                print(f"  {name}: " + ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes))
        return
    stale = [step for step in todo if not step.fresh]
    for step in track(stale, "trt build", len(stale), "engines"):
        build(step, options, timing_cache)
    print(f"{plans}: {', '.join(step.name for step in todo)}")


@trt.command("run")
def trt_run(
    ref: Annotated[list[Path], typer.Option("--ref", help="A reference image; repeat for more.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "",
    negative_prompt: Annotated[str, typer.Option("--negative-prompt")] = "",
    model: Annotated[str, typer.Option(help="As of `easyref generate`.")] = str(MODELS / "finetune_multi"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    num: Annotated[int, typer.Option("--batch-size", min=1, max=64)] = 1,
    steps: Annotated[int, typer.Option("--denoising-steps", min=1, max=1000)] = 30,
    guidance: Annotated[float, typer.Option("--guidance-scale", min=1.0, max=50.0)] = 3.0,
    scale: Annotated[float, typer.Option(min=0.0, max=10.0, help="Strength of the references.")] = 1.0,
    out: Annotated[Path, typer.Option("--output-dir")] = Path("out"),
    graphs: Graphs = GRAPHS,
    plans: Plans = ENGINES,
    provider: Provider = "tensorrt",
    cuda_graph: Annotated[bool, typer.Option("--use-cuda-graph")] = False,
) -> None:
    """`easyref generate` with engines; the options have their names of NVIDIA's demo."""
    from easyref.drawing import Reference, Wish

    wish = Wish(prompt=prompt, negative_prompt=negative_prompt, steps=steps, guidance=guidance, scale=scale)
    references, seeds = [Reference.read(path) for path in ref], list(range(seed, seed + num))
    backend: Backend = "tensorrt" if provider == "tensorrt" else "onnxruntime"
    artist = _artist(model, len(ref), backend, graphs, plans, provider, cuda_graph)
    _draw(artist, wish, references, _batches(seeds), seeds, out)


@trt.command("doctor")
def trt_doctor(graphs: Graphs = GRAPHS) -> None:
    """What engines need, what is here, and the fix for what is not."""
    from easyref.trt import doctor

    rows = doctor(graphs)
    for name, good, found in rows:
        print(f"{'ok     ' if good else 'MISSING'}  {name:<12} {found}")
    if not all(good for _, good, _ in rows):
        raise typer.Exit(1)


@trt.command("inspect")
def trt_inspect(plan: Annotated[Path, typer.Argument(help="An engine's file.")]) -> None:
    """Layers of an engine, as TensorRT's JSON."""
    from easyref.trt import inspect

    if not plan.is_file():
        raise FileNotFoundError(f"{plan}: no such engine; `easyref trt build`")
    print(inspect(plan))


@trt.command("refit")
def trt_refit(plan: Annotated[Path, typer.Argument()], graph: Annotated[Path, typer.Argument(help="ONNX file.")]) -> None:
    """Other weights of the same network into an engine that was built with --refit."""
    from easyref.trt import refit

    refit(plan, graph)
    print(plan)


@trt.command("verify")
def trt_verify(
    checkpoint: Annotated[Path, typer.Argument()] = MODELS / "finetune_multi",
    graphs: Graphs = GRAPHS,
    plans: Plans = ENGINES,
    provider: Provider = "tensorrt",
    tolerance: Annotated[float, typer.Option("--rtol", min=0, help="Of an output's largest value.")] = 1e-2,
) -> None:
    """Every engine against torch over batches, sizes, timesteps, references and scales."""
    _project()
    from easyref.pipeline import EasyRef
    from easyref.runtime import Engines
    from export.graphs import graphs as make
    from export.verify import verify

    if provider == "tensorrt":
        from easyref.trt import engines as load

        made = load(graphs, plans)
    else:
        made = Engines.onnxruntime(graphs, provider)
    for graph in make(EasyRef.from_pretrained(checkpoint, device="cpu")):
        found = verify(graph, made.engines[graph.name], tolerance)
        worst = max(found, key=lambda d: d.largest)
        print(f"{graph.name}: {len(found)} cases, at most {worst.largest:.1e} off, at {worst.case}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Published file, or checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder, or published file, that is not there yet.")],
    dtype: Annotated[Literal["stored", "fp32", "bf16"], typer.Option(help="stored: each tensor's own.")] = "stored",
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Read a pickle too, as DeepSpeed writes it.")] = False,
    params: Annotated[Path, typer.Option("--params", help="The base models of a published file.")] = Path("presets/sdxl.yaml"),
) -> None:
    """The published EasyRef weights → checkpoint folder; or back."""
    if not source.exists():  # before the imports that take seconds
        raise FileNotFoundError(f"{source}: no such file or checkpoint folder")
    if out.exists():
        raise ValueError(f"{out} is there already; name another, or delete it")
    from easyref.convert import convert as run

    print("\n".join(run(source, out, params, dtype, trust_pickle)))


@app.command()
def release(
    onnx: Annotated[Path | None, typer.Option(help="Folder of `python -m export`: attach its graphs to the version.")] = None,
) -> None:
    """Register the finetuned model as a new version of `easyref`; champion if it beats the champion, else challenger."""
    from easyref.registry import attach, check_graphs, gate, register

    if onnx:
        check_graphs(onnx)
    version = register(Path())
    if onnx:
        attach(Path(), version, onnx)
    made = gate(Path(), version)
    print(f"version {made.version} is {made.alias}: {made.reason}")


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="models:/easyref@champion or models:/easyref/VERSION")],
    folder: Annotated[Path, typer.Argument(help="Where to; a model that was pulled there is replaced.")],
) -> None:
    """Fetch a registered model and check its hashes."""
    from easyref.registry import pull as run

    print(f"{folder}: version {run(Path(), model, folder)}")


@app.command()
def promote(version: Annotated[str, typer.Argument(help="Its number, as `easyref release` printed it.")]) -> None:
    """Make a version the champion."""
    from easyref.registry import promote as run

    before = run(Path(), version)
    print(f"champion: version {version}" + (f", before: {before}" if before else ""))


@app.command()
def rollback() -> None:
    """Champion back to the version that the present one replaced."""
    from easyref.registry import rollback as run

    current, before = run(Path())
    print(f"champion: version {before}, before: {current}")


@app.command()
def trace(model: Annotated[str, typer.Argument(help="models:/easyref@champion or models:/easyref/VERSION")]) -> None:
    """From a registered version back to git, parameters, stages, groups, shards and licences."""
    from easyref.registry import trace as run

    print(run(Path(), model))


@app.command()
def plan(
    params: ParamsFile = PARAMS,
    tflops: Annotated[float | None, typer.Option(help="Times for a device of so many TFLOP/s, not for the one here.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="That train together, each on a device of its own.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Plain numbers: parameters, bytes, FLOP, seconds.")] = False,
) -> None:
    """What the stages would train, in how much memory and about what time; needs neither weights nor network."""
    from easyref.config import load_params

    values = load_params(params)
    from easyref.plan import report

    print(report(values, MODELS / "base", tflops, as_json, processes))


@app.command()
def preset(name: Annotated[str, typer.Argument(help="A file of presets/.")], params: ParamsFile = PARAMS) -> None:
    """Put a preset in force: copy presets/NAME.yaml to params.yaml, over what is there."""
    from easyref.config import load_params
    from easyref.records import write_bytes

    path = _preset(name)
    load_params(path)
    write_bytes(params, path.read_bytes())
    print(f"{params}: preset {name}")


def _preset(name: str) -> Path:
    path = Path("presets") / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in Path("presets").glob("*.yaml")))
        raise ValueError(f"preset {name!r}: not found; known presets here: {known or 'none (run in the project folder)'}")
    return path


def main() -> None:
    """Entry point: a wrong input or a full disk is one line on stderr and exit code 2; Ctrl-C is 130; anything else shows its trace."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if "EASYREF_DEBUG" in os.environ:
            raise
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "; make room and give the command again: what is finished is kept" if full else ""
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if isinstance(error, OSError) and error.strerror and error.filename:  # the system's: [Errno 17] File exists: 'out'
            said = f"{error.filename2 or error.filename}: {error.strerror.lower()}"
        print(f"easyref: {said}{fix}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("easyref: stopped; the same command goes on where it was", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
