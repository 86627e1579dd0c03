"""The only place that opens an image file: caps first, then pixels, EXIF turned, RGB on white.

Every failure is an `ImageError` whose message is one line: what, where, how to fix.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
#: Why an image cannot be used, in one word.
Reason = Literal[
    "missing", "empty", "bytes", "format", "pixels", "small", "aspect", "frames", "metadata", "broken",
    "timeout", "crash", "duplicate", "near_duplicate", "member", "tar", "record",
    "nsfw", "aesthetic", "watermark",
]  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Caps on an image file. The default is what any reader of the project takes."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 20_000
    min_side: int = 1
    max_aspect: float = math.inf  # longer side over shorter
    max_frames: int | None = None  # of an animation, of which the first counts; None: not looked at
    max_metadata: int = 16 * 2**20  # bytes of EXIF, ICC profile and text


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, what is wrong and the fix, `reason` is the same in one word."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


def open_image(source: str | Path | bytes, name: str = "", limits: Limits = Limits()) -> Image.Image:
    """Read an image file (or its bytes) as RGB, turned as its EXIF says, in sRGB. Transparent pixels become white; only the first
    frame is used. What it is, its content says, not its name.

    Raises:
        ImageError: no such file, not an image, over a cap, or broken.
    """
    name = name or (source if isinstance(source, str) else str(source) if isinstance(source, Path) else "image")
    data = source if isinstance(source, bytes) else _read(Path(source), limits)
    image = _header(data, name, limits)
    try:
        image.load()
        turned = ImageOps.exif_transpose(image) if orientation(image) != 1 else image
        return to_rgb(_to_srgb(turned))
    except Exception as error:
        raise ImageError(f"{name}: broken image data ({type(error).__name__}); save it again", "broken") from error


def _header(data: bytes, name: str, limits: Limits) -> Image.Image:
    """The image before its pixels are read, if it is within all limits."""
    if not data:
        raise ImageError(f"{name}: an empty file; get it again", "empty")
    if len(data) > limits.max_bytes:
        raise ImageError(f"{name}: {len(data)} bytes is over the cap of {limits.max_bytes}; save it smaller", "bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more pixels than the cap of {limits.max_pixels}; shrink it", "pixels") from error
    except Exception as error:  # pillow raises many types on hostile headers
        if "text chunk" in str(error).lower() or "MAX_TEXT" in str(error):
            raise ImageError(f"{name}: more text in it than pillow takes; save it without", "metadata") from error
        raise ImageError(f"{name}: not an image that can be read; give a {', '.join(FORMATS)} file", "format") from error
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: pixels of 32 bits, and nothing says which are white; save it with 8 or 16", "format")
    width, height = image.size
    if width > limits.max_side or height > limits.max_side or width * height > limits.max_pixels:
        cap = f"{limits.max_pixels} pixels or {limits.max_side} a side"
        raise ImageError(f"{name}: {width}x{height} pixels is over the cap of {cap}; shrink it", "pixels")
    if min(width, height) < limits.min_side:
        raise ImageError(f"{name}: {width}x{height} pixels, at least {limits.min_side} a side are needed; get it larger", "small")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(f"{name}: {width}x{height}, longer than {limits.max_aspect:g} times its width; crop it", "aspect")
    metadata = sum(len(value) for value in image.info.values() if isinstance(value, bytes | str))
    if metadata > limits.max_metadata:
        raise ImageError(f"{name}: {metadata} bytes of metadata, over the cap of {limits.max_metadata}; save it without", "metadata")
    if limits.max_frames is not None:
        try:
            frames = getattr(image, "n_frames", 1)
            image.seek(0)
        except Exception as error:
            raise ImageError(f"{name}: broken image data ({type(error).__name__}); save it again", "broken") from error
        if frames > limits.max_frames:
            raise ImageError(f"{name}: {frames} frames, at most {limits.max_frames}; give a still image", "frames")
    return image


def orientation(image: Image.Image) -> int:
    """How its EXIF says that it lies; 1, upright, where that cannot be read."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # pillow raises many types on broken EXIF
        return 1


def turned_box(box: Sequence[float], orientation: int, width: int, height: int) -> tuple[float, float, float, float]:
    """Where left, top, right, bottom of a file of `width` × `height` pixels are when it is turned as its EXIF orientation says."""
    left, top, right, bottom = box
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation in (5, 6, 7, 8) else (left, top, right, bottom)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Colours by the embedded profile; one that is broken or does not fit is ignored."""
    profile = image.info.get("icc_profile")
    if profile and (image.mode == "P" or "transparency" in image.info):
        image = image.convert("RGBA")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def file_suffix(data: bytes) -> str:
    """`.png`, `.jpg`, …: what an image file is by its content."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = str(image.format).lower()
    return {"jpeg": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency over white, 16-bit scaled to 8."""
    if image.mode in ("I;16", "I;16B", "I;16L"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _read(path: Path, limits: Limits) -> bytes:
    if path.is_dir():
        raise ImageError(f"{path}: a folder; name the image files in it", "missing")
    if not path.is_file():
        raise ImageError(f"{path}: no such file; check the path", "missing")
    if path.stat().st_size > limits.max_bytes:
        raise ImageError(f"{path}: {path.stat().st_size} bytes is over the cap of {limits.max_bytes}; save it smaller", "bytes")
    return path.read_bytes()


def to_png(image: Image.Image, colors: int | None = None, text: Mapping[str, str] | None = None) -> bytes:
    """PNG bytes; with `colors`, an adaptive palette of that many (deterministic, no dithering); `text` goes in as iTXt."""
    if colors is not None:
        image = image.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, pnginfo=chunks)
    return buffer.getvalue()


def png_text(source: Path | bytes, key: str, name: str = "", limits: Limits = Limits()) -> str | None:
    """What `to_png` put into an image file as `key`, or None. ImageError as of `open_image`."""
    name = name or (str(source) if isinstance(source, Path) else "image")
    data = source if isinstance(source, bytes) else _read(source, limits)
    text = _header(data, name, limits).info.get(key)
    return text if isinstance(text, str) else None
