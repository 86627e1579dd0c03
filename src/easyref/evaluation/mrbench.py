"""MRBench with all baselines (method.md §5, §7), and what only costs drawing: variety over seeds, more and more references.

`metrics/mrbench.json` has the form of `metrics/evaluate.json`; its methods are the rows of the paper's tables, at our scale.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from easyref.config import Evaluate, MRBench
from easyref.data.captions import SHARED, caption
from easyref.evaluation import metrics
from easyref.evaluation.evaluate import Comparison, Evaluated, evaluate, summary
from easyref.evaluation.generations import Case, Images, Load, Method, Painter, make_images
from easyref.evaluation.judges import Similarity

#: Cases and methods → their images.
Draw = Callable[[Sequence[Case], Sequence[Method]], Images]

COMPARISON = Comparison(
    (
        Method("easyref"),
        Method("text_only", "none"),
        Method("shuffled", "shuffled"),
        Method("average", reading="average"),
        Method("concatenation", reading="concatenation"),
        Method("lora", reading="lora"),
        Method("copy", reading="copy"),
    ),
    own="easyref",
    floor="text_only",
    by=("by_kind", "by_references"),
)
COUNTED = Comparison((Method("easyref"), Method("average", reading="average")), own="easyref", floor=None, by=())


def mrbench(
    samples: pl.DataFrame,
    images: pl.DataFrame,
    groups: pl.DataFrame,
    load: Load,
    painters: Mapping[str, Painter],
    p: MRBench,
    drawing: Evaluate,
    *,
    seed: int,
    out: Path,
    embedded: Path,
    similarity: Sequence[Similarity] = (),
) -> Evaluated:
    """`evaluate` with all methods; the result has `distribution`, `diversity` and `counts` besides.

    Args: as of `evaluate`, and
        groups: `records.GROUP_COLUMNS`, for samples with more references than those of `samples` have.
    """
    found = evaluate(COMPARISON, samples, images, load, painters, drawing, seed=seed, out=out, embedded=embedded, similarity=similarity)
    names = COMPARISON.names
    found.result["distribution"] = {s: found.judge.distribution(cases, found.images, names) for s, cases in found.cases.items()}

    def draw(cases: Sequence[Case], methods: Sequence[Method]) -> Images:
        made, problems = make_images(cases, methods, load, painters, out, drawing.batch)
        found.result["samples"]["failures"] += problems
        found.result["samples"]["failed"] += len(problems)
        return made

    found.result["diversity"] = _diversity(found, draw, p, drawing.bootstrap, seed)
    found.result["counts"] = _counts(found, draw, _large_cases(images, groups, p, seed), p, drawing.bootstrap, seed)
    found.result["settings"] |= p.model_dump()
    return found


def _diversity(found: Evaluated, draw: Draw, p: MRBench, resamples: int, seed: int) -> dict[str, Any] | None:
    """`metrics.diversity` of the first held-out samples drawn with `p.seeds` seeds, by method, with intervals; of the samples' real
    images, target and references, too."""
    chosen, methods = found.cases["held_out"][: p.seed_samples], COMPARISON.methods[:2]
    variants = {case: [case, *(replace(case, seed=case.seed + n) for n in range(1, p.seeds))] for case in chosen}
    made = draw([v for vs in variants.values() for v in vs], methods)
    whole = [case for case, vs in variants.items() if all((v, methods[0].name) in made for v in vs)]
    if not whole:
        return None
    real = found.judge.real
    features = {m.name: [found.judge.features([made[v, m.name] for v in variants[case]])[0] for case in whole] for m in methods}
    features["real"] = [real.deep[real.rows([case.target, *case.right])] for case in whole]
    groups = [case.group_id for case in whole]
    return {
        **{
            name: metrics.bootstrap_mean(metrics.diversity(f, real.mean_E), groups, seed=seed, resamples=resamples)
            for name, f in features.items()
        },
        "seeds": p.seeds,
        "samples": len(whole),
    }


def _counts(found: Evaluated, draw: Draw, cases: list[Case], p: MRBench, resamples: int, seed: int) -> dict[str, Any] | None:
    """The same held-out samples with 1, 2, 4 … of their references: number of references → metric → entry of the table."""
    if not cases:
        print(f"counts: no held-out group has {max(p.counts) + 1} images; left out (mrbench.counts)")
        return None
    images: dict[int, Images] = {}  # by count: of the case with all its references, beside which all are judged
    for count in p.counts:
        fewer = {replace(case, right=case.right[:count], captions=case.captions[:count]): case for case in cases}
        images[count] = {(fewer[case], m): path for (case, m), path in draw(list(fewer), COUNTED.methods).items()}
    done = [case for case in cases if all((case, COUNTED.own) in drawn for drawn in images.values())]
    if not done:
        print("counts: no sample could be drawn with every number of references; left out")
        return None
    entries = {}
    for count, drawn in images.items():
        scores = found.judge.scores(done, drawn, COUNTED.names)
        entries[str(count)] = summary(COUNTED, done, scores, found.judge.metrics, resamples, seed)
    return entries


def _large_cases(images: pl.DataFrame, groups: pl.DataFrame, p: MRBench, seed: int) -> list[Case]:
    """`p.count_samples` samples with max(p.counts) references, from the held-out groups that are large enough, in turn."""
    labels = {row["sha256"]: {"colors": "", **row} for row in images.iter_rows(named=True)}
    most, cases = max(p.counts), []
    large = groups.filter((pl.col("split") == "held_out") & (pl.col("members").list.len() > most)).sort("group_id").to_dicts()
    drawn = [random.Random(f"{seed}:counts:{g['group_id']}").sample(g["members"], len(g["members"])) for g in large]
    for number in range(p.count_samples if large else 0):
        turn, which = divmod(number, len(large))
        group, members = large[which], drawn[which]
        if turn >= len(members):
            continue
        target, hidden = members[turn], {*SHARED.get(group["kind"], ()), "colors"}
        references = tuple([m for m in members if m != target][:most])
        prompts = [caption(labels[sha], hide=hidden) for sha in (target, *references)]
        cases.append(
            Case(
                f"counts-{group['kind']}-{target[:12]}", group["group_id"], group["kind"], "held_out", target, prompts[0],
                seed=int(np.random.default_rng([seed, number]).integers(2**31)), right=references, shuffled=(),
                captions=tuple(prompts[1:]),
            )
        )  # fmt: skip
    return cases
