"""How fast a training runs: on its progress line, and as JSON lines in a file of its own, `NAME.speed` beside the state. These figures
differ from run to run, so they stay out of the training's log, which never does.

images_per_second  of all processes, in the updates since the last row, without validation and saves
waiting            share of that time in which this process waited for inputs
memory_gib         most that the device has held; without one, most of the process
mfu                FLOP of forward and backward pass over those of a large matrix product in that time; CUDA only, not under FSDP2
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from easyref.meter import Meter, matmul_rate

COUNTS = {"cuda"}  # devices whose speed is worth the two microbatches that counting takes


class Status:
    def __init__(self, path: Path, device: torch.device, world: int = 1) -> None:
        self.path, self.device, self.world = path, device, world
        self.images, self.seconds, self.waited = 0, 0.0, 0.0  # since the last row
        self.flop = self.rate = 0.0  # of an image, both passes; of the device in a second

    def count(self, loss: Callable[[], torch.Tensor], backward: Callable[[], object], images: int, dtype: torch.dtype) -> None:
        """Measure FLOP on `backward`, forward and backward pass of so many images; `loss` before makes what is then kept of them."""
        with torch.no_grad():
            loss()
        with Meter() as meter:
            backward()
        self.flop, self.rate = meter.flop / images, matmul_rate(self.device, dtype)

    def begin(self) -> None:
        """An update starts."""
        self.start = time.perf_counter()

    def end(self, images: int) -> None:
        self.seconds += time.perf_counter() - self.start
        self.images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def row(self, seen: int) -> dict[str, str]:
        """Write a row of the file; the same for the progress line."""
        speed, waiting = self.images / self.seconds, self.waited / self.seconds
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"seen": seen, "images_per_second": speed, "waiting": waiting, "memory_gib": held / 2**30}
        shown = {"waiting": f"{waiting:.0%}", "memory": f"{held / 2**30:.1f} GiB"}
        if self.flop:
            row["mfu"] = speed * self.flop / self.world / self.rate
            shown["mfu"] = f"{row['mfu']:.0%}"
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.images, self.seconds, self.waited = 0, 0.0, 0.0
        return shown
