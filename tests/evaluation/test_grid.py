"""The picture follows its rule and is the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from easyref.evaluation.generations import CONDITIONS, Case, Painter, make_images, select_cases
from easyref.evaluation.grid import COLUMNS, KIND, LARGE, GridRow, draw_grid, grid_png, grid_rows

from .conftest import Emoji
from .test_evaluate import Answers


@pytest.fixture(scope="module")
def cases(emoji: Emoji) -> list[Case]:
    """Two samples of each group, side by side."""
    return sorted(select_cases(emoji.samples, emoji.images, {"held_out": 100}, 0)[0], key=lambda c: c.sample_id)


@pytest.fixture(scope="module")
def rows(emoji: Emoji, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[GridRow]:
    out = tmp_path_factory.mktemp("grid")
    images, _ = make_images(cases, CONDITIONS, emoji.load, {"together": Painter(lambda: Answers(emoji), "w")}, out, batch=12)
    return grid_rows(cases, images, emoji.load, per_kind=2)


def test_picture_takes_the_first_groups_of_each_kind(emoji: Emoji, cases: list[Case], rows: list[GridRow]) -> None:
    assert [row.band for row in rows] == [KIND[kind] for kind in ("subject", "person", "style") for _ in range(2)]
    expected = [c for kind in ("subject", "person", "style") for c in [c for c in cases if c.kind == kind][:4:2]]
    assert len({c.group_id for c in expected}) == 6
    assert [row.target.tobytes() for row in rows] == [emoji.load(c.target).tobytes() for c in expected]
    assert all(row.made[0].tobytes() == row.target.tobytes() for row in rows)


def test_picture_is_readable_at_full_size(rows: list[GridRow], tmp_path: Path) -> None:
    image = Image.open(grid_png(rows, tmp_path / "grid.png"))
    assert image.mode == "RGB" and image.width < 1400 and image.height > len(rows) * LARGE
    assert image.tobytes() == draw_grid(rows, COLUMNS).tobytes(), "the same rows give the same picture"


def test_picture_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        grid_png([], tmp_path / "grid.png")
