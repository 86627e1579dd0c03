"""The last evaluation in a few lines; imports nothing heavy, so that a run with nothing to do ends in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyref.records import read_json

METHODS = ("easyref", "average", "concatenation", "lora", "text_only", "shuffled", "copy", "ceiling")


def summary(out: Path) -> str:
    """What the references bring, all methods in one Markdown table, and where to look."""
    result = read_json(out / "metrics" / "evaluate.json")
    lines = []
    for split in ("held_out", "held_in"):
        f = result[split]["fidelity"]
        if not f:
            continue
        s, n = f["right_minus_shuffled"], f["right_minus_none"]
        lines.append(
            f"{split}: fidelity {f['right']:.3f} with the right references; over another group's {s['mean']:+.3f} "
            f"[{s['low']:+.3f}, {s['high']:+.3f}], over none {n['mean']:+.3f} [{n['low']:+.3f}, {n['high']:+.3f}]"
        )
    path = out / "metrics" / "mrbench.json"
    if path.exists() and (compared := read_json(path))["settings"]["weights"] == result["settings"]["weights"]:
        lines += ["", *table("held out", compared["held_out"]), "", "report: reports/evaluation.html"]
    else:
        lines.append("report: none of these weights beside other methods yet; `easyref mrbench` makes it")
    return "\n".join([*lines, "picture: reports/grid.png"])


def table(title: str, entries: dict[str, Any]) -> list[str]:
    """A split of `metrics/mrbench.json`, or of another protocol, in Markdown: a method a row; fidelity, what EasyRef has over it, and
    the rest."""
    names = [name for name, entry in entries.items() if isinstance(entry, dict) and "easyref" in entry]
    first, *rest = names or [""]
    if not first:
        return []
    heads = [first.replace("_", " "), "EasyRef over it", *(name.replace("_", " ") for name in rest)]
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for method in (name for name in METHODS if name in entries[first]):
        gap = entries[first].get(f"easyref_minus_{method}")
        over = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else ""
        cells = [f"{entries[first][method]:.3f}", over, *(f"{entries[name][method]:.3f}" for name in rest)]
        lines.append(f"| {method.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines
