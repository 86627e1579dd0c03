"""The picture that proves it: references, prompt, real target, and the images with right, wrong and no references.

Rows are chosen by a rule (the first N held-out groups of each kind in evaluate's seeded order), never by how well they
came out. All lengths are pixels; the picture is meant to be read at 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from easyref.evaluation.generations import CONDITIONS, Case, Load, image_path
from easyref.images import open_image, to_png
from easyref.records import write_bytes

KIND = {
    "subject": "Subject: one thing drawn in several styles; the prompt names the style",
    "person": "Person: one style, gender and skin tone in several roles; the prompt names the role",
    "style": "Style: one set of drawings; the prompt names the rest",
}


@dataclass(frozen=True)
class GridRow:
    """One sample of the picture."""

    kind: str
    prompt: str
    references: list[Image.Image]
    target: Image.Image
    right: Image.Image
    shuffled: Image.Image
    none: Image.Image


def grid_rows(cases: Sequence[Case], load: Load, out: Path, per_kind: int, split: str = "held_out") -> list[GridRow]:
    """The first `per_kind` groups of each kind, in the order of `select_cases`, whose three images are there."""
    rows: list[GridRow] = []
    for kind in KIND:
        seen: set[str] = set()
        for case in cases:
            paths = {condition: image_path(out, case, condition) for condition in CONDITIONS}
            fits = case.split == split and case.kind == kind and case.group_id not in seen
            if not fits or len(seen) == per_kind or not all(p.exists() for p in paths.values()):
                continue
            seen.add(case.group_id)
            made = {condition: open_image(path) for condition, path in paths.items()}
            rows.append(GridRow(kind, case.prompt, [load(sha) for sha in case.right], load(case.target), **made))
    return rows


def grid_png(rows: Sequence[GridRow], path: str | Path) -> Path:
    """Draw the rows, grouped by kind: references, prompt, real target, and the three generations."""
    if not rows:
        raise ValueError("grid_png: no rows; evaluate at least one sample of the split first")
    write_bytes(path, to_png(draw_grid(rows)))
    return Path(path)


# The picture, in pixels: a margin, up to six thumbnails in 3 x 2, the prompt, then four images at twice 64 px.
MARGIN, GAP, THUMB, LARGE, PROMPT, ROW, HEAD, BAND = 24, 6, 61, 128, 190, 144, 46, 38
INK, SOFT, LINE, ACCENT = "#1d2229", "#69717c", "#e3e6ea", "#2f6fb0"
COLUMNS = ("Real target", "Right\nreferences", "Another group's\nreferences", "No\nreferences")


def draw_grid(rows: Sequence[GridRow]) -> Image.Image:
    first = MARGIN + 3 * (THUMB + GAP) + 14 + PROMPT
    lefts = [first + i * (LARGE + 14) + (22 if i else 0) for i in range(4)]  # a wider gap after the real target
    kinds = list(dict.fromkeys(row.kind for row in rows))
    height = MARGIN + HEAD + sum(BAND + ROW * sum(r.kind == k for r in rows) for k in kinds) + MARGIN // 2
    canvas = Image.new("RGB", (lefts[-1] + LARGE + MARGIN, height), "white")
    draw = ImageDraw.Draw(canvas)
    _headers(draw, lefts)
    y = MARGIN + HEAD
    for kind in kinds:
        _band(draw, canvas.width, y, KIND.get(kind, kind))
        y += BAND
        for row in (r for r in rows if r.kind == kind):
            _row(canvas, draw, row, y, lefts)
            y += ROW
    return canvas


def _headers(draw: ImageDraw.ImageDraw, lefts: list[int]) -> None:
    bottom = MARGIN + HEAD - 12
    draw.text((MARGIN, bottom), "References", INK, _font(14, True), anchor="ls")
    draw.text((lefts[0] - PROMPT, bottom), "Prompt", INK, _font(14, True), anchor="ls")
    for left, title in zip(lefts, COLUMNS, strict=True):
        lines = title.split("\n")
        for i, line in enumerate(lines):
            place = (left + LARGE / 2, bottom - 17 * (len(lines) - 1 - i))
            draw.text(place, line, ACCENT if title.startswith("Right") else INK, _font(14, True), anchor="ms")


def _band(draw: ImageDraw.ImageDraw, width: int, y: int, text: str) -> None:
    draw.rectangle((MARGIN, y, width - MARGIN, y + BAND - 12), fill="#f1f3f6")
    name, _, rest = text.partition(":")
    font = _font(13, True)
    draw.text((MARGIN + 10, y + (BAND - 12) / 2), name, INK, font, anchor="lm")
    draw.text((MARGIN + 18 + font.getlength(name), y + (BAND - 12) / 2), rest.strip(), SOFT, _font(13), anchor="lm")


def _row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: GridRow, y: int, lefts: list[int]) -> None:
    for i, image in enumerate(row.references[:6]):
        place = MARGIN + i % 3 * (THUMB + GAP), y + i // 3 * (THUMB + GAP)
        _paste(canvas, draw, image, *place, THUMB)
    if len(row.references) > 6:
        draw.text((MARGIN + 3 * (THUMB + GAP) - 2, y + LARGE + 2), f"+{len(row.references) - 6}", SOFT, _font(11), anchor="rt")
    font = _font(13)
    lines = _wrap(row.prompt, font, PROMPT - 24, 6)
    for i, line in enumerate(lines):
        draw.text((lefts[0] - PROMPT, y + LARGE / 2 + 18 * (i - (len(lines) - 1) / 2)), line, INK, font, anchor="lm")
    for left, image in zip(lefts, (row.target, row.right, row.shuffled, row.none), strict=True):
        _paste(canvas, draw, image, left, y, LARGE)
    draw.rectangle((lefts[1] - 2, y - 2, lefts[1] + LARGE + 1, y + LARGE + 1), outline=ACCENT, width=2)


def _paste(canvas: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int, side: int) -> None:
    """Centred in a square of `side` pixels, with a hair line round it."""
    image = image.convert("RGB")
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    canvas.paste(image, (x + (side - size[0]) // 2, y + (side - size[1]) // 2))
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline=LINE)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: the same picture on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", name)), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " …"]


def text_grid(pairs: Sequence[tuple[str, Image.Image, Image.Image]], columns: int = 6) -> Image.Image:
    """What the base draws from text alone: prompt, the real image it describes, and the one drawn, `columns` pairs a row."""
    width, caption = 2 * LARGE + GAP + 22, 54
    height = caption + LARGE + 18
    rows = -(-len(pairs) // columns)
    canvas = Image.new("RGB", (2 * MARGIN + columns * width - 22, 2 * MARGIN + HEAD // 2 + rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), "From text alone: prompt, a real image of it (left), what the base draws (right)", INK, _font(14, True))
    font = _font(12)
    for i, (prompt, real, drawn) in enumerate(pairs):
        x, y = MARGIN + i % columns * width, MARGIN + HEAD // 2 + i // columns * height
        words = "\n".join(_wrap(prompt, font, 2 * LARGE, 3))
        draw.text((x, y + caption - 6), words, INK, font, anchor="ld", spacing=3)
        _paste(canvas, draw, real, x, y + caption, LARGE)
        _paste(canvas, draw, drawn, x + LARGE + GAP, y + caption, LARGE)
    return canvas
