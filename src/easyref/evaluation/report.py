"""reports/evaluation.html: what mrbench.json says, in plain words, tables, plots and pictures. One self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from easyref.evaluation.evaluate import Evaluated
from easyref.evaluation.generations import Load
from easyref.evaluation.grid import KIND, GridRow, draw_grid, grid_row
from easyref.evaluation.judges import COPY_THRESHOLD
from easyref.evaluation.mrbench import COMPARISON
from easyref.evaluation.page import PAGE
from easyref.images import to_png
from easyref.page import data_uri, picture, render
from easyref.records import write_bytes

LABEL = {
    "fidelity": "Fidelity to the target",
    "reference_fidelity": "Fidelity to the references",
    "style": "Right style",
    "tone": "Right skin tone",
    "concept": "Right concept",
    "text_alignment": "Fits the prompt",
    "clip_i": "CLIP-I",
    "dino_i": "DINO-I",
    "clip_t": "CLIP-T",
    "face_i": "Face",
}
MEANING = {
    "fidelity": "Cosine of centred EfficientNet-Lite0 features, generated image against the real target.",
    "reference_fidelity": "The same against the right references, mean over them.",
    "style": "Share of images whose drawing style a probe takes for the target's.",
    "tone": "Share of images whose skin tone a probe takes for the target's; people with a skin tone only.",
    "concept": "Share of images nearest to the target's concept among all concepts of the split.",
    "text_alignment": "Cosine of image and prompt in a small dual encoder trained on the training captions.",
    "clip_i": "Cosine of CLIP image features, generated image against the real target.",
    "dino_i": "Cosine of DINOv2 features, generated image against the real target.",
    "clip_t": "Cosine of CLIP features of image and prompt.",
    "face_i": "Cosine of ArcFace features, generated image against the real target.",
}
SPLIT = {
    "held_out": "Held-out groups (concepts never seen in training)",
    "held_in": "Held-in groups (seen in training)",
}
#: Name in tables and pictures, colour, what it is.
METHOD = {
    "easyref": ("EasyRef", "#2f6fb0", "the MLLM reads all references at once"),
    "average": ("Average", "#3d9a8b", "EasyRef's encoder reads each reference alone; mean of their tokens, as IP-Adapter does"),
    "concatenation": ("Concatenation", "#7cb342", "the same, all their tokens side by side"),
    "lora": ("LoRA", "#a05fb4", "no EasyRef: a LoRA of the base UNet, tuned on the sample's references"),
    "shuffled": ("Shuffled", "#d9a05b", "EasyRef with as many references of another group"),
    "text_only": ("Text only", "#9aa1ab", "EasyRef without references"),
    "copy": ("Copy", "#c0504d", "a reference itself, nothing drawn"),
    "ceiling": ("Real image", "#4d5661", "the real target; for fidelity, the other real members of the group"),
}
#: The paper's ablation of how references are read, and its MRBench table (method.md §7): CLIP-I, CLIP-T, DINO-I.
PAPER = {
    "easyref": (0.833, 0.709, 0.614),
    "average": (0.818, 0.688, 0.584),
    "concatenation": (0.821, 0.692, 0.579),
}
#: The conditions of `evaluate`, and whose colours they have.
CONDITION = {"right": "easyref", "shuffled": "shuffled", "none": "text_only"}
DRAWN = tuple(name for name in METHOD if name not in ("copy", "ceiling"))
ROWS = 5  # of each rule of the grid


def write_report(found: Evaluated, load: Load, path: str | Path, about: dict[str, str], emoji: bool) -> Path:
    """Write the HTML report of `mrbench`. `about`: what it was made with, by name. `emoji`: the images are those that come inside."""
    result = found.result
    splits = [s for s in SPLIT if defined(result[s])]
    shown = {s: defined(result[s]) for s in splits}
    rows = chosen_rows(found, load)
    html = render(
        PAGE,
        {
            "num": number,
            "gap": interval,
            "pct": percent,
            "verdict": verdict,
            "defined": defined,
        },
        result=result,
        splits=splits,
        shown=shown,
        methods=METHOD,
        others=[m for m in METHOD if m not in ("easyref", "ceiling")],
        plots={s: data_uri(_plot(result[s], shown[s])) for s in splits},
        counts=data_uri(_count_plot(result["counts"])) if result["counts"] else "",
        grid=data_uri(draw_grid(rows, [METHOD[m][0] for m in DRAWN], side=96)) if rows else "",
        rows=ROWS,
        copy_threshold=COPY_THRESHOLD,
        split_title=SPLIT,
        kind_title=KIND,
        label=LABEL,
        meaning=MEANING,
        paper=PAPER,
        about=about,
        emoji=emoji,
    )
    write_bytes(path, html)
    return Path(path)


def chosen_rows(found: Evaluated, load: Load) -> list[GridRow]:
    """Held-out samples: the first of the order, and those of the highest and lowest fidelity of EasyRef, each sample once."""
    cases = found.cases["held_out"]
    if not cases:
        return []
    fidelity = found.scores["held_out"]["fidelity"][COMPARISON.own]
    ranked = sorted(range(len(cases)), key=lambda i: -fidelity[i])
    rules = {"First: in the seeded order of the evaluation": list(range(len(cases)))[:ROWS]}
    rest = [i for i in ranked if i not in next(iter(rules.values()))]
    rules["Best: EasyRef's highest fidelity to the target"] = rest[:ROWS]
    rules["Worst: EasyRef's lowest fidelity to the target"] = rest[ROWS:][-ROWS:]
    return [grid_row(band, cases[i], found.images, load, DRAWN) for band, chosen in rules.items() for i in chosen]


def _plot(entries: dict[str, Any], names: Sequence[str]) -> Image.Image:
    """A panel for each metric: every method's mean with its interval, and the real image as a line."""
    plt = _pyplot()
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(9.6, 2.35 * rows + 0.2), dpi=120, sharey=True, squeeze=False)
    methods = [m for m in METHOD if m != "ceiling"]
    for panel, name in zip(panels.flat, names, strict=False):
        entry = entries[name]
        panel.axvline(entry["ceiling"], color=METHOD["ceiling"][1], linewidth=1, linestyle=(0, (4, 3)))
        for y, method in enumerate(methods):
            low, high = entry["intervals"][method]
            panel.plot([low, high], [y, y], color=METHOD[method][1], linewidth=2.2, alpha=0.55, solid_capstyle="round")
            panel.scatter(entry[method], y, color=METHOD[method][1], s=34 if method == "easyref" else 24, zorder=3)
        panel.set_title(LABEL[name], fontsize=10, loc="left")
        panel.set_yticks(range(len(methods)), [METHOD[m][0] for m in methods], fontsize=9)
        _tidy(panel)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    panels[0, 0].invert_yaxis()
    figure.tight_layout()
    return picture(figure)


def ablation_png(name: str, variants: dict[str, Any]) -> bytes:
    """A panel for each metric: the right, shuffled and no references of every variant, with intervals."""
    plt = _pyplot()
    names = [metric for metric in LABEL if all(entry.get(metric) for entry in variants.values())]
    columns = min(3, len(names))
    rows, height = -(-len(names) // columns), 0.75 + 0.42 * len(variants)
    figure, panels = plt.subplots(rows, columns, figsize=(9.6, height * rows + 0.4), dpi=120, sharey=True, squeeze=False)
    for panel, metric in zip(panels.flat, names, strict=False):
        for shift, (condition, like) in zip((-0.2, 0.0, 0.2), CONDITION.items(), strict=True):
            for y, entry in enumerate(variants.values()):
                colour, (low, high) = METHOD[like][1], entry[metric]["intervals"][condition]
                panel.plot([low, high], [y + shift] * 2, color=colour, linewidth=2, alpha=0.5, solid_capstyle="round")
                panel.scatter(entry[metric][condition], y + shift, color=colour, s=20, zorder=3, label=condition if not y else None)
        panel.set_title(LABEL[metric], fontsize=10, loc="left")
        panel.set_yticks(range(len(variants)), list(variants), fontsize=9)
        panel.locator_params(axis="x", nbins=5)
        _tidy(panel)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    panels[0, 0].invert_yaxis()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="upper right")
    figure.suptitle(name, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    return to_png(picture(figure))


def _count_plot(counts: dict[str, Any]) -> Image.Image:
    """A panel for each metric: EasyRef and the average over the number of references, with intervals."""
    plt = _pyplot()
    numbers = [int(count) for count in counts]
    names = [name for name in LABEL if all(entry.get(name) for entry in counts.values())]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(9.6, 2.3 * rows + 0.3), dpi=120, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        for method in ("easyref", "average"):
            title, colour, _ = METHOD[method]
            entries = [entry[name] for entry in counts.values()]
            low, high = zip(*(e["intervals"][method] for e in entries), strict=True)
            panel.fill_between(numbers, low, high, color=colour, alpha=0.13, linewidth=0)
            panel.plot(numbers, [e[method] for e in entries], color=colour, marker="o", markersize=4, label=title)
        panel.set_xscale("log", base=2)
        panel.set_xticks(numbers, [str(n) for n in numbers])
        panel.set_title(LABEL[name], fontsize=10, loc="left")
        _tidy(panel, "y")
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    panels[0, 0].legend(frameon=False, fontsize=9)
    figure.supxlabel("references given", fontsize=9)
    figure.tight_layout()
    return picture(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _tidy(panel: Any, axis: str = "x") -> None:
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(length=0, labelsize=9)
    panel.grid(axis=axis, color="#eef0f3")
    panel.set_axisbelow(True)


def defined(entries: dict[str, Any]) -> list[str]:
    """The metrics that have an entry."""
    return [name for name in LABEL if entries.get(name)]


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def interval(gap: dict[str, float]) -> str:
    return f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"


def verdict(gap: dict[str, float]) -> str:
    """Empty too where the interval has no width: it is of one group, which says nothing of others."""
    return "" if gap["low"] == gap["high"] else "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else ""
