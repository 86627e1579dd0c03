"""Check and normalise images in worker processes that a malformed one can neither crash nor stall."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass, fields
from multiprocessing import get_context

import numpy as np
from PIL import Image

from easyref.config import IngestLimits
from easyref.data.sources import Found
from easyref.images import ImageError, Limits, Reason, file_suffix, open_image, orientation, to_png, turned_box
from easyref.records import sha256_bytes

LOSSY = ("JPEG", "MPO", "WEBP")  # MPO: a JPEG with more pictures behind it, as telephones write


@dataclass(frozen=True)
class Checked:
    """One good image: its bytes as they are stored, and what duplicates are found by."""

    data: bytes
    suffix: str
    width: int
    height: int
    original: str  # sha256 of the bytes as they came
    thumbnail: bytes  # RGB, 16×16
    face: list[int] | None = None  # left, top, right, bottom in pixels, where the source gives it


@dataclass(frozen=True)
class Rejected:
    reason: Reason
    detail: str


def check(found: Found, size: int, limits: IngestLimits) -> Checked | Rejected:
    """Read one image within `limits`. Stored with the shorter side `size`: the bytes as they came if nothing has to change, else
    JPEG of an image that was lossy before, PNG of any other."""
    try:
        data = found.read(limits.max_bytes)
        image = open_image(data, found.name, image_limits(limits))
        with Image.open(io.BytesIO(data)) as raw:
            kept = raw.mode == "RGB" and min(raw.size) == size and raw.size == image.size and raw.info.get("icc_profile") is None
            lies = orientation(raw)
            kept = kept and lies == 1 and getattr(raw, "n_frames", 1) == 1
            kind = raw.format or ""
        # not raw.size: Pillow turns a TIFF's, and no other format's, as its EXIF says
        width, height = image.size[::-1] if lies in (5, 6, 7, 8) else image.size
        scale = size / min(image.size)
        if scale != 1:
            shape = [max(size, round(side * scale)) for side in image.size]
            image = image.resize((shape[0], shape[1]), Image.Resampling.LANCZOS)
    except (ImageError, MemoryError) as error:
        if isinstance(error, ImageError) and not isinstance(error.__cause__, MemoryError):
            return Rejected(error.reason, str(error))
        return Rejected("crash", f"{found.name}: more memory than memory_mib {limits.memory_mib}; shrink it, or raise that")
    face = None
    if found.face:
        box = turned_box(found.face, lies, width, height)
        face = [min(max(0, round(at * scale)), most) for at, most in zip(box, image.size * 2, strict=True)]
        if face[0] >= face[2] or face[1] >= face[3]:
            return Rejected("record", f"{found.name}: its face {found.face} is not inside of it; correct it, or leave it out")
    thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX)).tobytes()
    if kept:
        stored, suffix = data, file_suffix(data).removeprefix(".")
    elif kind in LOSSY:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        stored, suffix = buffer.getvalue(), "jpg"
    else:
        stored, suffix = to_png(image), "png"
    return Checked(stored, suffix, image.width, image.height, sha256_bytes(data), thumbnail, face)


def image_limits(limits: IngestLimits) -> Limits:
    return Limits(**{field.name: getattr(limits, field.name) for field in fields(Limits)})


class Checker:
    """`check` on `limits.workers` processes. An image that takes more than `limits.seconds` or ends its process is rejected, the others
    are not touched. Use as a context manager."""

    def __init__(self, size: int, limits: IngestLimits) -> None:
        from pebble import ProcessPool

        self.size, self.limits = size, limits
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # else every new worker imports it all again
        self.pool = ProcessPool(limits.workers, context=context, initializer=_confine, initargs=(limits.memory_mib * 2**20,))

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.stop()
        self.pool.join()

    def __call__(self, found: Sequence[Found]) -> Iterator[Checked | Rejected]:
        """The result of each, in their order.

        Raises:
            ValueError: no process can be had.
        """
        from pebble import ProcessExpired

        limits = self.limits
        futures = [self.pool.schedule(check, args=(one, self.size, limits), timeout=limits.seconds) for one in found]
        for one, future in zip(found, futures, strict=True):
            try:
                yield future.result()
            except Late:
                yield Rejected("timeout", f"{one.name}: took more than seconds {limits.seconds:g}; save it again, smaller")
            except (ProcessExpired, MemoryError):
                yield Rejected("crash", f"{one.name}: ended the process that read it; save it again")
            except BrokenExecutor as error:
                fix = "they may have been out of memory: lower ingest.limits.workers; finished shards are kept"
                raise ValueError(f"ingest: no process that checks images stays alive; {fix}") from error
            except Exception as error:  # whatever a decoder raises that nobody knows: of this image alone
                yield Rejected("crash", f"{one.name}: {type(error).__name__} ({error}); save it again")


def _confine(memory: int) -> None:
    """No more than `memory` bytes on top of what the process has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = now + memory if hard == resource.RLIM_INFINITY else min(now + memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
