"""Inputs of coming microbatches, read while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
AHEAD = 2  # samples a worker, or microbatches, whichever is more


def ahead(
    order: Iterator[Sequence[int]], sample: Callable[[int], T], load: Callable[[T], object], workers: int
) -> Iterator[Sequence[int]]:
    """`order`, each microbatch once `load` is through with its samples, which so many threads do beforehand; with 0, when it is asked
    for. What `load` raises is raised at the microbatch that needs it, however far ahead it was read."""
    if not workers:
        for numbers in order:
            for number in numbers:
                load(sample(number))
            yield numbers
        return
    pool, coming = ThreadPoolExecutor(workers, "inputs"), deque[tuple[Sequence[int], list[Future]]]()
    try:
        while True:
            while len(coming) < AHEAD or sum(len(futures) for _, futures in coming) < AHEAD * workers:
                if (new := next(order, None)) is None:
                    break
                coming.append((new, [pool.submit(load, sample(number)) for number in new]))
            if not coming:
                return
            numbers, futures = coming.popleft()
            for future in futures:
                future.result()
            yield numbers
    finally:
        pool.shutdown(cancel_futures=True)
