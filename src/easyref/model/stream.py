"""Files of tensors that need not fit into memory: safetensors read and written one tensor at a time, pickles made into safetensors.

safetensors' own writer takes all tensors at once. A pickle can run any program when it is read; with the user's word for it, torch
reads it here as tensors and plain values alone (`weights_only`), in a process of its own: `python -m easyref.model.stream IN OUT`.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from easyref.progress import track

DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
PICKLE: Final = (b"PK", b"\x80")  # how files of torch.save begin: since 1.6, and before


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds; no tensor is read. ValueError for a torn file or weights that are no floats."""
    found: dict[str, Entry] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} is stored as {part.get_dtype()}; give a file with {', '.join(DTYPES)}")
                found[name] = Entry(DTYPES[part.get_dtype()], tuple(part.get_shape()))
    except SafetensorError as error:
        raise ValueError(f"{path}: no whole safetensors file ({error}); fetch it again") from error
    return found


def read(path: Path, name: str) -> Tensor:
    """One tensor. The file is opened for each: it is mapped into memory, and what was read would stay with the process."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def write(path: Path, named: Mapping[str, Entry], get: Callable[[str], Tensor], metadata: Mapping[str, str], title: str) -> None:
    """A safetensors file of `get(name)` for each name, brought to its dtype; one tensor is in memory at a time."""
    order = sorted(named, key=lambda name: (-named[name].dtype.itemsize, name))  # so that every tensor lies at a multiple of its item
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + named[name].nbytes
        header[name] = {"dtype": NAMES[named[name].dtype], "shape": named[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in track(order, title, len(order), "tensors"):
            tensor = get(name).detach().to("cpu", named[name].dtype).contiguous()
            assert tensor.shape == named[name].shape, name
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def as_safetensors(path: Path, trust_pickle: bool, scratch: Path) -> Iterator[Path]:
    """`path` if it is a safetensors file; a pickle's tensors as one in `scratch`, for as long as it is needed."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" or not start.startswith(PICKLE):  # behind the header's length stands its JSON
        yield path
        return
    if not trust_pickle:
        raise ValueError(
            f"{path} is a pickle, and a pickle can run any program when it is read; take the safetensors file, "
            "or give --trust-pickle if you trust who made it"
        )
    made = scratch / "unpickled.safetensors"
    # Its progress goes on to our stderr; on stdout it says in one line what went wrong.
    words = [sys.executable, "-m", "easyref.model.stream", str(path), str(made)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{path}: {done.stdout.strip() or f'the process that read it ended with {done.returncode}'}")
    yield made
    made.unlink()


def _unpickle(source: Path, made: Path) -> None:
    """The state dict in a file of torch.save: what is under `module` (DeepSpeed), else the whole."""
    found = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    state = found.get("module", found) if isinstance(found, dict) else {"": found}
    named = {".".join(map(str, path)): value for path, value in _leaves(state)}
    odd = next((name for name, value in named.items() if not isinstance(value, Tensor) or value.dtype not in NAMES), None)
    if odd is not None:
        kind = getattr(named[odd], "dtype", type(named[odd]).__name__)
        raise ValueError(f"{odd!r} is {kind}, not a tensor of floats; give a file with the weights alone, or with them under 'module'")
    write(made, {name: Entry(t.dtype, tuple(t.shape)) for name, t in named.items()}, named.__getitem__, {}, "unpickle")


def _leaves(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """IP-Adapter's files are dicts in a dict."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


if __name__ == "__main__":
    try:
        _unpickle(Path(sys.argv[1]), Path(sys.argv[2]))
    except pickle.UnpicklingError as error:
        asks = re.search(r"GLOBAL (\S+)", str(error))
        print(f"more than tensors and plain values is in it ({asks.group(1) if asks else str(error).splitlines()[0]}); not read")
        sys.exit(1)
    except (OSError, RuntimeError, ValueError) as error:
        print(str(error).splitlines()[0])
        sys.exit(1)
