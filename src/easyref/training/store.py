"""Encodings that do not change in a training: in main memory up to a budget, the last used stay; on disk for the runs after it, too.

On disk they are rows of one SQLite file, safetensors bytes under hashes of all that makes them. Processes share the file, and a kill
leaves it whole; it must lie on a local disk. When it is full, encodings of other models go; if there are none, nothing more is kept: to
drop some of an epoch for others would only cost. Nothing about the file ever fails a run.

Each encoding is computed alone, never in a batch: found or made, it is the same to the bit.
"""

from __future__ import annotations

import sqlite3
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cachetools import LRUCache
from safetensors.torch import load, save
from torch import Tensor

from easyref.records import sha256_json

Encoding = dict[str, Tensor]
CPU = torch.device("cpu")
ROOM = 256  # rows of other models that go at a time


class Store:
    def __init__(self, memory: int, disk: Disk | None = None, device: torch.device = CPU) -> None:
        self.kept: LRUCache[str, Encoding] = LRUCache(memory, getsizeof=self._size)
        self.lock = threading.Lock()
        self.disk = disk
        self.pin = device.type == "cuda"  # the copy to the device then goes on beside the computation

    def find(self, kind: str, *key: Any) -> Encoding | None:
        """From memory or disk."""
        name = sha256_json([kind, *key])
        with self.lock:
            found = self.kept.get(name)
        if found is None and self.disk and (data := self.disk.get(kind, name)):
            found = self._remember(name, load(data))
        return found

    def get(self, make: Callable[[], Encoding], kind: str, *key: Any) -> Encoding:
        """Found, or made and kept."""
        found = self.find(kind, *key)
        if found is None:
            name = sha256_json([kind, *key])
            found = self._remember(name, {part: tensor.cpu().contiguous() for part, tensor in make().items()})
            if self.disk:
                self.disk.put(kind, name, found)
        return found

    def take(self, make: Callable[[], Encoding], kind: str, *key: Any) -> Encoding:
        """Found in memory and no longer kept there, or made."""
        with self.lock:
            found = self.kept.pop(sha256_json([kind, *key]), None)
        return make() if found is None else found

    def _size(self, tensors: Encoding) -> int:
        """Bytes that they hold: pinned, the next power of two."""
        return sum(1 << (t.nbytes - 1).bit_length() if self.pin and t.nbytes else t.nbytes for t in tensors.values())

    def _remember(self, name: str, tensors: Encoding) -> Encoding:
        if self.pin:
            tensors = {part: tensor.pin_memory() for part, tensor in tensors.items()}
        with self.lock:
            if self.kept.getsizeof(tensors) <= self.kept.maxsize:
                self.kept[name] = tensors
        return tensors


class Disk:
    """`abouts`: kind of encoding → hash of all that makes it besides its key; other kinds are not kept."""

    def __init__(self, path: Path, limit: int, abouts: dict[str, str]) -> None:
        self.path, self.abouts, self.full = path, abouts, False
        self.lock = threading.Lock()  # of the one connection
        self.rows: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rows = _connect(path, limit)
        except (sqlite3.Error, OSError) as error:
            self._stop(error)

    def get(self, kind: str, name: str) -> bytes | None:
        if not self.rows or kind not in self.abouts:
            return None
        with self.lock:
            try:
                chosen = "SELECT data FROM encodings WHERE about = ? AND name = ?"
                row = self.rows.execute(chosen, (self.abouts[kind], name)).fetchone()
            except sqlite3.Error as error:
                self._stop(error)
                return None
        return row[0] if row else None

    def put(self, kind: str, name: str, tensors: Encoding) -> None:
        if not self.rows or self.full or kind not in self.abouts:
            return
        with self.lock:
            try:
                while not self._write(self.abouts[kind], name, save(tensors)):
                    if not self._make_room():
                        self.full = True
                        print(f"{self.path}: full; what else is encoded stays in memory only (loading.disk_gib)")
                        return
            except sqlite3.Error as error:
                self._stop(error)

    def _write(self, about: str, name: str, data: bytes) -> bool:
        assert self.rows
        try:
            self.rows.execute("INSERT OR IGNORE INTO encodings VALUES (?, ?, ?)", (about, name, data))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_FULL":  # its own limit, or that of the disk
                raise
            return False
        return True

    def _make_room(self) -> bool:
        assert self.rows
        ours = sorted(set(self.abouts.values()))
        others = f"SELECT rowid FROM encodings WHERE about NOT IN ({', '.join('?' * len(ours))}) LIMIT {ROOM}"
        return self.rows.execute(f"DELETE FROM encodings WHERE rowid IN ({others})", ours).rowcount > 0

    def _stop(self, error: Exception) -> None:
        self.rows = None
        warnings.warn(f"{self.path}: {error}; goes on without; delete it if it is broken", stacklevel=3)


def _connect(path: Path, limit: int) -> sqlite3.Connection:
    rows = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    page = 16384
    rows.execute(f"PRAGMA page_size = {page}")
    rows.execute("PRAGMA journal_mode = WAL")
    rows.execute("PRAGMA synchronous = NORMAL")  # after a power cut the last rows may be gone, the others are whole
    rows.execute(f"PRAGMA mmap_size = {limit}")
    rows.execute("CREATE TABLE IF NOT EXISTS encodings (about TEXT, name TEXT, data BLOB NOT NULL, PRIMARY KEY (about, name))")
    rows.execute(f"PRAGMA max_page_count = {max(1, limit // page)}")
    return rows
