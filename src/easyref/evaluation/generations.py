"""What an evaluation asks for, and what it keeps: one image a sample and method, paired by seed and prompt.

A `Method` says which references a sample is given (its own, as many of another group of the same kind that shows something else, or
none) and how they are read; a `Painter` draws for one way of reading. Each image is a file named by its seed and the hashes of its
prompt and of all it was made from: a run that was cut off goes on, evaluations share what they have in common, and a changed seed,
prompt, reference, weight or setting makes an image anew.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl
from PIL import Image

from easyref.data.captions import SHARED, caption
from easyref.images import ImageError, open_image, to_png
from easyref.progress import bar
from easyref.records import SAMPLE_COLUMNS, sha256_json, write_bytes

#: By kind, what shuffled references must not have in common with the target. Other kinds: only the group.
MUST_DIFFER = {"subject": ("concept",), "person": ("style", "gender", "tone"), "style": ("style",)}

Load = Callable[[str], Image.Image]
#: prompt: str, references: list of PIL images (may be empty), captions: a prompt for each of the sample's own, seed: int
Request = dict[str, Any]
Generate = Callable[[list[Request]], list[Image.Image]]


@dataclass(frozen=True)
class Method:
    """One column of the tables."""

    name: str
    references: Literal["right", "shuffled", "none"] = "right"
    reading: str = "together"  # which painter


@dataclass(frozen=True)
class Painter:
    """`load` is called when an image is not there. `made_with` (JSON-able: weights, settings) is what images depend on beside the
    request."""

    load: Callable[[], Generate]
    made_with: Any


#: Of `easyref evaluate`.
CONDITIONS = (Method("right"), Method("shuffled", "shuffled"), Method("none", "none"))


@dataclass(frozen=True)
class Case:
    """One sample with everything its images are made from; images are named by sha256."""

    sample_id: str
    group_id: str
    kind: str
    split: str
    target: str
    prompt: str
    seed: int
    right: tuple[str, ...]
    shuffled: tuple[str, ...]
    captions: tuple[str, ...]  # of `right`, as the prompt is made

    def references(self, method: Method) -> tuple[str, ...]:
        return {"right": self.right, "shuffled": self.shuffled, "none": ()}[method.references]


Images = dict[tuple[Case, str], Path]  # by case and method


def select_cases(samples: pl.DataFrame, images: pl.DataFrame, limits: dict[str, int], seed: int) -> tuple[list[Case], list[str]]:
    """The first `limits[split]` samples of each split in a seeded order that takes turns between the kinds and, within
    a kind, between the groups. Also one line for each sample that cannot be used."""
    missing = [c for c in SAMPLE_COLUMNS if c not in samples.columns]
    if missing:
        raise ValueError(f"samples table: column(s) {', '.join(missing)} missing; run the split stage again")
    labels = {row["sha256"]: {"colors": "", **row} for row in images.iter_rows(named=True)}
    cases, problems = [], []
    for split, limit in limits.items():
        rows = samples.filter(pl.col("split") == split).sort("sample_id").to_dicts()
        whole = {row["sample_id"]: _missing(row, labels) for row in rows}
        problems += [f"sample {name}: {what}; run split again" for name, what in whole.items() if what]
        known = [row for row in rows if not whole[row["sample_id"]]]
        for row in _take_turns(known, seed)[:limit]:
            try:
                cases.append(_case(row, known, labels, seed))
            except ValueError as error:
                problems.append(str(error))
    return cases, problems


def _missing(row: dict[str, Any], labels: Mapping[str, Any]) -> str:
    if not row["references"]:
        return "its group is empty, no references"
    if not (row["prompt"] or "").strip():
        return "no prompt"
    lost = [sha for sha in (row["target"], *row["references"]) if sha not in labels]
    return f"image {lost[0][:12]} missing in the images table" if lost else ""


def make_images(
    cases: Sequence[Case], methods: Sequence[Method], load: Load, painters: Mapping[str, Painter], out: Path, batch: int
) -> tuple[Images, list[str]]:
    """Make what is missing. Returns the images of the cases that have one of every method, and one line for each other case."""
    wanted = {(case, m): out / _name(case, m, painters[m.reading].made_with) for m in methods for case in cases}
    pending: dict[str, list[tuple[Case, Method]]] = {}
    for job, path in wanted.items():
        if not _readable(path):
            pending.setdefault(job[1].reading, []).append(job)
    problems: dict[Case, str] = {}
    with bar(len(wanted), "generate", initial=len(wanted) - sum(map(len, pending.values()))) as progress:
        for reading, jobs in pending.items():
            draw = painters[reading].load()  # what fails here is no sample's fault: it ends the run, once
            for start in range(0, len(jobs), batch):
                part = jobs[start : start + batch]
                made, broken = _run(part, load, draw)
                for job, image in made.items():
                    write_bytes(wanted[job], to_png(image))
                for (case, method), reason in broken.items():
                    problems.setdefault(case, f"sample {case.sample_id} ({method.name}): {reason}")
                progress.update(len(part))
    for line in problems.values():
        print(line, file=sys.stderr)
    return {(case, method.name): path for (case, method), path in wanted.items() if case not in problems}, list(problems.values())


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
        captions=tuple(caption(labels[sha], hide={*SHARED.get(row["kind"], ()), "colors"}) for sha in row["references"]),
    )


def _shuffled(row: dict[str, Any], rows: list[dict[str, Any]], labels: dict[str, dict[str, Any]], seed: int) -> tuple[str, ...]:
    """As many references as the sample has, from the first other group in a seeded order that has enough of them; from
    several other groups where none has. Never the target, never one of the right references."""
    names = MUST_DIFFER.get(row["kind"], ())

    def alike(other: dict[str, Any]) -> bool:
        own, theirs = ([labels[r["target"]][name] for name in names] for r in (row, other))
        return any(own) and own == theirs

    taken = {row["target"], *row["references"]}
    donors = {
        other["group_id"]: tuple(sha for sha in other["references"] if sha not in taken)
        for other in rows
        if other["kind"] == row["kind"] and other["group_id"] != row["group_id"] and not alike(other)
    }
    order = random.Random(f"{seed}:{row['sample_id']}").sample(sorted(donors), len(donors))
    count = len(row["references"])
    enough = [group for group in order if len(donors[group]) >= count][:1] or order
    found = tuple(dict.fromkeys(sha for group in enough for sha in donors[group]))[:count]
    if len(found) < count:
        raise ValueError(f"sample {row['sample_id']}: other {row['kind']} groups have not {count} references; evaluate more groups")
    return found


def _run(
    jobs: list[tuple[Case, Method]], load: Load, generate: Generate
) -> tuple[dict[tuple[Case, Method], Image.Image], dict[tuple[Case, Method], str]]:
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
    made: dict[tuple[Case, Method], Image.Image] = {}
    for job, request in requests.items():
        try:
            made[job] = _checked(generate, [request])[0]
        except Exception as error:
            broken[job] = _one_line(error)
    return made, broken


def _request(case: Case, method: Method, load: Load) -> Request:
    references, captions = [load(sha) for sha in case.references(method)], case.captions if method.references == "right" else ()
    return {"prompt": case.prompt, "references": references, "captions": captions, "seed": case.seed}


def _checked(generate: Generate, requests: list[Request]) -> list[Image.Image]:
    if not requests:
        return []
    images = generate(requests)
    if len(images) != len(requests) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"generate returned {len(images)} image(s) for {len(requests)} request(s), or something else")
    return [image.convert("RGB") for image in images]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _name(case: Case, method: Method, made_with: Any) -> str:
    references = case.references(method)
    captions = case.captions if method.references == "right" else ()
    key = sha256_json([case.seed, case.prompt, references, captions, method.reading, made_with])
    return f"{method.reading}/{case.seed}-{sha256_json(case.prompt)[:8]}-{key[:24]}.png"


def _readable(path: Path) -> bool:
    try:
        open_image(path)
    except ImageError:
        return False
    return True
