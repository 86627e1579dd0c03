"""Training curves: the log of a training as the JSON tables that `dvc plots show` draws."""

from __future__ import annotations

import json
from pathlib import Path

from easyref.records import write_bytes


def write_curves(log: Path, folder: Path, name: str = "loss") -> None:
    """`folder/NAME.json`, loss and learning rate over the images seen, and `held_out.json` if the training validated."""
    rows = log.read_text().splitlines()
    for title, has_loss in ((name, True), ("held_out", False)):
        table = [row for row in rows if ("loss" in json.loads(row)) == has_loss]
        if table:
            write_bytes(folder / f"{title}.json", ("[\n" + ",\n".join(table) + "\n]\n").encode())
