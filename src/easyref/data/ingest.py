"""Stage `ingest`: images of a source → tar shards + images.parquet with captions, labels and licences."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import polars as pl

from easyref.config import Params
from easyref.data import emoji
from easyref.data.captions import caption
from easyref.data.shards import write_shard
from easyref.images import open_image, to_png
from easyref.progress import track
from easyref.records import IMAGE_COLUMNS, atomic_folder, sha256_bytes, write_table

SHARD_IMAGES = 4096


def ingest(params: Params, out: Path, workers: int = 2) -> dict[str, int]:
    """Write the images of `params.ingest.source` to `out`; returns counts (images, exact duplicates)."""
    if params.ingest.source == "emoji":
        pngs, rows = _emoji(params, out.parent / "sources", workers)
    else:
        pngs, rows = _folder(params, Path(str(params.ingest.path)))
    unique: dict[str, int] = {}
    for index, data in enumerate(pngs):
        unique.setdefault(sha256_bytes(data), index)
    keep = list(unique.values())
    with atomic_folder(out) as folder:
        stored = []
        for number, start in enumerate(range(0, len(keep), SHARD_IMAGES)):
            part = keep[start : start + SHARD_IMAGES]
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


def _folder(params: Params, folder: Path) -> tuple[list[bytes], list[dict]]:
    """A folder of images; `name.txt` beside an image is its caption."""
    pngs, rows, rejected = [], [], Counter[str]()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp")):
        try:
            image = open_image(path)
        except ValueError as error:
            rejected[str(error)] += 1
            continue
        image.thumbnail((params.ingest.size, params.ingest.size))
        text = path.with_suffix(".txt").read_text().strip() if path.with_suffix(".txt").exists() else path.stem
        empty = dict.fromkeys(("gender", "tone", "style", "category", "colors"), "")
        pngs.append(to_png(image))
        rows.append(
            {**empty, "concept": path.parent.name, "subject": text, "width": image.width, "height": image.height,
             "caption": text, "licence": "unknown", "source": path.name}
        )  # fmt: skip
    for reason in rejected:
        print(f"rejected: {reason}")
    if not pngs:
        raise ValueError(f"{folder}: no image that can be read; give a folder of png, jpg, webp or bmp files")
    return pngs, rows
