"""Protocols besides MRBench, each no more than a list of samples that `evaluate` takes.

single      one reference, its caption (the paper's COCO table): every image is its own reference. The folder's images have their
            caption in `NAME.txt` beside them; without a folder, the held-out images of the split.
dreambench  one subject in new places (DreamBench, arXiv 2208.12242): `FOLDER/SUBJECT/*` are images of a subject, the lines of
            `FOLDER/prompts.txt` are prompts with `{}` where its name comes: the folder's name without what follows a digit or `_`.
            One sample for each subject and prompt; the first image is the reference and what is drawn is compared with it.

An image that cannot be read is one line and left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import polars as pl

from easyref.evaluation.evaluate import IMAGE_LABELS, Comparison
from easyref.evaluation.generations import Load, Method
from easyref.images import FORMATS, ImageError, open_image
from easyref.records import SAMPLE_COLUMNS, sha256_file

Protocol = Literal["single", "dreambench"]
COMPARISON = Comparison((Method("easyref"), Method("text_only", "none"), Method("shuffled", "shuffled")), "easyref", "text_only")
SUFFIXES = {f".{name.lower()}" for name in FORMATS} | {".jpg", ".tif"}


class Collection:
    """Samples of a protocol, their images as rows beside those of the training split (an image of both is the protocol's), and a `load`
    for both."""

    def __init__(self, protocol: Protocol, images: pl.DataFrame, load: Load) -> None:
        self.protocol, self._load = protocol, load
        self.train = images.filter(pl.col("split") == "train")
        self.rows: dict[str, dict[str, str]] = {}
        self.paths: dict[str, Path] = {}
        self._samples: list[dict[str, Any]] = []

    def add(self, path: Path, **labels: str) -> str | None:
        """The image's sha256, if it can be read."""
        try:
            open_image(path)
        except ImageError as error:
            print(f"left out: {error}", file=sys.stderr)
            return None
        sha = sha256_file(path)
        self.paths[sha] = path
        self.rows[sha] = dict.fromkeys(IMAGE_LABELS, "") | {"sha256": sha, "split": self.protocol, **labels}
        return sha

    def sample(self, name: str, group: str, prompt: str, target: str, references: list[str]) -> None:
        values = (name, group, "subject", self.protocol, target, references, prompt)
        self._samples.append(dict(zip(SAMPLE_COLUMNS, values, strict=True)))

    @property
    def samples(self) -> pl.DataFrame:
        if not self._samples:
            raise ValueError(f"{self.protocol}: no sample; see `easyref bench {self.protocol} --help` for what the folder must hold")
        return pl.DataFrame(self._samples)

    @property
    def images(self) -> pl.DataFrame:
        train = self.train.filter(~pl.col("sha256").is_in(list(self.rows)))
        return pl.concat([train.select(IMAGE_LABELS), pl.DataFrame(list(self.rows.values())).select(IMAGE_LABELS)])

    def load(self, sha: str) -> Any:
        return open_image(self.paths[sha]) if sha in self.paths else self._load(sha)


def single(images: pl.DataFrame, load: Load, folder: Path | None) -> Collection:
    found = Collection("single", images, load)
    if folder is None:
        for row in images.filter(pl.col("split") == "held_out").sort("sha256").iter_rows(named=True):
            found.rows[row["sha256"]] = {name: row[name] for name in IMAGE_LABELS} | {"split": "single"}
    for path in _images(folder) if folder else ():
        text = path.with_suffix(".txt")
        if not text.is_file():
            print(f"left out: {path}: no caption; write it to {text.name} beside it", file=sys.stderr)
        else:
            found.add(path, caption=text.read_text().strip(), concept=path.stem)
    for sha, row in found.rows.items():
        found.sample(f"single-{sha[:12]}", sha, row["caption"], sha, [sha])
    return found


def dreambench(images: pl.DataFrame, load: Load, folder: Path | None) -> Collection:
    if folder is None:
        raise ValueError("dreambench: name its folder; the split has no such images")
    file = folder / "prompts.txt"
    if not file.is_file():
        raise ValueError(f"{file}: no prompts; write one a line, with {{}} where the subject's name comes")
    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if wrong := [prompt for prompt in prompts if "{}" not in prompt]:
        raise ValueError(f"{file}: {wrong[0]!r} has no {{}} for the subject's name; put it in")
    found = Collection("dreambench", images, load)
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        name = re.split(r"[\d_]", place.name)[0].strip() or place.name
        own = [sha for path in _images(place) if (sha := found.add(path, caption=name, concept=place.name, subject=name))]
        if not own:
            print(f"left out: {place}: no image that can be read", file=sys.stderr)
        for number, prompt in enumerate(prompts if own else ()):
            found.sample(f"{place.name}-{number}", place.name, prompt.replace("{}", name), own[0], own[:1])
    return found


def _images(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
