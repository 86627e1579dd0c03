"""Do the references help? Each sample is made with the right, with shuffled and without references, and compared.

The question is the paper's MRBench (method.md §5) at nano scale, on groups of concepts never seen in training
(`held_out`) and on groups seen in training (`held_in`). Beside every number stands the ceiling: what a real image of
the group scores. Evaluators see the training split only, and the generator never sees them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from easyref.config import Evaluate
from easyref.data.captions import SHARED, caption
from easyref.data.extractors import Lite0, MiniLM
from easyref.evaluation import metrics
from easyref.evaluation.generations import CONDITIONS, Case, Generate, Load, image_path, make_images, select_cases
from easyref.evaluation.probes import (
    ConceptProbe,
    DualEncoder,
    LinearProbe,
    fit_dual,
    fit_linear,
    load_evaluators,
    retrieval,
    roc_auc,
    save_evaluators,
)
from easyref.images import open_image
from easyref.progress import track
from easyref.records import atomic_path, sha256_json, write_table

Array = np.ndarray[Any, np.dtype[Any]]

METRICS = ("fidelity", "reference_fidelity", "style", "tone", "concept", "text_alignment")
SPLITS = ("held_out", "held_in")
IMAGE_LABELS = ("sha256", "concept", "subject", "gender", "tone", "style", "caption", "split")
#: Mean squared error on 0..1 under which two 64-px images count as copies (a root of 10 %). 5 % of the real
#: subject groups and 0.5 % of the others hold a pair that close: siblings among the sets.
COPY_THRESHOLD = 0.01
COPY_SIDE = 64


def evaluate(
    samples: pl.DataFrame,
    images: pl.DataFrame,
    load: Load,
    generate: Generate,
    params: Evaluate,
    *,
    seed: int,
    weights: str,
    out: Path,
) -> dict[str, Any]:
    """Generate, score and summarise; the returned dict is `metrics/evaluate.json`.

    Args:
        samples: `records.SAMPLE_COLUMNS`; splits train, held_in, held_out.
        images: at least `IMAGE_LABELS`, one row an image.
        load: sha256 -> image.
        generate: a list of {prompt, references, seed} -> as many images; `references` is [] for text only.
        weights: a hash of everything that decides an image beside prompt, references, seed and `params`.
        out: where images, features, evaluators and `scores.parquet` (one row a sample, condition) are kept.

    Raises:
        ValueError: a column is missing, or no sample could be generated.
    """
    _check(images)
    limits = {"held_out": params.held_out_samples, "held_in": params.held_in_samples}
    cases, unusable = select_cases(samples, images, limits, seed)
    made_with = [weights, params.steps, params.guidance, params.scale]
    finished, broken = make_images(cases, load, generate, out, made_with, params.batch)
    if not finished:
        reason = (unusable + broken + ["the table has no held_out or held_in sample"])[0]
        raise ValueError(f"evaluate: none of {len(samples)} samples could be used; first reason: {reason}")

    real = RealImages(images, load, out / "features.safetensors")
    judge = Judge(real, seed, out / "evaluators.safetensors")
    done = {split: [case for case in finished if case.split == split] for split in SPLITS}
    scores = {split: judge.scores(done[split], out) for split in SPLITS}
    write_table(out / "scores.parquet", pl.concat([_score_table(done[split], scores[split]) for split in SPLITS]))
    return {
        **{split: _summary(done[split], scores[split], params.bootstrap, seed) for split in SPLITS},
        "copying": {split: judge.copying(done[split], out) for split in SPLITS},
        "samples": {
            **{split: _count(done[split]) for split in SPLITS},
            "failed": len(unusable + broken),
            "failures": unusable + broken,
        },
        "extractor_trust": judge.trust(),
        "settings": {"seed": seed, "weights": weights, **params.model_dump()},
    }


def _check(images: pl.DataFrame) -> None:
    """Before any work: what would otherwise fail after hours of generating."""
    missing = [c for c in IMAGE_LABELS if c not in images.columns]
    if missing:
        raise ValueError(f"images table: column(s) {', '.join(missing)} missing; join the split stage's table first")
    found = set(images["split"].unique())
    if "train" not in found or not found & set(SPLITS):
        raise ValueError(f"images table: splits are {sorted(found)}; needs train and {' or '.join(SPLITS)}; run split again")


class RealImages:
    """Features of every real image, computed once and kept: deep [N, 1280], shallow [N, 160], by sha256."""

    def __init__(self, images: pl.DataFrame, load: Load, cache: Path) -> None:
        self.table, self.load = images, load
        self.index = {sha: i for i, sha in enumerate(images["sha256"])}
        self.extractor = Lite0()
        self.key = sha256_json([self.extractor.name, self.extractor.size, list(self.index)])
        self.deep, self.shallow = self._cached(cache)
        self.train = np.flatnonzero((images["split"] == "train").to_numpy())
        self.mean_E = self.deep[self.train].mean(0)

    def rows(self, shas: Sequence[str]) -> Array:
        return np.array([self.index[sha] for sha in shas], int)

    def labels(self, name: str, rows: Array) -> list[str]:
        return self.table[name].gather(rows.tolist()).to_list()

    def of_split(self, split: str) -> Array:
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def pixels(self, rows: Array) -> Array:
        shas = self.table["sha256"].gather(rows.tolist())
        return np.stack([_small(self.load(sha)) for sha in shas])

    @cached_property
    def train_pixels(self) -> Array:
        return self.pixels(self.train)

    def _cached(self, path: Path) -> tuple[Array, Array]:
        from safetensors import safe_open
        from safetensors.numpy import save_file

        if path.exists():
            with safe_open(path, "numpy") as file:
                if (file.metadata() or {}).get("key") == self.key:
                    return file.get_tensor("deep").astype(np.float32), file.get_tensor("shallow").astype(np.float32)
        blocks = [self.extractor.both([self.load(s) for s in shas]) for shas in self._progress()]
        deep, shallow = (np.concatenate(parts).astype(np.float16) for parts in zip(*blocks, strict=True))
        with atomic_path(path) as temporary:
            save_file({"deep": deep, "shallow": shallow}, temporary, {"key": self.key})
        return deep.astype(np.float32), shallow.astype(np.float32)

    def _progress(self) -> Iterator[list[str]]:
        shas, size = list(self.index), 256
        blocks = (shas[i : i + size] for i in range(0, len(shas), size))
        return track(blocks, "features of the real images", -(-len(shas) // size), f"blocks of {size} images")


class Judge:
    """All evaluators together, fitted on the training split."""

    def __init__(self, real: RealImages, seed: int, cache: Path) -> None:
        self.real, self.embed = real, MiniLM()
        self.style, self.tone, self.dual = self._evaluators(seed, cache)
        self.concept = {split: self._concepts(split) for split in SPLITS}

    def scores(self, cases: list[Case], out: Path) -> dict[str, dict[str, Array]]:
        """metric -> condition (and `ceiling`) -> [N]; NaN where a metric is not defined for a sample."""
        if not cases:
            return {}
        columns: dict[str, dict[str, Array]] = {name: {} for name in METRICS}
        targets = self.real.rows([c.target for c in cases])
        references = [self.real.deep[self.real.rows(c.right)] for c in cases]
        texts = self.embed([c.prompt for c in cases])
        for condition in (*CONDITIONS, "ceiling"):
            if condition == "ceiling":
                deep, shallow = self.real.deep[targets], self.real.shallow[targets]
            else:
                deep, shallow = self.real.extractor.both([open_image(image_path(out, c, condition)) for c in cases])
            for name, values in self._score(deep, shallow, targets, references, texts, cases[0].split).items():
                columns[name][condition] = values
        # A real target is identical to itself: the ceiling of fidelity is a real image against the other real members.
        columns["fidelity"]["ceiling"] = columns["reference_fidelity"]["ceiling"]
        return columns

    def copying(self, cases: list[Case], out: Path) -> dict[str, dict[str, float]] | None:
        """`metrics.copying` of the images with the right references, of those without any, and of the real targets."""
        if not cases:
            return None
        references = [self.real.pixels(self.real.rows(c.right)) for c in cases]
        targets = self.real.pixels(self.real.rows([c.target for c in cases]))
        made = {k: np.stack([_small(open_image(image_path(out, c, k))) for c in cases]) for k in ("right", "none")}
        pixels = self.real.train_pixels
        blocks = [pixels[i : i + 512] for i in range(0, len(pixels), 512)]
        return {
            name: metrics.copying(images, references, targets, blocks, COPY_THRESHOLD)
            for name, images in {**made, "real": targets}.items()
        }

    def trust(self) -> dict[str, Any]:
        """What every evaluator reaches on real images it was not fitted on: how far to believe it."""
        split = next(s for s in SPLITS if len(self.real.of_split(s)))
        rows = self.real.of_split(split)
        styles, tones, concepts, captions = (self.real.labels(n, rows) for n in ("style", "tone", "concept", "caption"))
        style, tone, concept = np.array(styles), np.array(tones), np.array(concepts)
        shallow, some = self.real.shallow[rows], _some(len(rows))
        right_tone = self._right_tone(shallow, tone)
        right_concept = self._right_concept(self.real.deep[rows], style, concept, split)
        image, text = self.dual.images(self.real.deep[rows]), self.dual.texts(self._texts(captions))
        return {
            "split": split,
            "images": len(rows),
            "same_concept_auc": roc_auc(self.real.deep[rows[some]], concept[some], style[some], self.real.mean_E),
            "style": _accuracy(self.style.predict(shallow) == style, _most_frequent(style)),
            "tone": _accuracy(right_tone, _most_frequent(tone[tone != ""])),
            "concept": _accuracy(right_concept, 1 / len(set(concepts)), candidates=len(set(concepts))),
            "text_alignment": {
                "recall_at_1": retrieval(image, text, captions, 1),
                "recall_at_5": retrieval(image, text, captions, 5),
                "captions": len(set(captions)),
            },
        }

    def _score(
        self, deep: Array, shallow: Array, targets: Array, references: list[Array], texts: Array, split: str
    ) -> dict[str, Array]:
        style, tone, concept = (np.array(self.real.labels(name, targets)) for name in ("style", "tone", "concept"))
        return {
            "fidelity": metrics.fidelity(deep, self.real.deep[targets], self.real.mean_E),
            "reference_fidelity": metrics.reference_fidelity(deep, references, self.real.mean_E),
            "style": (self.style.predict(shallow) == style).astype(float),
            "tone": self._right_tone(shallow, tone),
            "concept": self._right_concept(deep, style, concept, split),
            "text_alignment": self.dual.alignment(deep, texts),
        }

    def _right_tone(self, shallow: Array, tone: Array) -> Array:
        """1 right, 0 wrong, NaN where the target has no skin tone."""
        if self.tone is None:
            return np.full(len(tone), np.nan)
        return np.where(tone == "", np.nan, self.tone.predict(shallow) == tone)

    def _right_concept(self, deep: Array, style: Array, concept: Array, split: str) -> Array:
        """1 right, 0 wrong, NaN where the concept has no real image in another style."""
        probe = self.concept[split]
        found = np.full(len(concept), np.nan)
        if probe is None:
            return found
        possible = np.array([c in probe.candidates(s) for c, s in zip(concept, style, strict=True)])
        found[possible] = probe.predict(deep[possible], list(style[possible])) == concept[possible]
        return found

    def _concepts(self, split: str) -> ConceptProbe | None:
        """The candidates are the concepts of the split; their centres come from all real images of those concepts."""
        wanted = set(self.real.labels("concept", self.real.of_split(split)))
        rows = np.flatnonzero(self.real.table["concept"].is_in(list(wanted)).to_numpy())
        concepts, styles = self.real.labels("concept", rows), self.real.labels("style", rows)
        if len(set(styles)) < 2:
            return None
        return ConceptProbe(self.real.deep[rows], concepts, styles, self.real.mean_E)

    def _evaluators(self, seed: int, cache: Path) -> tuple[LinearProbe, LinearProbe | None, DualEncoder]:
        real, train = self.real, self.real.train
        styles, tones = real.labels("style", train), real.labels("tone", train)
        rows, texts = self._captions()
        key = sha256_json([real.key, train.tolist(), styles, tones, texts, seed])
        found: dict[str, Any] = {}
        if cache.exists():
            found, about = load_evaluators(cache)
            found = found if about.get("key") == key else {}
        if not found:
            found = {
                "style": fit_linear(real.shallow[train], styles),
                "dual": fit_dual(real.deep, self._texts(texts), rows, seed=seed),
            }
            toned = np.flatnonzero(np.array(tones) != "")
            if len({tones[i] for i in toned}) > 1:
                found["tone"] = fit_linear(real.shallow[train[toned]], [tones[i] for i in toned])
            save_evaluators(cache, found, {"key": key, "images": len(train)})
        return found["style"], found.get("tone"), found["dual"]

    def _captions(self) -> tuple[Array, list[str]]:
        """Training pairs of the dual encoder: each image with its caption, and with the prompts the three kinds of
        sample would have for it. Rows of the images and as many texts."""
        train = self.real.train
        labels = [{**row, "colors": ""} for row in self.real.table[train.tolist()].iter_rows(named=True)]
        texts = [row["caption"] for row in labels]
        for hidden in SHARED.values():
            texts += [caption(row, hide=hidden) for row in labels]
        return np.tile(train, 1 + len(SHARED)), texts

    def _texts(self, texts: list[str]) -> Array:
        """Each distinct text is embedded once, short ones together."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        place = {text: i for i, text in enumerate(distinct)}
        return self.embed(distinct)[[place[text] for text in texts]]


def _summary(cases: list[Case], scores: dict[str, dict[str, Array]], resamples: int, seed: int) -> dict[str, Any]:
    every = _metrics_of(cases, scores, np.ones(len(cases), bool), resamples, seed)
    kinds = np.array([c.kind for c in cases])
    by_kind = {kind: _metrics_of(cases, scores, kinds == kind, resamples, seed) for kind in sorted(set(kinds.tolist()))}
    return {**every, "by_kind": by_kind}


def _metrics_of(cases: list[Case], scores: dict[str, dict[str, Array]], chosen: Array, resamples: int, seed: int) -> dict[str, Any]:
    groups = np.array([c.group_id for c in cases])
    found: dict[str, Any] = dict.fromkeys(METRICS)
    for name, columns in scores.items():
        use = chosen & np.isfinite(np.stack(list(columns.values()))).all(0)
        if use.any():
            found[name] = _metric({k: v[use] for k, v in columns.items()}, groups[use], resamples, seed)
    return found


def _metric(columns: dict[str, Array], groups: Array, resamples: int, seed: int) -> dict[str, Any]:
    """One entry of evaluate.json."""
    mean = {name: float(values.mean()) for name, values in columns.items()}

    def difference(other: str) -> metrics.Interval:
        return metrics.paired_difference(columns["right"], columns[other], groups, seed=seed, resamples=resamples)

    return {
        **mean,
        "right_minus_shuffled": difference("shuffled"),
        "right_minus_none": difference("none"),
        "covered": metrics.covered(mean["right"], mean["none"], mean["ceiling"]),
        "samples": len(groups),
        "groups": len(set(groups.tolist())),
    }


def _count(cases: list[Case]) -> dict[str, int]:
    return {"samples": len(cases), "groups": len({c.group_id for c in cases}), **Counter(c.kind for c in cases)}


def _score_table(cases: list[Case], scores: dict[str, dict[str, Array]]) -> pl.DataFrame:
    rows = []
    for i, case in enumerate(cases):
        about = [case.sample_id, case.group_id, case.kind, case.split]
        for condition in (*CONDITIONS, "ceiling"):
            values = [float(scores[name][condition][i]) for name in METRICS]
            rows.append([*about, condition, *(None if math.isnan(value) else value for value in values)])
    types: dict[str, Any] = dict.fromkeys(("sample_id", "group_id", "kind", "split", "condition"), pl.String)
    return pl.DataFrame(rows, schema=types | dict.fromkeys(METRICS, pl.Float64), orient="row")


def _accuracy(right: Array, chance: float, **about: int) -> dict[str, float] | None:
    """Accuracy over the defined (not NaN) entries, beside chance; None where none is defined."""
    defined = right[~np.isnan(right.astype(float))]
    return {"accuracy": float(defined.mean()), "chance": chance, **about} if len(defined) else None


def _most_frequent(labels: Array) -> float:
    """What always naming the most frequent class would reach."""
    return max(Counter(labels.tolist()).values(), default=0) / max(len(labels), 1)


def _some(count: int, most: int = 2000) -> Array:
    """At most `most` of `count` rows, the same ones each time: pairs grow with the square."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def _small(image: Image.Image) -> Array:
    """uint8 [64, 64, 3] for pixel distances."""
    return np.asarray(image.convert("RGB").resize((COPY_SIDE, COPY_SIDE), Image.Resampling.BOX))
