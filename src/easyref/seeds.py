"""Randomness by purpose: every draw comes from (seed, purpose, image number …), never from a hidden global generator.

So the same seed gives the same result for any batch size, and a resumed run needs no saved generator state.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*key: object) -> int:
    """A 63-bit seed from a key such as (seed, "noise", image_number)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "little") >> 1


def torch_rng(*key: object) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed_of(*key))


def numpy_rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(seed_of(*key))


class Order:
    """An endless order over items 0..N-1: image number → item. Each pass of N draws visits item i in proportion to
    `weights[i]`, rounded at random without bias (systematic sampling), in a fresh permutation."""

    def __init__(self, weights: np.ndarray, *key: object) -> None:
        self.cumulative = np.cumsum(np.asarray(weights, dtype=np.float64))
        self.key = key
        self._pass, self._items = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.cumulative)

    def __getitem__(self, number: int) -> int:
        which, place = divmod(number, len(self))
        if which != self._pass:
            rng = numpy_rng(*self.key, "order", which)
            points = (np.arange(len(self)) + rng.random()) / len(self) * self.cumulative[-1]
            self._items = rng.permutation(np.minimum(np.searchsorted(self.cumulative, points, side="right"), len(self) - 1))
            self._pass = which
        return int(self._items[place])
