"""What judges generated images: features of real images, evaluators fitted on the training split, models of the hub.

Inside: Lite0 features, style and tone probes, concept centres, a dual encoder (probes.py). Configured (`mrbench.similarity`): CLIP,
DINOv2, ArcFace, each a `Similarity`. Evaluators see the training split only, and the generator never sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image

from easyref.data.captions import SHARED, caption
from easyref.data.extractors import Lite0, MiniLM
from easyref.evaluation import metrics
from easyref.evaluation.features import BLOCK, real_features
from easyref.evaluation.generations import Case, Images, Load
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
from easyref.records import sha256_json

Array = np.ndarray[Any, np.dtype[Any]]

#: Mean squared error on 0..1 under which two 64-px images count as copies (a root of 10 %). 5 % of the real
#: subject groups and 0.5 % of the others hold a pair that close: siblings among the sets.
COPY_THRESHOLD = 0.01
COPY_SIDE = 64
METRICS = ("fidelity", "reference_fidelity", "style", "tone", "concept", "text_alignment")


@dataclass(frozen=True)
class Similarity:
    """Cosines in the space of one model, as the paper has them (method.md §5): `NAME_i` of image and target, and, if it reads texts,
    `NAME_t` of image and prompt. The ceiling of `NAME_i` is the target against the references."""

    name: str
    images: Callable[[Sequence[Image.Image]], Array]
    texts: Callable[[Sequence[str]], Array] | None
    batch: int = 16

    @property
    def metrics(self) -> tuple[str, ...]:
        return (f"{self.name}_i", f"{self.name}_t") if self.texts else (f"{self.name}_i",)

    def scores(self, made: Sequence[Path], cases: Sequence[Case], load: Load) -> dict[str, Array]:
        return self._with_text(self._unit(open_image, made), cases, self._targets(cases, load))

    def ceiling(self, cases: Sequence[Case], load: Load) -> dict[str, Array]:
        targets = self._targets(cases, load)
        found = self._with_text(targets, cases, targets)
        for i, case in enumerate(cases):
            found[f"{self.name}_i"][i] = (self._unit(load, case.right) @ targets[i]).mean()
        return found

    def _with_text(self, made_NE: Array, cases: Sequence[Case], targets_NE: Array) -> dict[str, Array]:
        found = {f"{self.name}_i": (made_NE * targets_NE).sum(1)}
        if self.texts:
            found[f"{self.name}_t"] = (made_NE * metrics.unit(self.texts([c.prompt for c in cases]), np.zeros(()))).sum(1)
        return found

    def _targets(self, cases: Sequence[Case], load: Load) -> Array:
        return self._unit(load, [case.target for case in cases])

    def _unit(self, load: Callable[[Any], Image.Image], names: Sequence[Any]) -> Array:
        """Unit vectors [N, E] of the images of these names, of which no more than a batch are in memory."""
        parts = [self.images([load(name) for name in names[i : i + self.batch]]) for i in range(0, len(names), self.batch)]
        return metrics.unit(np.concatenate(parts), np.zeros(()))


class RealImages:
    """Features of every real image, deep [N, 1280] and shallow [N, 160], by sha256 (features.py)."""

    def __init__(self, images: pl.DataFrame, load: Load, kept: Path, embedded: Path) -> None:
        self.table, self.load = images, load
        self.index = {sha: i for i, sha in enumerate(images["sha256"])}
        self.extractor = Lite0()
        self.deep, self.shallow = real_features(list(self.index), load, self.extractor, kept, embedded)
        self.train = self.of_split("train")
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


class Judge:
    """All evaluators together, fitted on the training split."""

    def __init__(self, real: RealImages, splits: Sequence[str], seed: int, cache: Path, similarity: Sequence[Similarity] = ()) -> None:
        self.real, self.splits, self.similarity = real, splits, similarity
        self.embed = MiniLM(threads=torch.get_num_threads())
        self.metrics = (*METRICS, *(name for model in similarity for name in model.metrics))
        self.probes, self.dual = self._evaluators(seed, cache)
        self.concept = {split: self._concepts(split) for split in splits}
        self._features: dict[Path, tuple[Array, Array]] = {}

    def features(self, paths: Sequence[Path]) -> tuple[Array, Array]:
        """Deep [N, 1280] and shallow [N, 160] of generated images, each computed once."""
        new = [path for path in dict.fromkeys(paths) if path not in self._features]
        for block in (new[i : i + BLOCK] for i in range(0, len(new), BLOCK)):
            both = self.real.extractor.both([open_image(path) for path in block])
            self._features |= {path: pair for path, *pair in zip(block, *both, strict=True)}  # type: ignore[misc]
        deep, shallow = zip(*(self._features[path] for path in paths), strict=True)
        return np.stack(deep), np.stack(shallow)

    def scores(self, cases: Sequence[Case], images: Images, methods: Sequence[str]) -> dict[str, dict[str, Array]]:
        """metric -> method (and `ceiling`) -> [N]; NaN where a metric is not defined for a sample."""
        columns: dict[str, dict[str, Array]] = {name: {} for name in self.metrics}
        if not cases:
            return {}
        targets = self.real.rows([c.target for c in cases])
        references = [self.real.deep[self.real.rows(c.right)] for c in cases]
        texts = self.embed([c.prompt for c in cases])
        for method in (*methods, "ceiling"):
            paths = [] if method == "ceiling" else [images[c, method] for c in cases]
            deep, shallow = self.features(paths) if paths else (self.real.deep[targets], self.real.shallow[targets])
            found = self._score(deep, shallow, targets, references, texts, cases[0].split)
            for model in self.similarity:
                load = self.real.load
                found |= model.scores(paths, cases, load) if paths else model.ceiling(cases, load)
            for name, values in found.items():
                columns[name][method] = values
        # A real target is identical to itself: the ceiling of fidelity is a real image against the other real members.
        columns["fidelity"]["ceiling"] = columns["reference_fidelity"]["ceiling"]
        return columns

    def copying(self, cases: Sequence[Case], images: Images, methods: Sequence[str]) -> dict[str, dict[str, float]] | None:
        """`metrics.copying` of the images of every method, and of the real targets."""
        if not cases:
            return None
        references = [self.real.pixels(self.real.rows(c.right)) for c in cases]
        targets = self.real.pixels(self.real.rows([c.target for c in cases]))
        made = {m: np.stack([_small(open_image(images[c, m])) for c in cases]) for m in methods}
        pixels = self.real.train_pixels
        blocks = [pixels[i : i + 512] for i in range(0, len(pixels), 512)]
        return {
            name: metrics.copying(shown, references, targets, blocks, COPY_THRESHOLD)
            for name, shown in {**made, "real": targets}.items()
        }

    def distribution(self, cases: Sequence[Case], images: Images, methods: Sequence[str]) -> dict[str, dict[str, float]] | None:
        """FID and KID of the images of every method against the real targets, on Lite0's deep features."""
        if len(cases) < 2:
            return None
        targets = self.real.deep[self.real.rows([c.target for c in cases])]
        made = {m: self.features([images[c, m] for c in cases])[0] for m in methods}
        return {name: {"fid": metrics.fid(deep, targets), "kid": metrics.kid(deep, targets)} for name, deep in made.items()}

    def trust(self) -> dict[str, Any]:
        """What every evaluator reaches on real images it was not fitted on: how far to believe it."""
        split = next(s for s in self.splits if len(self.real.of_split(s)))
        rows = self.real.of_split(split)
        styles, tones, concepts, captions = (self.real.labels(n, rows) for n in ("style", "tone", "concept", "caption"))
        style, tone, concept = np.array(styles), np.array(tones), np.array(concepts)
        shallow, some = self.real.shallow[rows], _some(len(rows))
        right_style, right_tone = self._right("style", shallow, style), self._right("tone", shallow, tone)
        right_concept = self._right_concept(self.real.deep[rows], style, concept, split)
        image, text = self.dual.images(self.real.deep[rows]), self.dual.texts(self._texts(captions))
        return {
            "split": split,
            "images": len(rows),
            "same_concept_auc": roc_auc(self.real.deep[rows[some]], concept[some], style[some], self.real.mean_E),
            "style": _accuracy(right_style, _most_frequent(style[style != ""])),
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
            "style": self._right("style", shallow, style),
            "tone": self._right("tone", shallow, tone),
            "concept": self._right_concept(deep, style, concept, split),
            "text_alignment": self.dual.alignment(deep, texts),
        }

    def _right(self, name: str, shallow: Array, labels: Array) -> Array:
        """1 right, 0 wrong, NaN where the target has no such label, or training images of one only."""
        if name not in self.probes:
            return np.full(len(labels), np.nan)
        return np.where(labels == "", np.nan, self.probes[name].predict(shallow) == labels)

    def _right_concept(self, deep: Array, style: Array, concept: Array, split: str) -> Array:
        """1 right, 0 wrong, NaN where the concept has no real image in another style."""
        probe = self.concept[split]
        found = np.full(len(concept), np.nan)
        if probe is None:
            return found
        possible = np.array([s in probe.centres and c in probe.candidates(s) for c, s in zip(concept, style, strict=True)])
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

    def _evaluators(self, seed: int, cache: Path) -> tuple[dict[str, LinearProbe], DualEncoder]:
        real, train = self.real, self.real.train
        labels = {name: np.array(real.labels(name, train)) for name in ("style", "tone")}
        rows, texts = self._captions()
        seen = [real.extractor.name, real.extractor.size, real.table["sha256"].gather(train.tolist()).to_list()]
        key = sha256_json([*seen, *(values.tolist() for values in labels.values()), texts, seed])
        found: dict[str, Any] = {}
        if cache.exists():
            found, about = load_evaluators(cache)
            found = found if about.get("key") == key else {}
        if not found:
            found["dual"] = fit_dual(real.deep, self._texts(texts), rows, seed=seed)
            for name, values in labels.items():
                if len(set(values[values != ""])) > 1:
                    found[name] = fit_linear(real.shallow[train[values != ""]], values[values != ""])
            save_evaluators(cache, found, {"key": key, "images": len(train)})
        dual = found.pop("dual")
        return found, dual

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
