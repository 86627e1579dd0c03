"""Which vectors are alike, among any number of them: k-means cells, then exact cosines of a vector and the cells nearest to it.

A vector stands in the cell of its nearest centre and looks into the PROBES cells nearest to itself: what it is like may stand beyond
the border of its cell, on its own side of it. A pair counts that either of the two sees. Vectors are copied to disk cell by cell, so
that a cell is read in one piece; what memory holds of a vector is its cells and its `most` neighbours. The centres cost the square of
N, with a small factor: at 1e6 vectors a fifth of the time.
The result depends on the vectors and the seed only: every product has the same shape and one BLAS thread, whatever the workers.

Letters: N vectors · E width · M cells · P probes · n vectors of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easyref.progress import track
from easyref.seeds import numpy_rng

Array = np.ndarray[Any, np.dtype[Any]]

CELL = 512  # vectors of a cell, about
PROBES = 6  # cells that a vector looks into. Of planted pairs in topics of 500 to 30,000 vectors, 4 found .93 or more, 8 .984
SAMPLE = 32  # vectors a centre in the training of k-means
BLOCK = 4096  # vectors at once
FOUND = 2**22  # pairs that are collected before only the nearest are kept


@dataclass(frozen=True)
class Cells:
    """Vectors sorted by cell: unit vectors float16 [N, E] on disk, which vector stands at a place [N], where cells begin [M + 1],
    the cells that the vector at a place looks into [N, P]."""

    vectors_NE: Array
    which_N: Array
    begin_M: Array
    probes_NP: Array

    def __len__(self) -> int:
        return len(self.begin_M) - 1

    def rows(self, places: Array | slice) -> Array:
        """float32 [n, E]"""
        return np.asarray(self.vectors_NE[places], np.float32)


def make_cells(vectors_NE: Array, file: Path, seed: int = 0, workers: int = 1) -> Cells:
    """Divide unit vectors [N, E] (float16 or float32, may be memory-mapped) into cells; their sorted copy goes to `file`."""
    count = len(vectors_NE)
    number = max(1, round(count / CELL))
    drawn = np.sort(numpy_rng(seed, "cells").permutation(count)[: number * SAMPLE])
    centres_ME = kmeans(np.asarray(vectors_NE[drawn], np.float32), number, seed)
    blocks = _blocks(np.arange(count))

    def probes(block: int) -> Array:
        rows = np.asarray(vectors_NE[blocks[block]], np.float32)
        similar = rows @ centres_ME.T
        found = np.argpartition(-similar, min(PROBES, number) - 1, axis=1)[:, :PROBES]
        order = np.argsort(-np.take_along_axis(similar, found, 1), axis=1, kind="stable")
        return np.take_along_axis(found, order, 1).astype(np.int32)

    probes_NP = np.concatenate(list(track(_in_order(probes, len(blocks), workers), "cells", len(blocks), "blocks")))
    which_N = np.argsort(probes_NP[:, 0], kind="stable")
    sorted_NE = np.lib.format.open_memmap(file, "w+", np.float16, vectors_NE.shape)
    for block in blocks:
        sorted_NE[block] = vectors_NE[which_N[block]]
    sorted_NE.flush()
    return Cells(np.load(file, mmap_mode="r"), which_N, _begins(probes_NP[:, 0], number), probes_NP[which_N])


def similar_pairs(cells: Cells, threshold: float, most: int, workers: int = 1) -> tuple[Array, Array, Array]:
    """Pairs of vectors whose cosine is at least `threshold`, each within the `most` nearest of the other:
    numbers of the one [pairs], of the other [pairs] (the smaller first, sorted), and their cosine [pairs]."""
    count, looks = len(cells.which_N), cells.probes_NP.shape[1]
    lookers = np.argsort(cells.probes_NP, axis=None, kind="stable") // looks  # places by the cell that they look into
    begin_M = _begins(cells.probes_NP.ravel(), len(cells))

    def of_cell(cell: int) -> tuple[Array, Array]:
        """From either vector to the other: vector × N + neighbour, and the cosine."""
        place = slice(int(cells.begin_M[cell]), int(cells.begin_M[cell + 1]))
        rows = cells.rows(place)
        keys, cosines = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for here in _blocks(lookers[begin_M[cell] : begin_M[cell + 1]]):
            similar = cells.rows(here) @ rows.T
            i, j = np.nonzero(similar >= threshold)
            apart = here[i] != place.start + j
            i, j = i[apart], j[apart]
            one, other = cells.which_N[here[i]], cells.which_N[place.start + j]
            keys += [one * count + other, other * count + one]
            cosines += [similar[i, j]] * 2
        return np.concatenate(keys), np.concatenate(cosines)

    keys, cosines = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for key, cosine in track(_in_order(of_cell, len(cells), workers), "similar pairs", len(cells), "cells"):
        keys.append(key)
        cosines.append(cosine)
        if sum(map(len, keys[1:])) > max(FOUND, len(keys[0])):
            keys, cosines = ([kept] for kept in _nearest_ones(keys, cosines, most, count))
    key, cosine = _nearest_ones(keys, cosines, most, count)
    one, other = np.divmod(key, count)
    both = np.isin(key, other * count + one) & (one < other)
    return one[both], other[both], cosine[both]


def _nearest_ones(keys: list[Array], cosines: list[Array], most: int, count: int) -> tuple[Array, Array]:
    """Of each vector its `most` nearest neighbours, every one once, sorted."""
    key, first = np.unique(np.concatenate(keys), return_index=True)
    cosine = np.concatenate(cosines)[first]
    vector = key // count
    crowded = np.flatnonzero(np.bincount(vector, minlength=count)[vector] > most)
    order = crowded[np.lexsort((-cosine[crowded], vector[crowded]))]
    rank = np.arange(len(order)) - np.searchsorted(vector[order], vector[order])
    keep = np.ones(len(key), bool)
    keep[order[rank >= most]] = False
    return key[keep], cosine[keep]


def _begins(cell: Array, number: int) -> Array:
    """Where each of `number` cells begins among sorted cell numbers, and where the last ends."""
    return np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=number))])


def _blocks(places: Array) -> list[Array]:
    return [places[i : i + BLOCK] for i in range(0, len(places), BLOCK)]


def _in_order(function: Callable[[int], Any], count: int, workers: int) -> Iterator[Any]:
    """function(0), function(1) … in order, several at once; one BLAS thread each, so that the sums do not depend on `workers`."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        for start in range(0, count, 64):
            yield from pool.map(function, range(start, min(start + 64, count)))


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
            max_points_per_centroid=len(vectors_nE),
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
