"""The report is one self-contained file that says what evaluate.json says; the picture follows its rule."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyref.evaluation.generations import Case, make_images, select_cases
from easyref.evaluation.grid import LARGE, draw_grid
from easyref.evaluation.report import GridRow, grid_png, grid_rows, write_report

from .conftest import Emoji
from .test_evaluate import Answers


def entry(right: float, low: float) -> dict[str, Any]:
    gap = {"mean": low + 0.08, "low": low, "high": low + 0.15}
    return {
        "right": right, "shuffled": 0.1, "none": 0.12, "ceiling": 0.5,
        "right_minus_shuffled": gap, "right_minus_none": gap,
        "covered": (right - 0.12) / 0.38, "samples": 20, "groups": 10,
    }  # fmt: skip


def result() -> dict[str, Any]:
    metrics = {"fidelity": entry(0.31, 0.15), "style": entry(0.2, -0.05), "concept": entry(0.05, -0.2), "tone": None}
    split = {**metrics, "reference_fidelity": None, "text_alignment": None, "by_kind": {"subject": metrics}}
    copy = {"copied_reference": 0.25, "nearer_to_reference": 0.5, "copied_training": 0.0, "nearest_training": 0.04}
    return {
        "held_out": split,
        "held_in": {"by_kind": {}},
        "copying": {"held_out": {"right": copy, "none": copy, "real": copy}, "held_in": None},
        "samples": {"held_out": {"samples": 20, "groups": 10}, "held_in": {"samples": 0, "groups": 0}, "failed": 1,
                    "failures": ["sample <b>x</b> (right): OSError: truncated"]},
        "extractor_trust": {"split": "held_out", "images": 100, "same_concept_auc": 0.93,
                            "style": {"accuracy": 0.78, "chance": 0.25}, "tone": None, "concept": None,
                            "text_alignment": {"recall_at_1": 0.1, "recall_at_5": 0.3, "captions": 99}},
        "settings": {"seed": 0, "weights": "abcdef0123456789", "steps": 20, "guidance": 3.0, "scale": 1.0},
    }  # fmt: skip


@pytest.fixture(scope="module")
def cases(emoji: Emoji) -> list[Case]:
    """Two samples of each group, side by side."""
    return sorted(select_cases(emoji.samples, emoji.images, {"held_out": 100}, 0)[0], key=lambda c: c.sample_id)


@pytest.fixture(scope="module")
def rows(emoji: Emoji, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> list[GridRow]:
    out = tmp_path_factory.mktemp("grid")
    make_images(cases, emoji.load, Answers(emoji), out, "w", batch=12)
    return grid_rows(cases, emoji.load, out, per_kind=2)


def test_report_is_self_contained_and_says_the_numbers(rows: list[GridRow], tmp_path: Path) -> None:
    html = write_report(result(), rows, tmp_path / "evaluation.html").read_text()
    assert not re.search(r"<script|https?://|<link|@import|url\(", html)
    assert len(re.findall(r'src="data:image/png;base64,', html)) == html.count("<img") == 2  # the grid and one plot
    text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html)))
    assert "With the right references 0.310, better than with another group's (0.100): difference +0.230 [+0.150, +0.300]" in text
    assert "With the right references 0.200, not measurably different from another group's" in text
    assert "With the right references 0.050, worse than" in text
    assert "cover 50 % of the way" in text
    assert "Nothing here is a claim about photographs" in text
    assert "78 % (chance 25 %)" in text and "AUC of 0.930" in text
    assert "Held-in groups" not in text  # a split without samples is left out


def test_report_escapes_what_comes_from_data(tmp_path: Path) -> None:
    html = write_report(result(), [], tmp_path / "e.html").read_text()
    assert "<b>x</b>" not in html and "&lt;b&gt;x&lt;/b&gt;" in html


def test_picture_takes_the_first_groups_of_each_kind(emoji: Emoji, cases: list[Case], rows: list[GridRow]) -> None:
    assert [row.kind for row in rows] == ["subject"] * 2 + ["person"] * 2 + ["style"] * 2
    expected = [c for kind in ("subject", "person", "style") for c in [c for c in cases if c.kind == kind][:4:2]]
    assert len({c.group_id for c in expected}) == 6
    assert [row.target.tobytes() for row in rows] == [emoji.load(c.target).tobytes() for c in expected]
    assert all(row.right.tobytes() == row.target.tobytes() for row in rows)


def test_picture_is_readable_at_full_size(rows: list[GridRow], tmp_path: Path) -> None:
    image = Image.open(grid_png(rows, tmp_path / "grid.png"))
    assert image.mode == "RGB" and image.width < 1400 and image.height > len(rows) * LARGE
    assert image.tobytes() == draw_grid(rows).tobytes(), "the same rows give the same picture"


def test_picture_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        grid_png([], tmp_path / "grid.png")
