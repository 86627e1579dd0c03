"""Stage `evaluate`: the finetuned model on held-out and held-in samples → metrics and the grid.

It draws what the registry must know: right, shuffled and no references. The stage `mrbench` comes after it, finds those images and adds
every baseline, so that a release does not wait for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from easyref import pipeline
from easyref.config import Params
from easyref.data.shards import ImageStore
from easyref.evaluation import baselines, generations
from easyref.evaluation.evaluate import EVALUATE, evaluate
from easyref.evaluation.generations import Generate, Painter
from easyref.evaluation.grid import grid_png, grid_rows
from easyref.evaluation.summary import summary
from easyref.model import reference
from easyref.model.weights import WEIGHTS
from easyref.pipeline import EasyRef
from easyref.progress import use_threads
from easyref.records import read_table, sha256_file, write_json, write_table

STAGE = "finetune_multi"
CODE = [Path(inspect.getfile(module)) for module in (pipeline, generations, baselines)]
DRAWS = [*CODE, *sorted(Path(reference.__file__).parent.glob("*.py"))]


class Place:
    """What both stages read: the model, the samples, the images."""

    def __init__(self, params: Params, data: Path, models: Path, stage: str = STAGE) -> None:
        self.params, self.data, self.models, self.checkpoint = params, data, models, models / stage
        self.store, self.embedded = ImageStore(data / "images"), data / "embeddings"
        self.images = self.store.table.join(read_table(data / "split" / "images.parquet", ("sha256", "split")), on="sha256")
        self.samples = read_table(data / "split" / "samples.parquet")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.params.evaluate.precision == "bf16" else torch.float32

    def _pipe(self) -> Any:
        """The base pipeline under DDIM, as the paper draws (method.md §3). SDXL comes with Euler's scheduler: its noise is of another
        scale than the UNet was trained with, and after a drawing it adds none at all, so no LoRA could be tuned with it."""
        from diffusers import DDIMScheduler

        pipe = EasyRef.base_pipeline(self.checkpoint, base=self.models, dtype=self.dtype)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe

    @cached_property
    def easyref(self) -> EasyRef:
        return EasyRef.attach(self._pipe(), self.checkpoint, base=self.models, dtype=self.dtype)

    @cached_property
    def base_pipe(self) -> Any:
        """The base pipeline without EasyRef."""
        return self._pipe()

    @cached_property
    def hashes(self) -> dict[str, list[str]]:
        """Of what every image depends on, and of the checkpoint."""
        shared = [*sorted((self.models / "base").rglob("*.safetensors")), *DRAWS]
        return {"base": [sha256_file(file) for file in shared], "easyref": [sha256_file(self.checkpoint / WEIGHTS)]}

    def painter(self, make: Callable[[], Generate], *made_with: Any) -> Painter:
        """Its images depend on `made_with`, the base models, the code that draws and the settings."""
        p = self.params.evaluate
        return Painter(make, [*self.hashes["base"], p.steps, p.guidance, p.scale, p.precision, *made_with])

    def ours(self, make: Callable[[EasyRef], Generate]) -> Painter:
        """One that draws with the checkpoint."""
        return self.painter(lambda: make(self.easyref), *self.hashes["easyref"])

    def together(self) -> dict[str, Painter]:
        return {"together": self.ours(lambda easyref: baselines.together(easyref, self.params.evaluate))}


def evaluate_stage(params: Params, data: Path, models: Path, out: Path, work: Path) -> None:
    """`metrics/evaluate.json` and `reports/grid.png` of the checkpoint of stage 3."""
    print(use_threads(params.threads))
    p, place = params.evaluate, Place(params, data, models)
    found = evaluate(
        EVALUATE, place.samples, place.images, place.store.image, place.together(), p, seed=params.seed, out=work,
        embedded=place.embedded,
    )  # fmt: skip
    found.result["settings"]["checkpoint"] = place.hashes["easyref"][0]  # the registry takes figures of these weights only
    write_table(work / "scores.parquet", found.table())
    write_json(out / "metrics" / "evaluate.json", found.result)
    rows = grid_rows(found.cases["held_out"], found.images, place.store.image, max(1, p.grid_rows // 3))
    if rows:
        grid_png(rows, out / "reports" / "grid.png")
    print(summary(out))
