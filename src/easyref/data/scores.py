"""Images that models of `ingest.scores` say are not wanted: rejected, for the first reason that holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from easyref.config import Ingest
from easyref.data.check import Checked, Rejected, image_limits
from easyref.data.sources import Found
from easyref.images import open_image

BATCH = 32  # images at once


class Scores:
    """Results of the check → the same, of which good ones may now be rejected. Off, it loads and does nothing."""

    def __init__(self, p: Ingest) -> None:
        self.scores, self.limits, self.models = p.scores, image_limits(p.limits), {}
        if p.scores:
            from easyref.data.hub import HubScores

            self.models = {reason: HubScores(score, f"ingest.scores.{reason}") for reason, score in p.scores.items()}

    def __call__(self, found: Sequence[Found], checked: Iterable[Checked | Rejected]) -> Iterator[Checked | Rejected]:
        pairs = zip(found, checked, strict=True)
        while batch := list(islice(pairs, BATCH if self.models else 1)):
            results = [result for _, result in batch]
            for reason, model in self.models.items():
                good = {
                    i: open_image(result.data, limits=self.limits) for i, result in enumerate(results) if isinstance(result, Checked)
                }
                for i, value in zip(good, model(list(good.values())) if good else (), strict=True):
                    results[i] = self._judged(batch[i][0], results[i], reason, value)
            yield from results

    def _judged(self, found: Found, checked: Checked | Rejected, reason: Any, value: float) -> Checked | Rejected:
        score = self.scores[reason]
        low, high = -math.inf if score.min is None else score.min, math.inf if score.max is None else score.max
        if low <= value <= high:
            return checked
        return Rejected(reason, f"{found.name}: {reason} {value:.3f} is not from {low:g} to {high:g} (ingest.scores.{reason})")
