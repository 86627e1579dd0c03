"""Stage `embed`: images → vectors, one table and one array a space for each piece (at most PIECE images of a shard).

A row is a part of an image: the whole, or a subject or face that a detector found. Spaces:

subject  what is drawn: whole images and subjects          Lite0's deep features, or a vision model of the hub (CLIP, DINOv2)
style    how it is drawn: whole images                     Lite0's shallow features
palette  with which colours: whole images                  Palette
text     what the caption says: whole images               MiniLM, or CLIP
face     whose face it is: faces                            ArcFace, where `embed.faces` names its files

`rows-00000.parquet` says what the rows are (`sha256, part, left, top, right, bottom, score`); `subject-00000.npy` … hold float16
vectors [rows, E], NaN where a space does not apply. A piece that is there is not made again after a kill.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from easyref.config import Embed
from easyref.data.engine import Engine, run
from easyref.data.shards import read_image
from easyref.progress import track
from easyref.records import (
    FACE_COLUMNS,
    IMAGE_COLUMNS,
    ROW_COLUMNS,
    atomic_folder,
    read_table,
    remove_folder,
    sha256_json,
    write_table,
)

Array = np.ndarray[Any, np.dtype[Any]]
SPACES = ("subject", "style", "palette", "text", "face")
SCHEMA = dict(zip(ROW_COLUMNS, (pl.String, pl.String, *[pl.Int32] * 4, pl.Float32), strict=True))
PIECE = 512  # images
Piece = tuple[pl.DataFrame, Path]  # rows of images.parquet, and the folder for what is made of them


@dataclass(frozen=True)
class Box:
    """A part of an image, in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    score: float = 1.0

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Face:
    box: Box
    vector_E: Array  # whose face it is, of unit length


@dataclass(frozen=True)
class Extractors:
    """What the vectors are made with."""

    images: Callable[[Sequence[Image.Image]], dict[str, Array]]  # → subject, style and palette, each [n, E]
    texts: Callable[[Sequence[str]], Array]  # → [n, E]
    subjects: Callable[[Sequence[Image.Image]], list[list[Box]]] | None = None
    crops: Callable[[Sequence[Image.Image]], Array] | None = None  # of subjects → [n, E], as `images` gives it
    faces: Callable[[Sequence[Image.Image]], list[list[Face]]] | None = None


Make = Callable[[Embed], Extractors]


def embed(p: Embed, images: Path, out: Path, work: Path, engine: Engine = "local", make: Make | None = None) -> dict[str, int]:
    """Write the vectors of all images in `images` to `out`; returns how many rows of each part.

    `engine`: data/engine.py. The files do not depend on it, nor on `p.workers`: a piece is always made by one thread.
    """
    table = read_table(images / "images.parquet", IMAGE_COLUMNS).sort("shard", "offset")
    pieces = [shard[i : i + PIECE] for shard in table.partition_by("shard", maintain_order=True) for i in range(0, len(shard), PIECE)]
    parts = [work.absolute() / f"{number:05d}-{_key(piece, p)[:16]}" for number, piece in enumerate(pieces)]
    todo = [(piece, part) for piece, part in zip(pieces, parts, strict=True) if not part.exists()]
    made = run(partial(embed_piece, images=images.absolute(), p=p, make=make), todo, p.workers, engine)
    try:
        for _ in track(made, "embed", len(todo), "pieces"):
            pass
    except BrokenExecutor as error:
        fix = "it may have been out of memory: lower embed.workers or embed.batch; finished pieces are kept"
        raise ValueError(f"embed: a worker was killed; {fix}") from error
    with atomic_folder(out) as folder:
        for number, part in enumerate(parts):
            for file in sorted(part.iterdir()):
                shutil.copy(file, folder / f"{file.stem}-{number:05d}{file.suffix}")
    found = pl.concat([read_table(part / "rows.parquet", ROW_COLUMNS) for part in parts])["part"].value_counts()
    remove_folder(work)
    return dict(sorted(found.iter_rows()))


def _key(piece: pl.DataFrame, p: Embed) -> str:
    return sha256_json([p.model_dump(exclude={"workers"}), piece["sha256"].to_list(), piece["caption"].to_list()])


@cache
def _extractors(p: Embed, make: Make | None) -> Extractors:
    from easyref.data.hub import make_extractors

    return (make or make_extractors)(p)


def embed_piece(piece: Piece, images: Path, p: Embed, make: Make | None) -> None:
    """Write `rows.parquet` and an array a space, all or nothing."""
    import torch

    table, part = piece
    if part.exists():  # its worker died right after
        return
    torch.set_num_threads(1)
    extractors = _extractors(p, make)
    rows: list[tuple] = []
    vectors: dict[str, list[Array | None]] = {space: [] for space in SPACES}

    def add(sha256: str, name: str, box: Box, **of: Array | None) -> None:
        rows.append((sha256, name, box.left, box.top, box.right, box.bottom, box.score))
        for space in SPACES:
            vectors[space].append(of.get(space))

    batches = [table[i : i + p.batch] for i in range(0, len(table), p.batch)]
    decoded = _ahead(lambda batch: [read_image(images, row) for row in batch.iter_rows(named=True)], batches)
    for batch, pictures in zip(batches, decoded, strict=True):
        names = batch["sha256"].to_list()
        seen = extractors.images(pictures)
        text = extractors.texts(batch["caption"].to_list())
        for i, (name, image) in enumerate(zip(names, pictures, strict=True)):
            add(name, "image", Box(0, 0, *image.size), text=text[i], **{space: found[i] for space, found in seen.items()})
        if extractors.faces:
            for name, own in zip(names, extractors.faces(pictures), strict=True):
                for face in own:
                    add(name, "face", face.box, face=face.vector_E)
        if not (extractors.subjects and extractors.crops):
            continue
        boxes = extractors.subjects(pictures)
        crops = [(name, image, box) for name, image, own in zip(names, pictures, boxes, strict=True) for box in own]
        if crops:
            of_crops = extractors.crops([image.crop((b.left, b.top, b.right, b.bottom)) for _, image, b in crops])
            for (name, _, box), vector in zip(crops, of_crops, strict=True):
                add(name, "subject", box, subject=vector)
    with atomic_folder(part) as folder:
        write_table(folder / "rows.parquet", pl.DataFrame(rows, schema=SCHEMA, orient="row"))
        for space, found in vectors.items():
            if any(v is not None for v in found):
                width = next(len(v) for v in found if v is not None)
                stacked = np.stack([np.full(width, np.nan, np.float32) if v is None else v for v in found])
                np.save(folder / f"{space}.npy", stacked.astype(np.float16))


def _ahead(load: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """load(item) of each in turn, the next one under way meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, items[0])
        for following in [*items[1:], None]:
            ready, coming = coming, pool.submit(load, following) if following is not None else coming
            yield ready.result()


def largest_faces(folder: Path) -> pl.DataFrame:
    """Of each image that has faces the box of the largest: FACE_COLUMNS."""
    tables = [read_table(file, ROW_COLUMNS).filter(part="face") for file in sorted(folder.glob("rows-*.parquet"))]
    rows = pl.concat([pl.DataFrame(schema=SCHEMA), *tables], how="vertical_relaxed")
    return _largest(rows.sort("sha256", "left", "top", "right", "bottom")).select(FACE_COLUMNS)


def _largest(rows: pl.DataFrame) -> pl.DataFrame:
    """Of each image the row of the largest area, of equal ones the first; sorted by image."""
    area = (pl.col("right") - pl.col("left")) * (pl.col("bottom") - pl.col("top"))
    return rows.sort("sha256", -area, maintain_order=True).unique("sha256", keep="first", maintain_order=True)


def read_space(folder: Path, space: str, part: str, file: Path, largest: bool = False) -> tuple[pl.DataFrame, Array]:
    """Rows of `part` that have a finite vector in `space`, sorted by image and place, and their vectors float16 [N, E] on disk.
    `largest`: of an image only the one of the largest area."""
    tables, goods = [pl.DataFrame(schema=SCHEMA)], []
    files = sorted(folder.glob(f"{space}-*.npy"))
    arrays = [np.load(array_file, mmap_mode="r") for array_file in files]
    for array, name in zip(arrays, files, strict=True):
        table = read_table(folder / f"rows-{name.stem.rsplit('-', 1)[1]}.parquet", ROW_COLUMNS)
        if len(array) != len(table):
            raise ValueError(f"{name}: {len(array)} vectors for {len(table)} rows; run `easyref embed` again")
        good = np.flatnonzero((table["part"] == part).to_numpy())
        good = good[np.isfinite(array[good]).all(1)]
        tables.append(table[good])
        goods.append(good)
    table = pl.concat(tables, how="vertical_relaxed")
    rows = table.with_row_index().sort("sha256", "left", "top", "right", "bottom", "index")
    rows = _largest(rows) if largest else rows
    order = rows["index"].to_numpy()
    if not len(order):
        return table, np.empty((0, 1), np.float16)
    vectors = np.lib.format.open_memmap(file, "w+", np.float16, (len(order), arrays[0].shape[1]))
    place = np.full(len(table), -1)  # row as it comes → where it belongs
    place[order] = np.arange(len(order))
    done = 0
    for array, good in zip(arrays, goods, strict=True):
        here = place[done : done + len(good)]
        vectors[here[here >= 0]] = array[good[here >= 0]]
        done += len(good)
    return table[order], vectors
