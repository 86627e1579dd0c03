"""Tensors that another process may need again, in a folder of the user: safetensors files, by the hash of what they are of.

The folder holds `limit` bytes at most; what was read or written longest ago goes first. A file is written beside its place and renamed,
so two processes can share the folder; one that cannot be read is deleted and made again. Nothing here ever fails a run.

Environment: EASYREF_CACHE (the folder; default: the user's cache folder), EASYREF_CACHE_GIB (the limit; default 2, 0: no cache).
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from easyref.records import sha256_file, sha256_json

HALF = ".easyref-"  # files that are being written


def made_here(device: torch.device, *files: str) -> list[Any]:
    """What decides an encoding to the last bit besides the weights; `files`: the code that makes it."""
    here = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [*map(sha256_file, files), version("transformers"), version("pillow"), device.type, here, torch.get_num_threads()]


class DiskCache:
    """`about`: what all entries depend on, besides their own keys: model, precision, device."""

    def __init__(self, folder: Path, limit: int, about: Any) -> None:
        self.folder, self.limit, self.about = folder, limit, about

    @classmethod
    def of_user(cls, about: Any) -> DiskCache:
        """
        Raises:
            ValueError: a limit in the environment that is none.
        """
        text = os.environ.get("EASYREF_CACHE_GIB", "2")
        try:
            limit = int(float(text) * 2**30)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"EASYREF_CACHE_GIB={text!r}: not a number; give GiB, 0 for no cache") from error
        return cls(Path(os.environ.get("EASYREF_CACHE") or user_cache_path("easyref") / "references"), limit, about)

    def path(self, *key: Any) -> Path:
        return self.folder / f"{sha256_json([self.about, torch.__version__, *key])}.safetensors"

    def get(self, device: torch.device, *key: Any) -> dict[str, Tensor] | None:
        if not self.limit:
            return None
        path = self.path(*key)
        try:
            tensors = load_file(path, str(device))
            with suppress(OSError):  # a folder that is only to be read
                os.utime(path)  # mounts seldom keep the time of reading
        except (SafetensorError, OSError, RuntimeError) as error:
            if not path.exists():  # never there, or another process trimmed it; safetensors has several errors for that
                return None
            warnings.warn(f"{path}: unreadable ({error}); made again", stacklevel=2)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return tensors

    def put(self, tensors: dict[str, Tensor], *key: Any) -> None:
        if sum(tensor.nbytes for tensor in tensors.values()) > self.limit:
            return
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._trim(self.limit - len(data))
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=HALF, delete=False) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.path(*key))
        except OSError as error:
            warnings.warn(f"{self.folder}: encoded references are not kept ({error})", stacklevel=2)

    def _trim(self, room: int) -> None:
        """Delete from the oldest on until the rest takes `room` bytes; half-written files of killed processes age like the others.
        What another program put there is not ours to count or delete."""
        found = []
        for path in self.folder.iterdir():
            if not re.fullmatch(rf"[0-9a-f]{{64}}\.safetensors|{re.escape(HALF)}.*", path.name):
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process was quicker
                continue
            found.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= room:
                return
            path.unlink(missing_ok=True)
            total -= size
