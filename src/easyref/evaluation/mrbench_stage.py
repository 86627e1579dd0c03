"""Stage `mrbench`: every method on the samples of `evaluate` → metrics and report; and the other protocols, on folders."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from easyref.config import Params
from easyref.evaluation import baselines, protocols
from easyref.evaluation.evaluate import evaluate
from easyref.evaluation.generations import Generate, Painter
from easyref.evaluation.grid import draw_grid, grid_row
from easyref.evaluation.judges import Similarity
from easyref.evaluation.mrbench import mrbench
from easyref.evaluation.protocols import Protocol, dreambench, single
from easyref.evaluation.report import METHOD, write_report
from easyref.evaluation.stage import Place
from easyref.evaluation.summary import summary
from easyref.images import to_png
from easyref.model.weights import WEIGHTS
from easyref.progress import use_threads
from easyref.records import read_table, sha256_file, sha256_json, write_bytes, write_json, write_table

ROWS = 12  # of a protocol's picture
PICTURE = {
    "single": "Single: the reference is the target; the first samples of the seeded order",
    "dreambench": "DreamBench: one subject, several prompts; the first samples of the seeded order",
}
#: (base pipeline, params.mrbench.lora, params.evaluate, seed) → the painter's `Generate`; see training/group_lora.py.
Tune = Callable[..., Generate]


def mrbench_stage(params: Params, data: Path, models: Path, out: Path, work: Path, tune: Tune) -> None:
    """`metrics/mrbench.json` and `reports/evaluation.html`: every method on the samples of `evaluate`."""
    print(use_threads(params.threads))
    p, drawing, place = params.mrbench, params.evaluate, Place(params, data, models)
    painters = place.together()
    painters |= {r: place.ours(partial(baselines.joined, p=drawing, reading=r)) for r in baselines.JOIN}
    code = sha256_file(inspect.getfile(tune))
    painters["lora"] = place.painter(
        lambda: tune(place.base_pipe, p.lora, drawing, params.seed), p.lora.model_dump(), params.seed, code
    )
    painters["copy"] = Painter(lambda: baselines.copy, "copy")
    groups = read_table(data / "split" / "groups.parquet")
    found = mrbench(
        place.samples, place.images, groups, place.store.image, painters, p, drawing, seed=params.seed, out=work,
        embedded=place.embedded, similarity=similarity(params),
    )  # fmt: skip
    write_table(work / "scores.parquet", found.table())
    write_json(out / "metrics" / "mrbench.json", found.result)
    emoji = params.ingest.source == "emoji"
    write_report(found, place.store.image, out / "reports" / "evaluation.html", about(place, painters), emoji)
    print(summary(out))


def protocol_bench(
    params: Params, protocol: Protocol, folder: Path | None, count: int, data: Path, models: Path, out: Path, work: Path
) -> dict[str, Any]:
    """`evaluate` on the samples of another protocol, in the form of `metrics/evaluate.json`, to the file `out`; a picture beside it."""
    print(use_threads(params.threads))
    place = Place(params, data, models)
    samples = (dreambench if protocol == "dreambench" else single)(place.images, place.store.image, folder)
    found = evaluate(
        protocols.COMPARISON, samples.samples, samples.images, samples.load, place.together(), params.evaluate, seed=params.seed,
        out=work, embedded=place.embedded, limits={protocol: count}, similarity=similarity(params),
    )  # fmt: skip
    write_table(work / f"scores-{protocol}.parquet", found.table())
    write_json(out, found.result)
    shown = found.cases[protocol][:ROWS]
    rows = [grid_row(PICTURE[protocol], case, found.images, samples.load, protocols.COMPARISON.names) for case in shown]
    heads = [METHOD[name][0] for name in protocols.COMPARISON.names]
    write_bytes(out.with_suffix(".png"), to_png(draw_grid(rows, heads)))
    return found.result


def about(place: Place, painters: dict[str, Painter]) -> dict[str, str]:
    """What stands at the end of the report: how to make it again, and hashes of what it was made with."""
    split = place.data / "split"
    return {
        "command": "dvc repro mrbench",
        "checkpoint": f"{place.checkpoint / WEIGHTS} {place.hashes['easyref'][0]}",
        "samples": sha256_file(split / "samples.parquet"),
        "images": sha256_json(sorted(place.images["sha256"])),
        **{f"drawing: {name}": sha256_json(painter.made_with) for name, painter in painters.items()},
    }


def similarity(params: Params) -> list[Similarity]:
    """The configured models, loaded."""
    from easyref.data.faces import ArcFace
    from easyref.data.hub import HubImages, HubTexts

    p, found = params.mrbench, []
    if p.clip:
        found.append(Similarity("clip", HubImages(p.clip), HubTexts(p.clip, 32)))
    if p.dino:
        found.append(Similarity("dino", HubImages(p.dino), None))
    if p.face:
        found.append(Similarity("face", ArcFace(Path(p.face), "mrbench.face"), None))
    return found
