"""Stage `ingest`: images of a source → tar shards + images.parquet with captions, labels and licences.

Emoji are rendered. A heap of images (folder, tars, table, JSON) is read, checked and normalised shard by shard: a finished one is not
made again when the same command is given after a kill, and the tables do not depend on the number of workers.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.fft import dctn

from easyref.config import Ingest, Params
from easyref.data import emoji
from easyref.data.captions import GIVEN, caption
from easyref.data.check import Checked, Checker, Rejected
from easyref.data.scores import Scores
from easyref.data.shards import write_shard
from easyref.data.sources import Found, from_folder, from_table, from_tars, from_upstream
from easyref.images import Reason
from easyref.progress import track
from easyref.records import (
    FACE_COLUMNS,
    IMAGE_COLUMNS,
    REJECT_COLUMNS,
    atomic_folder,
    read_json,
    read_table,
    remove_folder,
    sha256_bytes,
    sha256_json,
    write_json,
    write_table,
)


def ingest(params: Params, out: Path, work: Path) -> dict[str, int]:
    """Write the images of `params.ingest.source` to `out`; returns counts.

    Raises:
        ValueError: a source that cannot be read, no good image, or more rejects than `limits.max_reject_share`.
    """
    if params.ingest.source == "emoji":
        return _ingest_emoji(params, out)
    return _ingest_heap(params.ingest, out, work)


def _ingest_emoji(params: Params, out: Path) -> dict[str, int]:
    pngs, rows = _emoji(params, out.parent / "sources", params.ingest.limits.workers)
    unique: dict[str, int] = {}
    for index, data in enumerate(pngs):
        unique.setdefault(sha256_bytes(data), index)
    keep, most = list(unique.values()), params.ingest.shard_images
    with atomic_folder(out) as folder:
        stored = []
        for number, start in enumerate(range(0, len(keep), most)):
            part = keep[start : start + most]
            places = write_shard(folder / f"images-{number:05d}.tar", [pngs[i] for i in part])
            stored += [{**places[j], **rows[i]} for j, i in enumerate(part)]
        write_table(folder / "images.parquet", pl.DataFrame(stored).select(IMAGE_COLUMNS))
    return {"images": len(keep), "exact_duplicates": len(pngs) - len(keep)}


def _emoji(params: Params, sources: Path, workers: int) -> tuple[list[bytes], list[dict]]:
    archives = {s: emoji.fetch(s, sources) for s in emoji.SETS}
    icons = emoji.read_icons(archives)
    size, palette = params.ingest.size, params.ingest.palette
    with ProcessPoolExecutor(workers) as pool:
        tasks = pool.map(emoji.render, icons, [size] * len(icons), [palette] * len(icons), chunksize=64)
        rendered = list(track(tasks, "render", len(icons), "images"))
    source = {s.style: f"npm:@iconify-json/{s.package}@{s.version}" for s in emoji.SETS}
    rows = []
    for icon, (_, colors) in zip(icons, rendered, strict=True):
        label = {**emoji.labels(icon), "colors": colors}
        where = f"{source[icon.style]}#{icon.name}"
        rows.append({**label, "width": size, "height": size, "caption": caption(label), "licence": icon.licence, "source": where})
    return [data for data, _ in rendered], rows


# -- a heap of images --------------------------------------------------------------------------------------------------

READERS = {"folder": from_folder, "tar": from_tars, "table": from_table, "upstream": from_upstream}
LABELS = ("concept", "subject", "gender", "tone", "style", "category", "colors")


def _ingest_heap(p: Ingest, out: Path, work: Path) -> dict[str, int]:
    place = Path(str(p.path)).expanduser()
    if not place.exists():
        raise ValueError(f"{place}: no such {p.source}; set ingest.path")
    seen = _Seen(p.limits.near_duplicate_distance)
    parts: list[Path] = []
    found, scores = READERS[p.source](place), Scores(p)
    with Checker(p.size, p.limits) as checker:
        while chunk := list(islice(found, p.shard_images)):
            part = work / f"{len(parts):05d}"
            if not _done(part, key := _key(chunk, p, seen)):
                _make_part(chunk, scores(chunk, checker(chunk)), seen, part, key)
            parts.append(part)
            seen.add(read_table(part / "images.parquet"))
    rejects = pl.concat([read_table(part / "rejects.parquet", REJECT_COLUMNS) for part in parts]) if parts else pl.DataFrame()
    reasons = Counter(rejects["reason"].to_list() if len(rejects) else [])
    faults = Counter({reason: n for reason, n in reasons.items() if reason not in ("duplicate", "near_duplicate", *p.scores)})
    bad, total = faults.total(), len(rejects) + seen.count
    if not seen.count or bad > p.limits.max_reject_share * total:
        if len(rejects):
            write_table(work / "rejects.parquet", rejects)
        why = ", ".join(f"{n} {reason}" for reason, n in (faults or reasons).most_common(3)) or "nothing was found"
        fix = f"see {work / 'rejects.parquet'}, or raise ingest.limits.max_reject_share" if len(rejects) else "set ingest.path"
        first = rejects.filter(pl.col("reason").is_in(list(faults)))["detail"].to_list()[:1] if len(rejects) else []
        raise ValueError("; ".join([f"{place}: {bad} of {total} images are not usable ({why})", *first, fix]))
    with atomic_folder(out) as folder:
        for part in parts:
            for shard in part.glob("*.tar"):
                shutil.copy(shard, folder)
        images = pl.concat([read_table(part / "images.parquet").select(*IMAGE_COLUMNS, "face") for part in parts])
        write_table(folder / "images.parquet", images.select(IMAGE_COLUMNS))
        faces = images.filter(pl.col("face").is_not_null())
        if len(faces):
            corners = [pl.col("face").list.get(i).alias(name) for i, name in enumerate(FACE_COLUMNS[1:])]
            write_table(folder / "faces.parquet", faces.select("sha256", *corners))
        write_table(folder / "rejects.parquet", rejects)
    remove_folder(work)
    return {"images": seen.count, **{f"rejected: {reason}": n for reason, n in reasons.most_common()}}


THUMBNAIL = 16 * 16 * 3
#: Coefficients that tell most pictures apart: 4 in 1,000 emoji, on their white, are in the cells of one. Another doubles the cells.
WAVES = ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 2, 0), (2, 0, 0), (0, 0, 1), (0, 0, 2))


class _Seen:
    """What earlier shards hold, for duplicates, in a database on disk that goes with it. A near duplicate has a thumbnail within
    `distance` (root mean square); none of its cosine transform's coefficients is farther than the whole, and cells of the coarsest
    say whom to compare."""

    def __init__(self, distance: float) -> None:
        self.distance, self.count = distance, 0
        self.reach = distance * math.sqrt(THUMBNAIL) + 1e-6
        self.width = max(2 * self.reach, 1.0)  # of a cell: ± reach is in two at most
        self.history = ""  # hash of it all
        self.base = sqlite3.connect("", isolation_level=None)
        self.base.execute("create table images (original text primary key, cell text, name text, thumbnail blob)")
        self.base.execute("create index cells on images (cell)")

    def add(self, table: pl.DataFrame) -> None:
        self.base.execute("begin")
        for row in table.select("original", "source", "thumbnail").iter_rows():
            self.take(*row)
        self.base.execute("commit")
        self.count += len(table)
        self.history = sha256_json([self.history, table["original"].to_list() if len(table) else []])

    def take(self, original: str, name: str, thumbnail: bytes) -> None:
        self.base.execute("insert into images values (?, ?, ?, ?)", (original, *self._cells(thumbnail, 0), name, thumbnail))

    def duplicate(self, image: Checked) -> tuple[Reason, str] | None:
        """What it is, and the name of the earlier image."""
        for (name,) in self.base.execute("select name from images where original = ?", (image.original,)):
            return "duplicate", name
        cells = sorted(self._cells(image.thumbnail, self.reach))
        there = self.base.execute(f"select rowid, thumbnail from images where cell in ({', '.join('?' * len(cells))})", cells)
        near: list[int] = []
        while some := there.fetchmany(1024):
            errors = (_pixels(b"".join(theirs for _, theirs in some)).reshape(len(some), -1) - _pixels(image.thumbnail)) ** 2
            near += [some[i][0] for i in np.flatnonzero(errors.mean(1) <= self.distance**2)]
        for (name,) in self.base.execute("select name from images where rowid = ?", (min(near, default=None),)):
            return "near_duplicate", name
        return None

    def _cells(self, thumbnail: bytes, reach: float) -> set[str]:
        """Cells within `reach` of its coefficients."""
        waves = dctn(_pixels(thumbnail).reshape(16, 16, 3), norm="ortho")  # over the colours too: light, red - blue, green
        sides = [{int(at // self.width) for at in (waves[w] - reach, waves[w] + reach)} for w in WAVES]
        return {" ".join(map(str, cell)) for cell in product(*sides)}


def _pixels(thumbnails: bytes) -> np.ndarray:
    return np.frombuffer(thumbnails, np.uint8).astype(np.float64)


def _key(chunk: list[Found], p: Ingest, seen: _Seen) -> str:
    """Hash of all that a shard depends on."""
    limits = p.limits.model_dump(exclude={"max_reject_share", "workers"})
    there = [Path(file) for file in sorted({f.file for f in chunk}) if os.path.exists(file)]
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in there]
    scores = p.model_dump(include={"scores"})
    return sha256_json([[asdict(f) for f in chunk], files, p.size, limits, scores, seen.history])


def _done(part: Path, key: str) -> bool:
    return (part / "key.json").exists() and read_json(part / "key.json") == key


def _make_part(chunk: list[Found], checked: Iterable[Checked | Rejected], seen: _Seen, part: Path, key: str) -> None:
    """Write one shard of what is good in `chunk`, with its rows and rejects, all or nothing."""
    new = _Seen(seen.distance)  # of this shard; `seen` gets it when it is whole
    good: list[tuple[Found, Checked]] = []
    rejects: list[tuple[str, str, str]] = []
    for found, result in zip(chunk, track(checked, f"ingest {part.name}", len(chunk)), strict=True):
        if isinstance(result, Rejected):
            rejects.append((found.name, result.reason, result.detail))
        elif earlier := seen.duplicate(result) or new.duplicate(result):
            reason, name = earlier
            rejects.append((found.name, reason, f"{found.name}: {reason.replace('_', ' ')} of {name}"))
        else:
            new.take(result.original, found.name, result.thumbnail)
            good.append((found, result))
    with atomic_folder(part) as folder:
        rows = []
        if good:
            shard = folder / f"images-{part.name}.tar"
            places = write_shard(shard, [image.data for _, image in good], [image.suffix for _, image in good])
            rows = [{**place, **_row(found, image)} for place, (found, image) in zip(places, good, strict=True)]
        schema: dict[str, Any] = {n: pl.Int64 if n in ("offset", "size", "width", "height") else pl.String for n in IMAGE_COLUMNS}
        schema |= {"original": pl.String, "thumbnail": pl.Binary, "face": pl.List(pl.Int32)}
        write_table(folder / "images.parquet", pl.DataFrame(rows, schema=schema))
        write_table(folder / "rejects.parquet", pl.DataFrame(rejects, schema=dict.fromkeys(REJECT_COLUMNS, pl.String), orient="row"))
        write_json(folder / "key.json", key)


def _row(found: Found, image: Checked) -> dict[str, Any]:
    """Labels of an image: the group that its source names is its concept; nothing else is known. Without a caption it is called as its
    group, never `1`, `2` …: the split keeps what is called the same on one side."""
    words = found.caption or Path(found.group).name.replace("_", " ") or Path(found.name).stem
    return {
        **dict.fromkeys(LABELS, ""), "concept": found.group or found.name, "subject": words,
        "category": GIVEN if found.group else "", "caption": words, "licence": found.licence or "unknown", "source": found.name,
        "width": image.width, "height": image.height, "original": image.original, "thumbnail": image.thumbnail,
        "face": image.face,
    }  # fmt: skip
