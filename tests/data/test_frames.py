"""Frames: how much of an image stays, at which sizes, and that a cut shows what it says it shows."""

import numpy as np
import pytest
from PIL import Image

from easyref.data.dataset import centre
from easyref.data.frames import Framing, face_frame

SIZES = [(64, 64), (1024, 1536), (1500, 1024), (1024, 4096), (3000, 1024), (1024, 1025), (700, 512)]


def ramp(height: int, width: int) -> Image.Image:
    """Its red is where a pixel is from left to right, its green from top to bottom, in 255ths."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.uint8(np.stack([(x + 0.5) / width * 255, (y + 0.5) / height * 255, 0 * x], -1)))


@pytest.mark.parametrize("size", SIZES)
def test_a_kept_aspect_loses_little_and_has_about_the_area(size: tuple[int, int]) -> None:
    frame = Framing(1024, 64)(size, 0.5)
    assert not frame.size[0] % 64 and not frame.size[1] % 64
    assert frame.size[0] * frame.size[1] == pytest.approx(1024**2, rel=0.08)
    assert all(part <= scaled for part, scaled in zip(frame.size, frame.scaled, strict=True))
    assert frame.size[0] * frame.size[1] > 0.9 * frame.scaled[0] * frame.scaled[1]  # of the image is seen
    assert frame.scaled[0] / size[0] == pytest.approx(frame.scaled[1] / size[1], rel=2e-3)  # and not distorted
    assert frame.time_ids == (*size, *frame.corner, *frame.size)


@pytest.mark.parametrize("framing", [Framing(), Framing(256, 32)])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_cut_shows_the_part_that_the_time_ids_tell(framing: Framing, place: float) -> None:
    for size in ((256, 400), (330, 256), (256, 256)):
        frame = framing(size, place)
        pixels = np.asarray(frame.cut(ramp(*size)), np.float32)
        assert pixels.shape[:2] == frame.size
        (top, left), (height, width) = frame.corner, frame.size
        x = (left + np.arange(width) + 0.5) / frame.scaled[1] * 255
        y = (top + np.arange(height) + 0.5) / frame.scaled[0] * 255
        assert np.abs(pixels[..., 0] - x).max() < 2.5 and np.abs(pixels[..., 1] - y[:, None]).max() < 2.5


def test_squares_reach_from_edge_to_edge_and_the_middle_one_is_the_usual() -> None:
    image = ramp(64, 101)
    frames = [Framing()((64, 101), place) for place in (0.0, 0.5, 1.0)]
    assert [frame.corner for frame in frames] == [(0, 0), (0, 18), (0, 37)]
    assert np.array_equal(np.asarray(frames[1].cut(image)), np.asarray(centre(image)))
    with pytest.raises(ValueError, match="an image is 64x64, its table says 101x64"):
        frames[0].cut(ramp(64, 64))


@pytest.mark.parametrize("size", [(64, 64), (90, 64), (64, 120)])
def test_the_square_around_a_face_grows_to_all_sides_and_stays_inside(size: tuple[int, int]) -> None:
    image = np.asarray(ramp(*size), float)
    for box in ((20, 30, 32, 46), (0, 0, 10, 8), (50, 58, 64, 64), (0, 10, 64, 20), (28, 0, 36, 64)):
        square = max(box[2] - box[0], box[3] - box[1])
        for grow in (0.0, 0.25, 0.49):
            frame = face_frame(size, box, grow)
            side = min(round(square * (1 + 2 * grow)), *size)
            (top, left), cut = frame.corner, np.asarray(frame.cut(ramp(*size)))
            assert frame.size == (side, side) and np.array_equal(cut, image[top : top + side, left : left + side])
            for at, low, high, length in ((left, box[0], box[2], size[1]), (top, box[1], box[3], size[0])):
                assert 0 <= at <= length - side
                if at not in (0, length - side):
                    assert abs(at + side / 2 - (low + high) / 2) <= 1
                assert at <= low + 1 and at + side >= high - 1  # the face is in it
