"""Do the references help? Samples are drawn by several methods from the same prompt and noise, judged, and compared in pairs.

The samples are the paper's MRBench (method.md §5): leave-one-out in groups of concepts never seen in training (`held_out`) and in
groups seen in training (`held_in`); or those of another protocol (protocols.py). Beside every number stands the ceiling: what a real
image of the group scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from easyref.config import Evaluate
from easyref.evaluation import metrics
from easyref.evaluation.generations import CONDITIONS, Case, Images, Load, Method, Painter, make_images, select_cases
from easyref.evaluation.judges import Array, Judge, RealImages, Similarity
from easyref.records import sha256_json

SPLITS = ("held_out", "held_in")
MAX_FAILED = 0.1  # share of the samples; a GPU that is lost in the middle must not end in figures of its first half
IMAGE_LABELS = ("sha256", "concept", "subject", "gender", "tone", "style", "category", "caption", "split")
BY: dict[str, Callable[[Case], str]] = {"by_kind": lambda c: c.kind, "by_references": lambda c: str(len(c.right))}


@dataclass(frozen=True)
class Comparison:
    """The columns of a table: every other method is compared with `own`; `floor` is text alone, if it is among them."""

    methods: tuple[Method, ...]
    own: str
    floor: str | None
    by: tuple[str, ...] = ("by_kind",)

    @property
    def names(self) -> list[str]:
        return [method.name for method in self.methods]


#: Of the stage `evaluate`, which the registry reads.
EVALUATE = Comparison(CONDITIONS, "right", "none")


@dataclass(frozen=True)
class Evaluated:
    result: dict[str, Any]  # the JSON
    cases: dict[str, list[Case]]  # finished ones by split
    images: Images
    scores: dict[str, dict[str, dict[str, Array]]]  # split -> metric -> method -> [N]
    judge: Judge

    def table(self) -> pl.DataFrame:
        """One row a sample and method."""
        return pl.concat([_score_table(self.cases[split], scores) for split, scores in self.scores.items()], how="diagonal")


def evaluate(
    comparison: Comparison,
    samples: pl.DataFrame,
    images: pl.DataFrame,
    load: Load,
    painters: Mapping[str, Painter],
    params: Evaluate,
    *,
    seed: int,
    out: Path,
    embedded: Path,
    limits: Mapping[str, int] | None = None,
    similarity: Sequence[Similarity] = (),
) -> Evaluated:
    """Generate, score and summarise.

    Args:
        samples: `records.SAMPLE_COLUMNS`; splits train, held_in, held_out.
        images: at least `IMAGE_LABELS`, one row an image.
        load: sha256 -> image.
        painters: by the readings of the methods.
        out: where images, features and evaluators are kept, each named or marked by what it is made from: many evaluations share it.
        embedded: the folder of the stage `embed`, whose vectors need not be made again (features.py); need not be there.
        limits: how many samples of each split; None: as `params` says.

    Raises:
        ValueError: a column is missing, or too many samples could not be generated; images that were are kept.
    """
    limits = limits or {"held_out": params.held_out_samples, "held_in": params.held_in_samples}
    _check(images, list(limits))
    cases, unusable = select_cases(samples, images, dict(limits), seed)
    made, broken = make_images(cases, comparison.methods, load, painters, out, params.batch)
    if not made:
        reason = (unusable + broken + [f"the table has no {' or '.join(limits)} sample"])[0]
        raise ValueError(f"evaluate: none of {len(samples)} samples could be used; first reason: {reason}")
    if len(broken) > MAX_FAILED * len(cases):
        what = f"{len(broken)} of {len(cases)} samples could not be drawn, too many for figures of the rest"
        raise ValueError(f"evaluate: {what}; first reason: {broken[0]}")

    real = RealImages(images, load, out / "features.safetensors", embedded)
    judge = Judge(real, list(limits), seed, out / "evaluators.safetensors", similarity)
    done = {split: [c for c in cases if c.split == split and (c, comparison.own) in made] for split in limits}
    names = comparison.names
    scores = {split: judge.scores(done[split], made, names) for split in limits}
    result = {
        **{split: summary(comparison, done[split], scores[split], judge.metrics, params.bootstrap, seed) for split in limits},
        "copying": {split: judge.copying(done[split], made, names) for split in limits},
        "samples": {
            **{split: _count(done[split]) for split in limits},
            "failed": len(unusable + broken),
            "failures": unusable + broken,
        },
        "extractor_trust": judge.trust(),
        "settings": {
            "seed": seed,
            "weights": sha256_json(painters["together"].made_with),
            **params.model_dump(),
        },
    }
    return Evaluated(result, done, made, scores, judge)


def _check(images: pl.DataFrame, splits: list[str]) -> None:
    """Before any work: what would otherwise fail after hours of generating."""
    missing = [c for c in IMAGE_LABELS if c not in images.columns]
    if missing:
        raise ValueError(f"images table: column(s) {', '.join(missing)} missing; join the split stage's table first")
    found = set(images["split"].unique())
    if "train" not in found or not found & set(splits):
        raise ValueError(f"images table: splits are {sorted(found)}; needs train and {' or '.join(splits)}; run split again")


def summary(
    comparison: Comparison, cases: list[Case], scores: dict[str, dict[str, Array]], names: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """An entry of each metric over all `cases`, and tables of parts of them; metric -> None where it is not defined."""

    def table(chosen: Array) -> dict[str, Any]:
        found: dict[str, Any] = dict.fromkeys(names)
        for name, columns in scores.items():
            use = chosen & np.isfinite(np.stack(list(columns.values()))).all(0)
            if use.any():
                found[name] = _metric(comparison, {k: v[use] for k, v in columns.items()}, groups[use], resamples, seed)
        return found

    groups = np.array([c.group_id for c in cases])
    result = table(np.ones(len(cases), bool))
    for by in comparison.by:
        of = np.array([BY[by](c) for c in cases])
        result[by] = {value: table(of == value) for value in sorted(set(of.tolist()), key=lambda v: (len(v) if v.isdigit() else 0, v))}
    return result


def _metric(comparison: Comparison, columns: dict[str, Array], groups: Array, resamples: int, seed: int) -> dict[str, Any]:
    """One entry of the JSON: means, their intervals, and `own_minus_other` of every other method."""
    own = columns[comparison.own]
    differences = {f"{comparison.own}_minus_{n}": own - columns[n] for n in comparison.names if n != comparison.own}
    values = np.stack([*columns.values(), *differences.values()], 1)
    found = dict(zip([*columns, *differences], metrics.bootstrap_means(values, groups, seed=seed, resamples=resamples), strict=True))
    mean = {name: found[name]["mean"] for name in columns}
    return {
        **mean,
        **{name: found[name] for name in differences},
        "intervals": {name: [found[name]["low"], found[name]["high"]] for name in columns},
        "covered": metrics.covered(mean[comparison.own], mean[comparison.floor], mean["ceiling"]) if comparison.floor else None,
        "samples": len(groups),
        "groups": len(set(groups.tolist())),
    }


def _count(cases: list[Case]) -> dict[str, int]:
    return {"samples": len(cases), "groups": len({c.group_id for c in cases}), **Counter(c.kind for c in cases)}


def _score_table(cases: list[Case], scores: dict[str, dict[str, Array]]) -> pl.DataFrame:
    rows = []
    for i, case in enumerate(cases):
        about = [case.sample_id, case.group_id, case.kind, case.split]
        for method in next(iter(scores.values())):
            values = [float(columns[method][i]) for columns in scores.values()]
            rows.append([*about, method, *(None if math.isnan(value) else value for value in values)])
    types: dict[str, Any] = dict.fromkeys(("sample_id", "group_id", "kind", "split", "condition"), pl.String)
    return pl.DataFrame(rows, schema=types | dict.fromkeys(scores, pl.Float64), orient="row")
