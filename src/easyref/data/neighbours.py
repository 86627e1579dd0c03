"""Which vectors are alike, among any number of them: k-means cells, then exact similarity inside a cell and its neighbours.

Two levels of k-means keep the cost linear: the cells of the first hold about the square root of all cells, and each is divided by
itself. Vectors are copied to disk cell by cell, so that a cell is read in one piece and memory does not grow with their number.
The result depends on the vectors and the seed only: every product has the same shape and one BLAS thread, whatever the workers.

Letters: N vectors · E width · M cells · n vectors of a cell · K neighbours of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easyref.progress import track

Array = np.ndarray[Any, np.dtype[Any]]

CELL = 256  # vectors of a cell, about
AROUND = 64  # neighbouring cells that are searched too, and those whose neighbour a cell is
TOP_SAMPLE, SAMPLE = 1024, 64  # vectors a centre in the training of k-means, of the first and the second level
BLOCK = 16384  # vectors at once


@dataclass(frozen=True)
class Cells:
    """Vectors sorted by cell: unit vectors float16 [N, E] on disk, which vector stands at a place [N], where cells begin [M + 1],
    their centres [M, E]."""

    vectors_NE: Array
    which_N: Array
    begin_M: Array
    centres_ME: Array

    def place(self, cell: int) -> slice:
        return slice(int(self.begin_M[cell]), int(self.begin_M[cell + 1]))

    def rows(self, cell: int) -> Array:
        """float32 [n, E]"""
        return np.asarray(self.vectors_NE[self.place(cell)], np.float32)


def make_cells(vectors_NE: Array, file: Path, seed: int = 0) -> Cells:
    """Divide unit vectors [N, E] (float16 or float32, may be memory-mapped) into cells; their sorted copy goes to `file`."""
    count = len(vectors_NE)
    upper = max(1, round((count / CELL) ** 0.5))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(count)[: upper * TOP_SAMPLE])
    top_centres = kmeans(np.asarray(vectors_NE[chosen], np.float32), upper, seed)
    top_N = np.concatenate([nearest(np.asarray(vectors_NE[i : i + BLOCK], np.float32), top_centres) for i in range(0, count, BLOCK)])
    sorted_NE = np.lib.format.open_memmap(file, "w+", np.float16, vectors_NE.shape)
    which, sizes, centres, done = [], [], [], 0
    for top in range(len(top_centres)):
        inside = np.flatnonzero(top_N == top)
        if not len(inside):
            continue
        lower = max(1, round(len(inside) / CELL))
        drawn = np.sort(np.random.default_rng([seed, top]).permutation(inside)[: lower * SAMPLE])
        own = kmeans(np.asarray(vectors_NE[drawn], np.float32), lower, seed)
        parts = [inside[i : i + BLOCK] for i in range(0, len(inside), BLOCK)]
        cell = np.concatenate([nearest(np.asarray(vectors_NE[part], np.float32), own) for part in parts])
        for number in range(len(own)):
            members = inside[cell == number]
            if len(members):
                rows = np.asarray(vectors_NE[members])
                sorted_NE[done : done + len(members)] = rows
                done += len(members)
                which.append(members)
                sizes.append(len(members))
                centres.append(rows.astype(np.float32).mean(0))
    begin = np.concatenate([[0], np.cumsum(sizes)])
    sorted_NE.flush()
    return Cells(np.load(file, mmap_mode="r"), np.concatenate(which), begin, np.stack(centres))


def similar_pairs(cells: Cells, threshold: float, most: int, workers: int = 1) -> tuple[Array, Array, Array]:
    """Pairs of vectors whose cosine is at least `threshold`, each within the `most` nearest of the other:
    numbers of the one [P], of the other [P] (the smaller first, sorted), and their cosine [P]."""
    near = _cells_around(cells.centres_ME)

    def of_cell(cell: int) -> tuple[Array, Array, Array]:
        others = near[cell]
        there = np.concatenate([np.arange(cells.begin_M[c], cells.begin_M[c + 1]) for c in others])
        rows = np.concatenate([cells.rows(c) for c in others])
        return _join([_most_similar(rows, there, here, cells, threshold, most) for here in _blocks(cells.place(cell), 1024)])

    count = len(cells.centres_ME)
    here, there, cosine = _join(list(track(_in_order(of_cell, count, workers), "similar pairs", count, "cells")))
    one, other = cells.which_N[here], cells.which_N[there]
    low, high = np.minimum(one, other).astype(np.int64), np.maximum(one, other)
    key = low * len(cells.which_N) + high
    order = np.argsort(key, kind="stable")
    key, cosine = key[order], cosine[order]
    both = np.flatnonzero(key[1:] == key[:-1])  # seen from either side
    return key[both] // len(cells.which_N), key[both] % len(cells.which_N), cosine[both]


def _most_similar(rows: Array, there: Array, here: Array, cells: Cells, threshold: float, most: int) -> tuple[Array, Array, Array]:
    """Places `here` and those of `there` (with their `rows`) that are alike, and their cosine."""
    similar = np.asarray(cells.vectors_NE[here[0] : here[-1] + 1], np.float32) @ rows.T
    similar[here[:, None] == there[None]] = -2
    if similar.shape[1] > most:  # all but the nearest are out
        limit = np.partition(similar, -most, axis=1)[:, -most]
        similar[similar < limit[:, None]] = -2
    i, j = np.nonzero(similar >= threshold)
    return here[i], there[j], similar[i, j]


def _join(found: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    one, other, cosine = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return one, other, cosine


def _blocks(place: slice, size: int) -> list[Array]:
    return [np.arange(i, min(i + size, place.stop)) for i in range(place.start, place.stop, size)]


def _in_order(function: Any, count: int, workers: int) -> Iterator[Any]:
    """function(0), function(1) … in order, several at once; one BLAS thread each, so that the sums do not depend on `workers`."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, 64):
            yield from pool.map(function, range(start, min(start + 64, count)))


def _cells_around(centres_ME: Array) -> list[list[int]]:
    """For each cell itself, its nearest ones, and those that it is one of the nearest of: a pair must be seen from either side."""
    unit = centres_ME / np.maximum(np.linalg.norm(centres_ME, axis=1, keepdims=True), 1e-12)
    count = min(len(unit), 1 + AROUND)
    around: list[set[int]] = [set() for _ in unit]
    for start in range(0, len(unit), 1024):
        similar = unit[start : start + 1024] @ unit.T
        similar[np.arange(len(similar)), np.arange(start, start + len(similar))] = 2
        for cell, nearest_ones in enumerate(np.argpartition(-similar, count - 1, axis=1)[:, :count].tolist(), start):
            around[cell].update(nearest_ones)
            for other in nearest_ones:
                around[other].add(cell)
    return [sorted(cells) for cells in around]


def kmeans(vectors_nE: Array, count: int, seed: int) -> Array:
    """Centres [M, E] of unit vectors by cosine."""
    import faiss

    if count == 1 or len(vectors_nE) <= count:
        return vectors_nE.mean(0, keepdims=True) if count == 1 else vectors_nE
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            vectors_nE.shape[1], count, niter=10, seed=seed + 1, spherical=True, min_points_per_centroid=1,
            max_points_per_centroid=TOP_SAMPLE,
        )  # fmt: skip
        kmeans.train(np.ascontiguousarray(vectors_nE))
    finally:
        faiss.omp_set_num_threads(threads)
    return np.asarray(kmeans.centroids)


def nearest(vectors_nE: Array, centres_ME: Array) -> Array:
    """Which centre is nearest, [n]."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return (vectors_nE @ centres_ME.T).argmax(1).astype(np.int32)
