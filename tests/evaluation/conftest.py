"""168 real emoji as a tiny data set: 24 things in five styles, 8 roles in two styles and three skin tones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Emoji:
    images: pl.DataFrame
    samples: pl.DataFrame
    pixels: dict[str, Image.Image]

    def load(self, sha: str) -> Image.Image:
        return self.pixels[sha]


@pytest.fixture(scope="session")
def emoji() -> Emoji:
    about = json.loads((HERE / "emoji.json").read_text())
    sheet = Image.open(HERE / "emoji.png").convert("RGB")
    pixels = {}
    for i in range(len(about["images"])):
        x, y = i % 24 * 64, i // 24 * 64
        image = sheet.crop((x, y, x + 64, y + 64))
        pixels[hashlib.sha256(image.tobytes()).hexdigest()] = image
    table = pl.DataFrame(about["images"], schema=about["columns"], orient="row")
    table = table.with_columns(pl.lit("emoji").alias("category"), sha256=pl.Series(list(pixels)))
    return Emoji(table, samples_of(table), pixels)


def samples_of(images: pl.DataFrame) -> pl.DataFrame:
    """Leave-one-out samples of the three kinds, two to five references each."""
    rows = []
    for split in ("held_out", "held_in"):
        own = images.filter(pl.col("split") == split)
        things, people = own.filter(pl.col("tone") == ""), own.filter(pl.col("tone") != "")
        keys = {"subject": (things, ["concept"]), "person": (people, ["style", "tone"]), "style": (things, ["style"])}
        for kind, (table, key) in keys.items():
            for _, group in table.sort("sha256").group_by(key, maintain_order=True):
                members = group.to_dicts()
                name = "/".join([split, kind, *(members[0][k] for k in key)])
                for n, target in enumerate(members[:2]):
                    references = [m["sha256"] for m in members if m is not target][:5]
                    hidden = "emoji, " + target["style"] if kind == "subject" else target["subject"]
                    sample = (f"{name}-{n}", name, kind, split, target["sha256"], references, hidden)
                    rows.append(
                        dict(
                            zip(
                                ("sample_id", "group_id", "kind", "split", "target", "references", "prompt"),
                                sample,
                                strict=True,
                            )
                        )
                    )
    return pl.DataFrame(rows)


def groups_of(images: pl.DataFrame) -> pl.DataFrame:
    """The things of each style, as groups of the kind style."""
    rows = [
        {"group_id": f"{split}/style/{style}", "kind": "style", "split": split, "members": sorted(group["sha256"])}
        for (split, style), group in images.filter(pl.col("tone") == "").group_by("split", "style")
    ]
    return pl.DataFrame(sorted(rows, key=lambda row: row["group_id"]))
