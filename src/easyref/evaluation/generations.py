"""What evaluate asks the generator for, and what it keeps: three images a sample, paired by seed.

right      the sample's own references
shuffled   as many references of another group of the same kind, one that shows something else
none       no reference, only the prompt

Each image is `<out>/<condition>/<sample_id>.png`; `<out>/keys.json` records what it was made from, so that a run that
was cut off goes on and a changed seed, prompt, reference, weight or setting makes the image again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl
from PIL import Image

from easyref.images import ImageError, open_image, to_png
from easyref.progress import bar
from easyref.records import SAMPLE_COLUMNS, read_json, sha256_json, write_bytes, write_json

CONDITIONS = ("right", "shuffled", "none")
#: By kind, what shuffled references must not have in common with the target.
MUST_DIFFER = {"subject": ("concept",), "person": ("style", "gender", "tone"), "style": ("style",)}

Load = Callable[[str], Image.Image]
Request = dict[str, Any]  # prompt: str, references: list of PIL images (may be empty), seed: int
Generate = Callable[[list[Request]], list[Image.Image]]


@dataclass(frozen=True)
class Case:
    """One sample with everything its three images are made from; images are named by sha256."""

    sample_id: str
    group_id: str
    kind: str
    split: str
    target: str
    prompt: str
    seed: int
    right: tuple[str, ...]
    shuffled: tuple[str, ...]
    none: tuple[str, ...] = ()

    def references(self, condition: str) -> tuple[str, ...]:
        return {"right": self.right, "shuffled": self.shuffled, "none": self.none}[condition]


def select_cases(samples: pl.DataFrame, images: pl.DataFrame, limits: dict[str, int], seed: int) -> tuple[list[Case], list[str]]:
    """The first `limits[split]` samples of each split in a seeded order that takes turns between the kinds and, within
    a kind, between the groups. Also one line for each sample that cannot be used."""
    missing = [c for c in SAMPLE_COLUMNS if c not in samples.columns]
    if missing:
        raise ValueError(f"samples table: column(s) {', '.join(missing)} missing; run the split stage again")
    labels = {row["sha256"]: row for row in images.iter_rows(named=True)}
    cases, problems = [], []
    for split, limit in limits.items():
        rows = samples.filter(pl.col("split") == split).sort("sample_id").to_dicts()
        known = [row for row in rows if {row["target"], *row["references"]} <= labels.keys() and row["references"]]
        known_ids = {row["sample_id"] for row in known}
        problems += [
            f"sample {row['sample_id']}: no references, or an image missing in the images table; run split again"
            for row in rows
            if row["sample_id"] not in known_ids
        ]
        for row in _take_turns(known, seed)[:limit]:
            try:
                cases.append(_case(row, known, labels, seed))
            except ValueError as error:
                problems.append(str(error))
    return cases, problems


def make_images(
    cases: Sequence[Case], load: Load, generate: Generate, out: Path, made_with: Any, batch: int
) -> tuple[list[Case], list[str]]:
    """Make what is missing. Returns the cases whose three images are there, and one line for each that failed.

    `made_with` (JSON-able: weights hash, sampler settings) is part of every image's key.
    """
    keys_file = out / "keys.json"
    keys = read_json(keys_file) if keys_file.exists() else {}
    wanted = {(case, condition): _key(case, condition, made_with) for case in cases for condition in CONDITIONS}
    pending = [job for job, key in wanted.items() if keys.get(_name(*job)) != key or not _readable(out / _name(*job))]
    problems: dict[Case, str] = {}
    with bar(len(wanted), "generate", initial=len(wanted) - len(pending)) as progress:
        for start in range(0, len(pending), batch):
            jobs = pending[start : start + batch]
            made, broken = _run(jobs, load, generate)
            for job, image in made.items():
                write_bytes(out / _name(*job), to_png(image))
                keys[_name(*job)] = wanted[job]
            if made:
                write_json(keys_file, keys)
            for (case, condition), reason in broken.items():
                problems.setdefault(case, f"sample {case.sample_id} ({condition}): {reason}")
            progress.update(len(jobs))
    for line in problems.values():
        print(line, file=sys.stderr)
    return [case for case in cases if case not in problems], list(problems.values())


def image_path(out: Path, case: Case, condition: str) -> Path:
    return out / _name(case, condition)


def _take_turns(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Round robin: first one sample of each group, and within that one of each kind in turn."""
    rows = random.Random(f"{seed}:order").sample(rows, len(rows))
    groups: dict[str, int] = {}
    kinds: dict[tuple[int, str], int] = {}
    order = []
    for row in rows:
        turn = groups[row["group_id"]] = groups.get(row["group_id"], -1) + 1
        place = kinds[turn, row["kind"]] = kinds.get((turn, row["kind"]), -1) + 1
        order.append((turn, place, row["kind"]))
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: order[i])]


def _case(row: dict[str, Any], rows: list[dict[str, Any]], labels: dict[str, dict[str, Any]], seed: int) -> Case:
    return Case(
        **{name: row[name] for name in ("sample_id", "group_id", "kind", "split", "target", "prompt")},
        seed=int(sha256_json([seed, row["sample_id"]])[:8], 16) // 2,
        right=tuple(row["references"]),
        shuffled=_shuffled(row, rows, labels, seed),
    )


def _shuffled(row: dict[str, Any], rows: list[dict[str, Any]], labels: dict[str, dict[str, Any]], seed: int) -> tuple[str, ...]:
    """As many references as the sample has, from the first other group in a seeded order that has enough of them; from
    several other groups where none has. Never the target, never one of the right references."""
    if row["kind"] not in MUST_DIFFER:
        raise ValueError(f"sample {row['sample_id']}: unknown kind {row['kind']!r}; known: {', '.join(MUST_DIFFER)}")

    def shared(other: dict[str, Any]) -> tuple[str, ...]:
        return tuple(labels[other["target"]][name] for name in MUST_DIFFER[row["kind"]])

    taken = {row["target"], *row["references"]}
    donors = {
        other["group_id"]: tuple(sha for sha in other["references"] if sha not in taken)
        for other in rows
        if other["kind"] == row["kind"] and other["group_id"] != row["group_id"] and shared(other) != shared(row)
    }
    order = random.Random(f"{seed}:{row['sample_id']}").sample(sorted(donors), len(donors))
    count = len(row["references"])
    enough = [group for group in order if len(donors[group]) >= count][:1] or order
    found = tuple(dict.fromkeys(sha for group in enough for sha in donors[group]))[:count]
    if len(found) < count:
        raise ValueError(f"sample {row['sample_id']}: other {row['kind']} groups have not {count} references; evaluate more groups")
    return found


def _run(
    jobs: list[tuple[Case, str]], load: Load, generate: Generate
) -> tuple[dict[tuple[Case, str], Image.Image], dict[tuple[Case, str], str]]:
    """One call for the batch; if that fails, one call a job, so that a broken sample costs only itself."""
    requests, broken = {}, {}
    for job in jobs:
        try:
            requests[job] = _request(*job, load)
        except Exception as error:  # whatever a loader raises for a broken image
            broken[job] = _one_line(error)
    try:
        return dict(zip(requests, _checked(generate, list(requests.values())), strict=True)), broken
    except Exception as error:
        if len(requests) == 1:
            return {}, broken | dict.fromkeys(requests, _one_line(error))
    made: dict[tuple[Case, str], Image.Image] = {}
    for job, request in requests.items():
        try:
            made[job] = _checked(generate, [request])[0]
        except Exception as error:
            broken[job] = _one_line(error)
    return made, broken


def _request(case: Case, condition: str, load: Load) -> Request:
    references = [load(sha) for sha in case.references(condition)]
    return {"prompt": case.prompt, "references": references, "seed": case.seed}


def _checked(generate: Generate, requests: list[Request]) -> list[Image.Image]:
    if not requests:
        return []
    images = generate(requests)
    if len(images) != len(requests) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"generate returned {len(images)} image(s) for {len(requests)} request(s), or something else")
    return [image.convert("RGB") for image in images]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _name(case: Case, condition: str) -> str:
    return f"{condition}/{quote(case.sample_id, safe='')}.png"


def _key(case: Case, condition: str, made_with: Any) -> str:
    return sha256_json([case.seed, case.prompt, case.references(condition), made_with])


def _readable(path: Path) -> bool:
    try:
        open_image(path)
    except ImageError:
        return False
    return True
