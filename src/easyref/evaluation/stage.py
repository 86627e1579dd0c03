"""Stages `evaluate` and `mrbench`: the finetuned model on held-out and held-in samples → metrics, report and the grid.

`evaluate` draws what the registry must know: right, shuffled and no references. `mrbench` comes after it, finds those images and adds
every baseline. So a release does not wait for baselines, and they do not depend on what is released.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from easyref import pipeline
from easyref.config import Params
from easyref.data.shards import ImageStore
from easyref.evaluation import baselines, generations, protocols
from easyref.evaluation.evaluate import EVALUATE, evaluate
from easyref.evaluation.generations import Generate, Painter
from easyref.evaluation.grid import grid_png, grid_rows
from easyref.evaluation.judges import Similarity
from easyref.evaluation.mrbench import mrbench
from easyref.evaluation.protocols import Protocol, dreambench, single
from easyref.evaluation.report import write_report
from easyref.evaluation.summary import summary
from easyref.model import reference
from easyref.model.weights import WEIGHTS
from easyref.pipeline import EasyRef
from easyref.progress import use_threads
from easyref.records import read_table, sha256_file, sha256_json, write_json

STAGE = "finetune_multi"
CODE = [Path(inspect.getfile(module)) for module in (pipeline, generations, baselines)]
DRAWS = [*CODE, *sorted(Path(reference.__file__).parent.glob("*.py"))]
#: (base pipeline, params.mrbench.lora, params.evaluate, seed) → the painter's `Generate`; see training/group_lora.py.
Tune = Callable[..., Generate]


class Place:
    """What both stages read: the model, the samples, the images."""

    def __init__(self, params: Params, data: Path, models: Path, stage: str = STAGE) -> None:
        self.params, self.data, self.models, self.checkpoint = params, data, models, models / stage
        self.store = ImageStore(data / "images")
        self.images = self.store.table.join(read_table(data / "split" / "images.parquet", ("sha256", "split")), on="sha256")
        self.samples = read_table(data / "split" / "samples.parquet")

    @cached_property
    def easyref(self) -> EasyRef:
        return EasyRef.from_pretrained(self.checkpoint, base=self.models)

    @cached_property
    def base_pipe(self) -> Any:
        """The base pipeline without EasyRef."""
        return EasyRef.base_pipeline(self.checkpoint, base=self.models)

    @cached_property
    def hashes(self) -> dict[str, list[str]]:
        """Of what every image depends on, and of the checkpoint."""
        shared = [*sorted((self.models / "base").rglob("*.safetensors")), *DRAWS]
        return {"base": [sha256_file(file) for file in shared], "easyref": [sha256_file(self.checkpoint / WEIGHTS)]}

    def painter(self, make: Callable[[], Generate], *made_with: Any) -> Painter:
        """`make` is called at the first image that is not there. Its images depend on `made_with`, the base models, the code that draws
        and the settings."""
        p, drawn = self.params.evaluate, list[Generate]()

        def draw(requests: list[generations.Request]) -> list[Any]:
            if not drawn:
                drawn.append(make())
            return drawn[0](requests)

        return Painter(draw, [*self.hashes["base"], p.steps, p.guidance, p.scale, *made_with])

    def ours(self, make: Callable[[EasyRef], Generate]) -> Painter:
        """One that draws with the checkpoint."""
        return self.painter(lambda: make(self.easyref), *self.hashes["easyref"])

    def together(self) -> dict[str, Painter]:
        return {"together": self.ours(lambda easyref: baselines.together(easyref, self.params.evaluate))}


def evaluate_stage(params: Params, data: Path, models: Path, out: Path, work: Path) -> None:
    """`metrics/evaluate.json` and `reports/grid.png` of the checkpoint of stage 3."""
    print(use_threads(params.threads))
    p, place = params.evaluate, Place(params, data, models)
    found = evaluate(EVALUATE, place.samples, place.images, place.store.image, place.together(), p, seed=params.seed, out=work)
    write_json(out / "metrics" / "evaluate.json", found.result)
    rows = grid_rows(found.cases["held_out"], found.images, place.store.image, max(1, p.grid_rows // 3))
    if rows:
        grid_png(rows, out / "reports" / "grid.png")
    print(summary(out))


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
    painters["copy"] = Painter(baselines.copy, "copy")
    groups = read_table(data / "split" / "groups.parquet")
    found = mrbench(
        place.samples, place.images, groups, place.store.image, painters, p, drawing, seed=params.seed, out=work,
        similarity=similarity(params),
    )  # fmt: skip
    write_json(out / "metrics" / "mrbench.json", found.result)
    write_report(found, place.store.image, out / "reports" / "evaluation.html", about(place, painters))
    print(summary(out))


def protocol_bench(
    params: Params, protocol: Protocol, folder: Path | None, count: int, data: Path, models: Path, out: Path, work: Path
) -> dict[str, Any]:
    """`evaluate` on the samples of another protocol, in the form of `metrics/evaluate.json`, to the file `out`."""
    print(use_threads(params.threads))
    place = Place(params, data, models)
    samples = (dreambench if protocol == "dreambench" else single)(place.images, place.store.image, folder)
    found = evaluate(
        protocols.COMPARISON, samples.samples, samples.images, samples.load, place.together(), params.evaluate, seed=params.seed,
        out=work / protocol, limits={protocol: count}, similarity=similarity(params),
    )  # fmt: skip
    write_json(out, found.result)
    return found.result


def about(place: Place, painters: dict[str, Painter]) -> dict[str, str]:
    """What stands at the end of the report: how to make it again, and hashes of what it was made with."""
    split = place.data / "split"
    return {
        "command": "dvc repro mrbench",
        "checkpoint": f"models/{STAGE}/{WEIGHTS} {place.hashes['easyref'][0]}",
        "samples": sha256_file(split / "samples.parquet"),
        "images": sha256_json(sorted(place.images["sha256"])),
        "references in training": str(place.params.finetune_multi.max_references),
        **{f"drawing: {name}": sha256_json(painter.made_with) for name, painter in painters.items()},
    }


def similarity(params: Params) -> list[Similarity]:
    """The configured models, loaded."""
    from easyref.data.hub import ArcFace, HubImages, HubTexts

    p, found = params.mrbench, []
    if p.clip:
        found.append(Similarity("clip", HubImages(p.clip), HubTexts(p.clip, 32)))
    if p.dino:
        found.append(Similarity("dino", HubImages(p.dino), None))
    if p.face:
        found.append(Similarity("face", ArcFace(Path(p.face)), None))
    return found
