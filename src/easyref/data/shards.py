"""Append-only tar shards (webdataset form: one member an image, named by its hash) and random access by offset.

A shard is an ordinary tar file; `offset`/`size` in images.parquet point at the member's bytes, so a reader seeks instead
of scanning. Headers are normalised (no times, no owners), so the same images give the same bytes.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image

from easyref.images import open_image
from easyref.records import IMAGE_COLUMNS, atomic_path, read_table, sha256_bytes


def write_shard(path: Path, images: list[bytes], suffixes: Sequence[str] | None = None) -> list[dict]:
    """Write one tar shard; returns per image `sha256, shard, offset, size` in the given order. `suffixes`: of each (png)."""
    rows = []
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for data, suffix in zip(images, suffixes or ["png"] * len(images), strict=True):
            digest = sha256_bytes(data)
            info = tarfile.TarInfo(f"{digest}.{suffix}")
            info.size = len(data)
            offset = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(data))
            rows.append({"sha256": digest, "shard": path.name, "offset": offset, "size": len(data)})
    return rows


def read_bytes(folder: Path, row: Mapping[str, Any]) -> bytes:
    """The encoded image of a row of images.parquet, checked against its hash."""
    with open(folder / row["shard"], "rb") as file:
        file.seek(row["offset"])
        data = file.read(row["size"])
    if sha256_bytes(data) != row["sha256"]:
        raise ValueError(f"{folder / row['shard']}: bytes of {row['sha256']} do not match its hash; run `dvc checkout`")
    return data


def read_image(folder: Path, row: Mapping[str, Any]) -> Image.Image:
    return open_image(read_bytes(folder, row), name=row["sha256"])


class ImageStore:
    """The images of a folder with `images.parquet` and its shards, by sha256."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.table = read_table(self.folder / "images.parquet", IMAGE_COLUMNS)
        self.rows: dict[str, dict] = {row["sha256"]: row for row in self.table.iter_rows(named=True)}

    def bytes(self, sha256: str) -> bytes:
        """The encoded image, checked against its hash."""
        row = self.rows.get(sha256)
        if row is None:
            raise ValueError(f"{self.folder}: no image {sha256}; run `dvc repro ingest` or `dvc pull`")
        return read_bytes(self.folder, row)

    def image(self, sha256: str) -> Image.Image:
        return open_image(self.bytes(sha256), name=sha256)

    def select(self, sha256s: list[str]) -> pl.DataFrame:
        """Rows of the table in the order of `sha256s`."""
        return pl.DataFrame([self.rows[s] for s in sha256s], schema=self.table.schema)
