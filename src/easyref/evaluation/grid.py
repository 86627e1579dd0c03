"""Pictures that show it: references, prompt, real target, and what each method drew.

Rows are chosen by a rule that the caption says, never by taste. All lengths are pixels; the pictures are meant to be read at 100 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from easyref.evaluation.generations import CONDITIONS, Case, Images, Load
from easyref.images import open_image, to_png
from easyref.records import write_bytes

KIND = {
    "subject": "Subject: one thing drawn in several styles; the prompt names the style",
    "person": "Person: one style, gender and skin tone in several roles; the prompt names the role",
    "style": "Style: one set of drawings; the prompt names the rest",
}


#: Of `reports/grid.png`.
COLUMNS = ("Right\nreferences", "Another group's\nreferences", "No\nreferences")


@dataclass(frozen=True)
class GridRow:
    """One sample of a picture; `made` in the order of the columns, `band` heads the rows that share it."""

    band: str
    prompt: str
    references: list[Image.Image]
    target: Image.Image
    made: list[Image.Image]


def grid_row(band: str, case: Case, images: Images, load: Load, methods: Iterable[str]) -> GridRow:
    made = [open_image(images[case, method]) for method in methods]
    return GridRow(band, case.prompt, [load(sha) for sha in case.right], load(case.target), made)


def grid_rows(cases: Sequence[Case], images: Images, load: Load, per_kind: int) -> list[GridRow]:
    """The first `per_kind` groups of each kind, in the order of `cases`, under the three conditions of `evaluate`."""
    rows: list[GridRow] = []
    for kind in dict.fromkeys([*KIND, *(case.kind for case in cases)]):
        first: dict[str, Case] = {}
        for case in cases:
            if case.kind == kind:
                first.setdefault(case.group_id, case)
        names = [method.name for method in CONDITIONS]
        rows += [grid_row(KIND.get(kind, kind), case, images, load, names) for case in list(first.values())[:per_kind]]
    return rows


def grid_png(rows: Sequence[GridRow], path: str | Path) -> Path:
    """Draw the rows: references, prompt, real target, and the three generations."""
    if not rows:
        raise ValueError("grid_png: no rows; evaluate at least one sample of the split first")
    write_bytes(path, to_png(draw_grid(rows, COLUMNS)))
    return Path(path)


# A margin, up to six thumbnails in 3 x 2, the prompt, then the images at `side` pixels.
MARGIN, GAP, LARGE, PROMPT, HEAD, BAND = 24, 6, 128, 190, 46, 38
INK, SOFT, LINE, ACCENT = "#1d2229", "#69717c", "#e3e6ea", "#2f6fb0"


def draw_grid(rows: Sequence[GridRow], columns: Sequence[str], side: int = LARGE) -> Image.Image:
    """`columns` are the titles of what was made, the first of them ours."""
    thumb, row_height = (side - GAP) // 2, side + 16
    first = MARGIN + 3 * (thumb + GAP) + 14 + PROMPT
    lefts = [first + i * (side + 14) + (22 if i else 0) for i in range(1 + len(columns))]  # a wider gap after the real target
    bands = list(dict.fromkeys(row.band for row in rows))
    height = MARGIN + HEAD + len(bands) * BAND + len(rows) * row_height + MARGIN // 2
    canvas = Image.new("RGB", (lefts[-1] + side + MARGIN, height), "white")
    draw = ImageDraw.Draw(canvas)
    _headers(draw, lefts, ("Real target", *columns), side)
    y = MARGIN + HEAD
    for band in bands:
        _band(draw, canvas.width, y, band)
        y += BAND
        for row in (r for r in rows if r.band == band):
            _row(canvas, draw, row, y, lefts, side, thumb)
            y += row_height
    return canvas


def _headers(draw: ImageDraw.ImageDraw, lefts: list[int], titles: Sequence[str], side: int) -> None:
    bottom, font = MARGIN + HEAD - 12, _font(14 if side >= LARGE else 11, True)
    draw.text((MARGIN, bottom), "References", INK, font, anchor="ls")
    draw.text((lefts[0] - PROMPT, bottom), "Prompt", INK, font, anchor="ls")
    for i, (left, title) in enumerate(zip(lefts, titles, strict=True)):
        lines = title.split("\n")
        for n, line in enumerate(lines):
            place = (left + side / 2, bottom - 17 * (len(lines) - 1 - n))
            draw.text(place, line, ACCENT if i == 1 else INK, font, anchor="ms")


def _band(draw: ImageDraw.ImageDraw, width: int, y: int, text: str) -> None:
    draw.rectangle((MARGIN, y, width - MARGIN, y + BAND - 12), fill="#f1f3f6")
    name, _, rest = text.partition(":")
    font = _font(13, True)
    draw.text((MARGIN + 10, y + (BAND - 12) / 2), name, INK, font, anchor="lm")
    draw.text((MARGIN + 18 + font.getlength(name), y + (BAND - 12) / 2), rest.strip(), SOFT, _font(13), anchor="lm")


def _row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: GridRow, y: int, lefts: list[int], side: int, thumb: int) -> None:
    for i, image in enumerate(row.references[:6]):
        place = MARGIN + i % 3 * (thumb + GAP), y + i // 3 * (thumb + GAP)
        _paste(canvas, draw, image, *place, thumb)
    if len(row.references) > 6:
        draw.text((MARGIN + 3 * (thumb + GAP) - 2, y + side + 2), f"+{len(row.references) - 6}", SOFT, _font(11), anchor="rt")
    font = _font(13)
    lines = _wrap(row.prompt, font, PROMPT - 24, side // 20)
    for i, line in enumerate(lines):
        draw.text((lefts[0] - PROMPT, y + side / 2 + 18 * (i - (len(lines) - 1) / 2)), line, INK, font, anchor="lm")
    for left, image in zip(lefts, (row.target, *row.made), strict=True):
        _paste(canvas, draw, image, left, y, side)
    draw.rectangle((lefts[1] - 2, y - 2, lefts[1] + side + 1, y + side + 1), outline=ACCENT, width=2)


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
