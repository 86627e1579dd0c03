"""Which part of an image is a training target, and at which size: the largest square at one of a few places, or nearly all of it; and
the square around its face.

Sizes are (height, width) in pixels. Images whose frames have the same size make a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

Size = tuple[int, int]
Corners = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Frame:
    original: Size  # of the image
    scaled: Size  # what it is brought to
    corner: Size  # top, left of the part, in the scaled image
    size: Size  # of the part

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's added conditions (arXiv 2307.01952, §2.2): original size, crop's top left, target size."""
        return (*self.original, *self.corner, *self.size)

    def cut(self, image: Image.Image) -> Image.Image:
        if image.size != self.original[::-1]:
            raise ValueError(f"an image is {image.width}x{image.height}, its table says {self.original[1]}x{self.original[0]}")
        if self.scaled != self.original:
            image = image.resize(self.scaled[::-1], Image.Resampling.LANCZOS)
        (top, left), (height, width) = self.corner, self.size
        return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Framing:
    """How targets are framed: `side` None: the largest square, as it is; else nearly all of the image on about side² pixels, both sides
    multiples of `step`."""

    side: int | None = None
    step: int = 1

    def __call__(self, original: Size, place: float) -> Frame:
        """`place`: of the square along the longer side, from 0 (top or left) to 1 (bottom or right)."""
        height, width = original
        if self.side is None:
            side = min(original)
            return Frame(original, original, (int((height - side) * place), int((width - side) * place)), (side, side))
        step, shrink = self.step, self.side / (height * width) ** 0.5
        size = (max(step, round(height * shrink / step) * step), max(step, round(width * shrink / step) * step))
        fill = max(size[0] / height, size[1] / width)
        scaled = (max(size[0], round(height * fill)), max(size[1], round(width * fill)))
        return Frame(original, scaled, ((scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2), size)


def face_frame(original: Size, face: Corners, grow: float) -> Frame:
    """The square around a face (method.md §4): each side of its box's square moves out by the share `grow` of it. It stays inside the
    image, moved or, where the image is too small, smaller."""
    left, top, right, bottom = face
    square = max(right - left, bottom - top)
    side = min(round(square * (1 + 2 * grow)), *original)
    middle = ((top + bottom) / 2, (left + right) / 2)
    corner = tuple(min(max(round(m - side / 2), 0), length - side) for m, length in zip(middle, original, strict=True))
    return Frame(original, original, (corner[0], corner[1]), (side, side))
