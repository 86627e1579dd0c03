"""The images of a split in memory, with labels, sampling weights and groups; what every training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from easyref.data.captions import caption
from easyref.data.frames import Corners
from easyref.data.shards import ImageStore
from easyref.records import FACE_COLUMNS, read_table, sha256_json


def centre(image: Image.Image) -> Image.Image:
    """The largest square in the middle. (Buckets by aspect would keep the rest.)"""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


#: Orders of red, green and blue, the usual one first. A view of an image is one of them, mirrored or not.
SWAPS = tuple(permutations(range(3)))


def seen_as(image: Image.Image, view: int) -> Image.Image:
    """View 0 is the image itself; 1..5 have its colours swapped; 6..11 are mirrored."""
    mirrored, swap = divmod(view, len(SWAPS))
    if swap:
        image = Image.merge("RGB", [image.getchannel(c) for c in SWAPS[swap]])
    return ImageOps.mirror(image) if mirrored else image


class TrainingImages:
    """Labels, weights that keep frequent concepts in check, and pixels uint8 [N, H, W, 3] for the trainings that read them all.

    Without `sha256s`: the training split and its groups. With: exactly those images, no groups.
    """

    def __init__(self, data: Path, sha256s: Sequence[str] | None = None) -> None:
        self.store = ImageStore(data / "images")
        splits = dict(read_table(data / "split" / "images.parquet", ("sha256", "split")).iter_rows())
        if not splits.keys() >= self.store.rows.keys():
            raise ValueError(f"{data / 'split'} is of other images than those ingested; run `easyref group` and `easyref split` again")
        self.sha256s = list(sha256s) if sha256s is not None else [s for s in self.store.rows if splits[s] == "train"]
        self.labels = [self.store.rows[s] for s in self.sha256s]
        counts = Counter(label["concept"] for label in self.labels)
        self.weights = np.array([counts[label["concept"]] ** -0.5 for label in self.labels])
        self.groups: list[tuple[str, list[int]]] = []
        if sha256s is None:
            place = {s: i for i, s in enumerate(self.sha256s)}
            table = read_table(data / "split" / "groups.parquet").filter(split="train").sort("group_id")
            self.groups = [(g["kind"], [place[m] for m in g["members"]]) for g in table.iter_rows(named=True)]
        self.faces = self._faces(data / "split" / "faces.parquet")
        self.content = sha256_json([self.sha256s, [caption(label, hide=()) for label in self.labels], self.groups])

    def _faces(self, path: Path) -> dict[int, Corners]:
        """Image → box of its face, of those that have one."""
        table = read_table(path, FACE_COLUMNS).select(FACE_COLUMNS) if path.exists() else None
        boxes = {sha256: corners for sha256, *corners in table.iter_rows()} if table is not None else {}
        return {i: tuple(boxes[s]) for i, s in enumerate(self.sha256s) if s in boxes}

    @cached_property
    def pixels(self) -> np.ndarray:
        return np.stack([np.asarray(centre(self.store.image(s))) for s in self.sha256s])

    def batch(self, items: Sequence[int]) -> torch.Tensor:
        """Pixels in [-1, 1], float32 [B, 3, H, W]."""
        return torch.from_numpy(self.pixels[list(items)]).permute(0, 3, 1, 2).float() / 127.5 - 1
