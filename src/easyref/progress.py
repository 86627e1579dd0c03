"""Progress with rate and ETA for everything longer than a few seconds, and one line that says what hardware is in force."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(total: int, title: str, unit: str = "images", initial: int = 0, disable: bool = False) -> tqdm:
    """A progress bar in `unit`s. In a log file it prints a line every 10 seconds instead of every change."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(
        total=total, desc=title, unit=f" {unit}", initial=initial, mininterval=interval, maxinterval=interval, smoothing=0.05,
        dynamic_ncols=sys.stderr.isatty(), disable=disable,
    )  # fmt: skip


def track(items: Iterable[T], title: str, total: int, unit: str = "images") -> Iterator[T]:
    with bar(total, title, unit) as progress:
        for item in items:
            yield item
            progress.update()


def machine(*packages: str) -> dict[str, object]:
    """What a benchmark ran on, for its file."""
    versions = {name: version(name) for name in packages}
    return {"hardware": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions}


def use_threads(threads: int) -> str:
    """Set torch's threads (0: all cores) and say which hardware is in force."""
    import torch

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda ({torch.cuda.get_device_name()})"
    return f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
