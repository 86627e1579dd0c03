"""Protocols besides MRBench, each no more than a list of samples that `evaluate` takes.

single      one reference, its caption (the paper's COCO table): every image is its own reference. The folder's images have their
            caption in `NAME.txt` beside them; without a folder, the held-out images of the split.
dreambench  one subject in new places (DreamBench, arXiv 2208.12242): `FOLDER/SUBJECT/*` are images of a subject, the lines of
            `FOLDER/prompts.txt`, or of a subject's own `prompts.txt`, are prompts with `{}` where its name comes. Names stand in
            `FOLDER/classes.txt` as in the table that DreamBench publishes (`colorful_sneaker,sneaker`); a subject that is not there,
            or without the file, is called as its folder, without digits at the end (`red_ball2`: red ball).
            One sample for each subject and prompt; the first image is the reference and what is drawn is compared with it.

An image or a caption that cannot be read is one line and left out.
"""

from __future__ import annotations

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
        beside = path.with_suffix(".txt")
        try:
            if text := _text(beside):
                found.add(path, caption=text, concept=path.stem)
            else:
                print(f"left out: {path}: no caption; write it to {beside.name} beside it", file=sys.stderr)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    for sha, row in found.rows.items():
        found.sample(f"single-{sha[:12]}", sha, row["caption"], sha, [sha])
    return found


def dreambench(images: pl.DataFrame, load: Load, folder: Path | None) -> Collection:
    if folder is None:
        raise ValueError("dreambench: name its folder; the split has no such images")
    places = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    shared = _prompts(folder / "prompts.txt")
    prompts_of = {place: _prompts(place / "prompts.txt") or shared for place in places}
    if lacking := [place for place, prompts in prompts_of.items() if not prompts]:
        raise ValueError(f"{lacking[0]}: no prompts; write prompts.txt, one a line, with {{}} where the subject's name comes")
    names = dict(line.split(",", 1) for line in _text(folder / "classes.txt").splitlines() if "," in line)
    found = Collection("dreambench", images, load)
    for place, prompts in prompts_of.items():
        name = (names.get(place.name) or place.name.rstrip("0123456789").replace("_", " ")).strip() or place.name
        own = [sha for path in _images(place) if (sha := found.add(path, caption=name, concept=place.name, subject=name))]
        if not own:
            print(f"left out: {place}: no image that can be read", file=sys.stderr)
        for number, prompt in enumerate(prompts if own else ()):
            found.sample(f"{place.name}-{number}", place.name, prompt.replace("{}", name), own[0], own[:1])
    return found


def _prompts(file: Path) -> list[str]:
    prompts = [line.strip() for line in _text(file).splitlines() if line.strip()]
    if wrong := [prompt for prompt in prompts if "{}" not in prompt]:
        raise ValueError(f"{file}: {wrong[0]!r} has no {{}} for the subject's name; put it in")
    return prompts


def _text(file: Path) -> str:
    """Of a file; nothing if there is none."""
    try:
        return file.read_text("utf-8-sig").strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); save it as UTF-8") from error


def _images(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
