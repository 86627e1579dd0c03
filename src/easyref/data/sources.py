"""Where images come from: a folder, tar shards, a table, the upstream JSON. Each gives `Found` records in a fixed order.

A record says where the bytes are, not what they are: workers read them (`check`). What must not be read is a record too, with a reason,
so that every image of the source ends as a row of images.parquet or of rejects.parquet.
"""

from __future__ import annotations

import glob
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from easyref.images import ImageError, Reason

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".heic", ".heif", ".avif", ".jxl", ".svg",  # of no format that is read, but not passed over without a word
)  # fmt: skip
NOTES = "._"  # begins what macOS writes beside a file, under the file's own suffix
MAX_SIDECAR = 2**20  # bytes of a caption or JSON beside an image
#: Columns of a table by what we call them; the first that is there counts.
COLUMNS = {
    "path": ("path", "file_name", "image_file", "image_path"),
    "caption": ("caption", "text"),
    "group": ("group",),
    "licence": ("licence", "license"),
}
FIELDS = ("caption", "group", "licence", "license")  # of the JSON beside an image in a tar


@dataclass(frozen=True)
class Found:
    """One image of a source. `offset`, `size`: its bytes inside `file`; None: all of it. `refused`: it is not to be read."""

    name: str
    file: str
    offset: int | None = None
    size: int | None = None
    caption: str = ""
    group: str = ""
    licence: str = ""
    face: tuple[float, ...] | None = None  # left, top, right, bottom in pixels of the file, as it is before EXIF turns it
    refused: tuple[Reason, str] | None = None

    def __post_init__(self) -> None:
        for field in ("name", "caption", "group", "licence"):  # names of files and JSON need not be Unicode, tables do
            object.__setattr__(self, field, getattr(self, field).encode(errors="replace").decode())

    def read(self, max_bytes: int) -> bytes:
        """Its bytes.

        Raises:
            ImageError: refused, missing, or more than `max_bytes`.
        """
        if self.refused:
            raise ImageError(f"{self.name}: {self.refused[1]}", self.refused[0])
        path = Path(self.file)
        if not os.path.isfile(path):
            raise ImageError(f"{self.name}: no such file; check the path", "missing")
        try:
            size = path.stat().st_size if self.size is None else self.size
            if size > max_bytes:
                raise ImageError(f"{self.name}: {size} bytes is over the cap of {max_bytes}; save it smaller", "bytes")
            with open(path, "rb") as file:
                file.seek(self.offset or 0)
                return file.read(size)
        except OSError as error:
            raise ImageError(f"{self.name}: cannot be read ({error.strerror}); check its rights", "missing") from error


def from_folder(folder: Path) -> Iterator[Found]:
    """Every image file below `folder`. `name.txt` beside an image is its caption, the folder it is in its group."""
    locked: list[OSError] = []
    inside = os.path.realpath(folder)  # resolve(), is_symlink() and is_file() raise at links in a circle, or where rights are missing
    for place, folders, files in os.walk(folder, onerror=locked.append):
        folders.sort()
        for path in (Path(place, name) for name in folders if os.path.islink(Path(place, name))):
            name = path.relative_to(folder).as_posix()
            yield Found(name, str(path), refused=("member", "a link to a folder, which is not followed; copy the folder"))
        for path in (Path(place, name) for name in sorted(files) if _is_image(name)):
            name = path.relative_to(folder).as_posix()
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(inside):
                yield Found(name, str(path), refused=("member", "a link that leaves the folder; copy the file"))
                continue
            text = path.with_suffix(".txt")
            caption, refused = "", None
            if os.path.isfile(text) and text.stat().st_size <= MAX_SIDECAR and Path(os.path.realpath(text)).is_relative_to(inside):
                caption, refused = _sidecar(text)
            parent = path.parent.relative_to(folder).as_posix()
            yield Found(name, str(path), caption=caption, group="" if parent == "." else parent, refused=refused)
    for error in locked:
        name = Path(error.filename).relative_to(folder).as_posix()
        yield Found(name, error.filename, refused=("missing", f"a folder that cannot be read ({error.strerror}); check its rights"))


def from_tars(place: Path) -> Iterator[Found]:
    """Images of a tar file, or of all of a folder, as webdataset and img2dataset write them: members `key.jpg`, `key.txt`,
    `key.json` (caption, group, license). Nothing is unpacked, and nothing but images, text and JSON is read."""
    for path in sorted(place.glob("*.tar")) if place.is_dir() else [place]:
        yield from _members(path)


def _members(path: Path) -> Iterator[Found]:
    """Those of one tar file; where it is damaged, what stands before."""
    beside: dict[str, dict[str, Any]] = {}
    images: list[tuple[str, str, int, int]] = []  # key, name, and where its bytes are
    end, damage = 0, ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if tar.offset <= end:
                    raise ValueError("a member of less than nothing")  # tarfile reads it again for ever
                end = tar.offset
                name = f"{path.name}/{member.name}"
                inside = PurePosixPath(member.name)
                if inside.is_absolute() or ".." in inside.parts:
                    yield Found(name, str(path), refused=("member", "a name that leaves the archive"))
                elif member.isdir() or inside.name.startswith(NOTES):
                    continue
                elif not member.isreg() or member.issparse():
                    yield Found(name, str(path), refused=("member", "a link, device or sparse file"))
                else:
                    suffix = inside.suffix.lower()
                    key = str(inside.parent / inside.name.split(".")[0])  # webdataset: up to the first dot
                    if _is_image(inside.name):
                        images.append((key, name, member.offset_data, member.size))
                    elif suffix in (".txt", ".json") and member.size <= MAX_SIDECAR:
                        file = tar.extractfile(member)
                        assert file is not None
                        caption, refused = _sidecar(file.read(), suffix)
                        values = caption if isinstance(caption, dict) else {"caption": caption}
                        new: dict[str, Any] = {k: _words(values[k]) for k in FIELDS if _words(values.get(k))}
                        new |= {"refused": refused} if refused else {}
                        known = beside.setdefault(key, {})
                        beside[key] = known | new if suffix == ".txt" else new | known  # of two captions, the text's
        with open(path, "rb") as rest:  # tarfile takes a broken header for the end of the archive
            rest.seek(end)
            if rest.read(tarfile.BLOCKSIZE).strip(b"\0"):
                damage = f"damaged at byte {end}"
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        damage = f"damaged ({error})" if end else f"not a plain tar file ({error})"
    for key, name, offset, size in images:
        values = beside.get(key, {})
        licence = values.get("licence") or values.get("license", "")
        yield Found(
            name, str(path), offset, size, values.get("caption", ""), values.get("group", ""), licence, refused=values.get("refused")
        )
    if damage:
        yield Found(path.name, str(path), refused=("tar", f"{damage}; what follows cannot be read; get it again, or pack it again"))


def _sidecar(data: bytes | Path, suffix: str = ".txt") -> tuple[Any, tuple[Reason, str] | None]:
    """Caption, or fields of a JSON, from the bytes of the file beside an image."""
    try:
        text = (data.read_bytes() if isinstance(data, Path) else data).decode("utf-8-sig")
        values = json.loads(text) if suffix == ".json" else text.strip()
        if suffix == ".json" and not isinstance(values, dict):
            raise ValueError("not an object")
        return values, None
    except (OSError, ValueError, RecursionError) as error:
        return "", ("record", f"the {suffix} file beside it cannot be read ({error})")


def from_table(path: Path) -> Iterator[Found]:
    """Rows of a parquet, JSONL or CSV file: `path` (or file_name), and if they are there `caption` (or text), `group`, `licence`.
    Paths are relative to the table.

    Raises:
        ValueError: not a table, or no column of paths.
    """
    lines = partial(pl.scan_ndjson, infer_schema_length=None)  # of all rows: else polars goes by the first hundred
    readers: dict[str, Callable[..., pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet, ".jsonl": lines, ".ndjson": lines, ".csv": partial(pl.scan_csv, infer_schema=False),
    }  # fmt: skip
    if path.suffix not in readers:
        raise ValueError(f"{path}: not a table; give a .parquet, .jsonl or .csv file")
    try:
        table = readers[path.suffix](glob.escape(str(path)))
        there = table.collect_schema().names()
        chosen = {ours: next((c for c in theirs if c in there), None) for ours, theirs in COLUMNS.items()}
        columns = {ours: theirs for ours, theirs in chosen.items() if theirs}
        rows = table.select(columns.values()).collect()
    except Exception as error:  # polars raises many types
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); write it again") from error
    if "path" not in columns:
        raise ValueError(f"{path}: no column {' or '.join(COLUMNS['path'])}; it has {', '.join(there)}")
    for number, row in enumerate(rows.iter_rows(named=True)):
        values = {ours: row[theirs] for ours, theirs in columns.items()}
        given = values.pop("path")
        if not isinstance(given, str) or not given:
            yield Found(f"{path.name}#{number}", str(path), refused=("record", "no path in this row"))
        else:
            caption, group, licence = (_words(values.get(name)) for name in ("caption", "group", "licence"))
            yield Found(given, str(path.parent / given), caption=caption, group=group, licence=licence)


def from_upstream(path: Path) -> Iterator[Found]:
    """Images of the JSON that the published training code reads: a list of `{target, image_file, face, text}`, paths relative to the
    file. All images of an entry are of one group, and entries that share an image too. `text` is the caption of the target, and of a
    reference that is never a target; the first box in `face` is of the target.

    Raises:
        ValueError: not such a JSON.
    """
    try:
        entries = json.loads(path.read_text())
        sets = [[entry["target"], *_listed(entry.get("image_file", []))] for entry in entries]
        texts = {entry["target"]: (_listed(entry["text"]) or [""])[0] for entry in entries}
        faces = {entry["target"]: tuple(map(float, entry["face"][0][:4])) for entry in entries if entry.get("face")}
        assert all(len(corners) == 4 and all(map(math.isfinite, corners)) for corners in faces.values()), "a face has four numbers"
        assert all(isinstance(name, str) and name for names in sets for name in names)
        assert all(isinstance(text, str) for text in texts.values()), "text is words"
    except (ValueError, LookupError, TypeError, AssertionError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of target, image_file, face and text ({type(error).__name__}: {error})") from error
    for names, entry in zip(sets, entries, strict=True):
        for name in names[1:]:
            texts.setdefault(name, texts[entry["target"]])
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]  # else a chain of entries takes quadratic time
            name = parent[name]
        return name

    for first, *others in sets:
        root(first)
        for other in others:
            a, b = sorted((root(first), root(other)))
            parent[b] = a
    for name in sorted(parent):
        yield Found(name, str(path.parent / name), caption=texts[name], group=root(name), face=faces.get(name))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(NOTES)


def _words(value: Any) -> str:
    """A field as text; a number is one, 0 too. Of a list the first; NaN is how pandas says that there is none."""
    if isinstance(value, list):
        return _words(value[0]) if value else ""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
