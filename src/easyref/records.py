"""Tables and files on disk: parquet schemas, content hashes, atomic writes.

One rule for every writer of the project: write beside the target, fsync, rename. A reader never sees half a file.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

#: images.parquet: one row an image. Pixels are in `shard` at `offset`, `size` bytes; `sha256` is the hash of those bytes.
IMAGE_COLUMNS = (
    *("sha256", "shard", "offset", "size", "width", "height", "caption", "licence", "source"),
    *("concept", "subject", "gender", "tone", "style", "category", "colors"),
)
#: rejects.parquet: one row an image of the source that was not taken; `reason` in one word, `detail` in one line.
REJECT_COLUMNS = ("name", "reason", "detail")
#: rows-*.parquet of the embeddings: one row a part (image, subject, face) of an image, with its box in pixels.
ROW_COLUMNS = ("sha256", "part", "left", "top", "right", "bottom", "score")
#: faces.parquet of images, groups and split, where there are any: the box in pixels of an image's face, of several the largest.
FACE_COLUMNS = ("sha256", "left", "top", "right", "bottom")
#: groups.parquet: one row a group of images that share something; `members` is a list of sha256.
GROUP_COLUMNS = ("group_id", "kind", "split", "members")
#: samples.parquet: one row a leave-one-out sample (method.md §5): references → target under `prompt`.
SAMPLE_COLUMNS = ("sample_id", "group_id", "kind", "split", "target", "references", "prompt")
#: Beside base models from the hub: by folder, id and revision.
HUB = "hub.json"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_file(folder: Path, files: Mapping[str, str]) -> str | None:
    """The first of `files` (name → sha256) that `folder` lacks or has with another hash."""
    return next((name for name, digest in files.items() if not (folder / name).exists() or sha256_file(folder / name) != digest), None)


def sha256_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def clear_temporaries(target: Path) -> None:
    """Delete what killed writers of `target` left beside it."""
    for left in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        shutil.rmtree(left)


def _prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _temporary_folder(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_temporaries(target)
    return Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path near `target`; on success fsync it and rename it over `target`, else delete it.

    It stands in a folder of its own, since a library may write a temporary beside it in turn (safetensors does).
    """
    target = Path(target)
    folder = _temporary_folder(target)
    temporary = folder / target.name
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success swap it in. An old `target` survives any failure before that."""
    target = Path(target)
    temporary = _temporary_folder(target)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            target.replace(old / target.name)
            temporary.replace(target)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The only process in `folder` that asks for this, until it ends, however that is.

    Raises:
        ValueError: another one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work there; wait for its end and give the command again") from None
        yield


def remove_folder(folder: Path) -> None:
    """Remove a folder: it goes from its place whole, so that a kill leaves no half of it to be believed."""
    rest = _temporary_folder(folder)
    folder.replace(rest / folder.name)
    shutil.rmtree(rest)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; run the stage that writes it, in the project's folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and run the stage that writes it again") from error


def write_table(path: str | Path, table: pl.DataFrame) -> None:
    with atomic_path(path) as temporary:
        table.write_parquet(temporary, compression="zstd", statistics=False)


def read_table(path: str | Path, columns: tuple[str, ...] = ()) -> pl.DataFrame:
    """Read a parquet table and check that `columns` are there."""
    import polars as pl

    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such table; run the stage that writes it, or `dvc pull`")
    table = pl.read_parquet(path)
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise ValueError(f"{path}: column(s) {', '.join(missing)} missing; it has {', '.join(table.columns)}")
    return table
