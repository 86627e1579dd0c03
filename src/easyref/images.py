"""The only place that opens an image file: caps first, then pixels, EXIF turned, RGB on white.

Every failure is an `ImageError` whose message is one line: what, where, how to fix.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, the reason and the fix."""


def open_image(source: str | Path | bytes, name: str = "") -> Image.Image:
    """Read an image file (or its bytes) as RGB. Transparent pixels become white; only the first frame is used.

    Raises:
        ImageError: no such file, not an image, over a cap (bytes, pixels, side), or truncated.
    """
    name = name or (source if isinstance(source, str) else str(source) if isinstance(source, Path) else "image")
    data = source if isinstance(source, bytes) else _read(Path(source))
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: {len(data)} bytes is over the cap of {MAX_BYTES}; save it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # pillow raises many types on hostile headers
        raise ImageError(f"{name}: not an image that can be read; give a {', '.join(FORMATS)} file") from error
    width, height = image.size
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width}x{height} pixels is over the cap of {MAX_PIXELS} pixels or {MAX_SIDE} a side; shrink it")
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise ImageError(f"{name}: broken image data ({type(error).__name__}); save it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency over white, 16-bit scaled to 8."""
    if image.mode in ("I;16", "I;16B", "I;16L"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ImageError(f"{path}: no such file; check the path")
    if path.stat().st_size > MAX_BYTES:
        raise ImageError(f"{path}: {path.stat().st_size} bytes is over the cap of {MAX_BYTES}; save it smaller")
    return path.read_bytes()


def to_png(image: Image.Image, colors: int | None = None) -> bytes:
    """PNG bytes; with `colors`, an adaptive palette of that many (deterministic, no dithering)."""
    if colors is not None:
        image = image.quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
