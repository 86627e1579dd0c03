"""reports/evaluation.html: what evaluate.json says, in plain words, tables and pictures. One self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from easyref.evaluation.evaluate import COPY_THRESHOLD
from easyref.evaluation.grid import KIND, GridRow, draw_grid, grid_png, grid_rows
from easyref.evaluation.page import PAGE
from easyref.page import data_uri, picture, render
from easyref.records import write_bytes

__all__ = ["GridRow", "grid_png", "grid_rows", "write_report"]

LABEL = {
    "fidelity": "Fidelity to the target",
    "reference_fidelity": "Fidelity to the references",
    "style": "Right style",
    "tone": "Right skin tone",
    "concept": "Right concept",
    "text_alignment": "Fits the prompt",
}
MEANING = {
    "fidelity": "Cosine of centred EfficientNet-Lite0 features, generated image against the real target.",
    "reference_fidelity": "The same against the right references, mean over them.",
    "style": "Share of images whose drawing style a probe takes for the target's.",
    "tone": "Share of images whose skin tone a probe takes for the target's; people with a skin tone only.",
    "concept": "Share of images nearest to the target's concept among all concepts of the split.",
    "text_alignment": "Cosine of image and prompt in a small dual encoder trained on the training captions.",
}
SPLIT = {
    "held_out": "Held-out groups (concepts never seen in training)",
    "held_in": "Held-in groups (seen in training)",
}
SHADES = {"none": "#b9bec6", "shuffled": "#d9a05b", "right": "#2f6fb0", "ceiling": "#4d5661"}
SHOWN = {
    "none": "no references",
    "shuffled": "another group's references",
    "right": "right references",
    "ceiling": "real image",
}


def write_report(result: dict[str, Any], rows: Sequence[GridRow], path: str | Path) -> Path:
    """Write the HTML report of `evaluate`'s result; `rows` may be empty."""
    splits = [s for s in SPLIT if any(result[s].get(name) for name in LABEL)]
    html = render(
        PAGE,
        {"num": _number, "gap": _interval, "pct": _percent},
        result=result,
        splits=splits,
        headlines=[_headline(result, s, name) for s in splits for name in LABEL if result[s].get(name)],
        plots={s: data_uri(_plot(result[s])) for s in splits},
        grid=data_uri(draw_grid(rows)) if rows else "",
        per_kind=max((sum(r.kind == k for r in rows) for k in KIND), default=0),
        copied={"right": "right references", "none": "no references", "real": "real targets"},
        copy_threshold=COPY_THRESHOLD,
        split_title=SPLIT,
        kind_title=KIND,
        label=LABEL,
        meaning=MEANING,
    )
    write_bytes(path, html)
    return Path(path)


def _headline(result: dict[str, Any], split: str, name: str) -> dict[str, str]:
    """One metric in plain words."""
    entry = result[split][name]
    gap = entry["right_minus_shuffled"]
    verdict = "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else ""
    against = f"{verdict} than with" if verdict else "not measurably different from"
    words = (
        f"With the right references {_number(entry['right'])}, {against} another group's "
        f"({_number(entry['shuffled'])}): difference {_interval(gap)}. "
        f"Without references {_number(entry['none'])}, a real image {_number(entry['ceiling'])}."
    )
    about = {"split": split, "label": LABEL[name], "words": words, "covered": _percent(entry["covered"])}
    return {**about, "verdict": verdict, "tag": verdict or "no difference"}


def _plot(entries: dict[str, Any]) -> Image.Image:
    """Each metric between none, shuffled, right and the real image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in LABEL if entries.get(name)]
    figure, axes = plt.subplots(figsize=(8.6, 0.62 * len(names) + 0.9), dpi=120)
    for i, name in enumerate(names):
        values = {condition: entries[name][condition] for condition in SHADES}
        span = min(values.values()), max(values.values())
        axes.plot(span, [i, i], color="#dfe3e8", linewidth=5, zorder=1, solid_capstyle="round")
        for condition, value in values.items():
            shape: dict[str, Any] = {"marker": "|", "s": 190, "linewidth": 3} if condition == "ceiling" else {"marker": "o", "s": 62}
            label = SHOWN[condition] if i == 0 else None
            axes.scatter(value, i, color=SHADES[condition], label=label, zorder=3, **shape)
    axes.set_yticks(range(len(names)), [LABEL[name] for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.12)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eef0f3")
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, frameon=False, fontsize=9, handletextpad=0.3)
    return picture(figure)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
