"""Reading ahead: the order stays, what is read stays within its bound, and a failure comes at its own microbatch."""

import threading
import time
from collections.abc import Sequence

import pytest

from easyref.training.ahead import AHEAD, ahead

ORDER: list[Sequence[int]] = [range(start, start + 3) for start in range(0, 60, 3)]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_each_microbatch_comes_when_its_samples_are_loaded(workers: int) -> None:
    asked, loaded = list[int](), set[int]()
    seen = []

    def sample(number: int) -> int:
        asked.append(number)
        return number

    for numbers in ahead(iter(ORDER), sample, lambda number: (time.sleep(0.001), loaded.add(number)), workers):
        assert set(numbers) <= loaded
        assert len(asked) <= numbers[-1] + 1 + (max(AHEAD * 3, AHEAD * workers + 3) if workers else 0)
        seen.append(numbers)
    assert seen == ORDER and loaded == set(range(60)) and asked == [*range(60)]


def test_the_next_ones_are_loaded_while_one_is_used() -> None:
    ready = threading.Event()
    feed = ahead(iter(ORDER), int, lambda number: number == 5 and ready.set(), 1)
    assert next(feed) == ORDER[0]
    assert ready.wait(10)  # image 5 is of the second


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_raised_at_the_microbatch_that_needs_it(workers: int) -> None:
    def load(number: int) -> None:
        if number == 7:
            raise ValueError("images-00000.tar: bytes do not match")

    feed = ahead(iter(ORDER), int, load, workers)
    assert [next(feed), next(feed)] == ORDER[:2]
    with pytest.raises(ValueError, match=r"images-00000\.tar"):
        next(feed)


def test_leaving_early_ends_the_threads() -> None:
    before = threading.active_count()
    feed = ahead(iter(ORDER), int, lambda _: time.sleep(0.001), 4)
    next(feed)
    assert threading.active_count() > before
    feed.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
