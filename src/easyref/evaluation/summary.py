"""The last evaluation in a few lines; imports nothing heavy, so that a run with nothing to do ends in seconds."""

from __future__ import annotations

from pathlib import Path

from easyref.records import read_json


def summary(out: Path) -> str:
    """The result in three lines: what the references bring, and where to look."""
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
    return "\n".join([*lines, "report: reports/evaluation.html", "picture: reports/grid.png"])
