"""Which vectors are alike, among any number of them: k-means cells, then exact cosines of a vector and the cells nearest to it.

A vector stands in the cell of its nearest centre and looks into the PROBES cells nearest to itself: what it is like may stand beyond
the border of its cell, on its own side of it. A pair counts that either of the two sees. Everything that is as long as the vectors are
many lies in files, cell by cell; what memory holds of a vector is some numbers and its `most` neighbours. The centres cost the square
of N, with a small factor: at 1e6 vectors a fifth of the time.
The result depends on the vectors and the seed only: every product has the same shape and one BLAS thread, whatever runs the jobs.

Letters: N vectors · E width · M cells · P probes · n vectors of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from easyref.data import engine
from easyref.progress import track
from easyref.records import atomic_path
from easyref.seeds import numpy_rng

Array = np.ndarray[Any, np.dtype[Any]]
Run = Callable[[engine.Do, Sequence[Any]], Iterator[None]]
ALONE: Run = partial(engine.run, workers=1)

CELL = 512  # vectors of a cell, about
PROBES = 6  # cells that a vector looks into. Of planted pairs in topics of 500 to 30,000 vectors, 4 found .93 or more, 8 .984
SAMPLE = 32  # vectors a centre in the training of k-means
BLOCK = 4096  # vectors at once
GATHER = 512  # scattered vectors at once: up to 64 KiB around each are mapped
COSINES = 2**22  # cosines at once
CELLS = 16  # of a job
FOUND = 2**22  # pairs that are collected before only the nearest are kept


class Vectors:
    """Unit vectors float16 [N, E] in a .npy file: read when asked for and let go, or in memory if they take `memory_gib` at most."""

    def __init__(self, file: Path, memory_gib: float = 0.0) -> None:
        there = np.load(file, mmap_mode="r")
        self.file, self.shape, self.offset = file.absolute(), there.shape, there.offset
        self.held = np.load(file) if there.nbytes <= memory_gib * 2**30 else None

    def __reduce__(self) -> tuple[type[Vectors], tuple[Path]]:
        return Vectors, (self.file,)  # another process reads

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: Array | slice) -> Array:
        """float32 [n, E]"""
        if self.held is not None:
            return self.held[places].astype(np.float32)
        if isinstance(places, slice):
            return self._mapped()[places].astype(np.float32)
        rows = np.empty((len(places), self.shape[1]), np.float32)
        for i in range(0, len(rows), GATHER):
            rows[i : i + GATHER] = self._mapped()[places[i : i + GATHER]]
        return rows

    def _mapped(self) -> Array:
        """Mapped anew each time: what was read goes with the mapping."""
        return np.memmap(self.file, np.float16, "r", self.offset, self.shape)


def write_vectors(file: Path, shape: tuple[int, int], blocks: Iterable[Array]) -> Vectors:
    """`blocks` one after the other, as float16 [N, E]"""
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for block in blocks:
            block.astype(np.float16).tofile(out)
    return Vectors(file)


@dataclass(frozen=True)
class Cells:
    """Vectors sorted by cell, and in `folder`: `which` vector stands at a place [N] and where cells `begin` [M + 1]; places by the cell
    that they look into, `lookers` [N·P], and where those of a cell begin, `looks` [M + 1]."""

    vectors: Vectors
    folder: Path

    def read(self, name: str) -> Array:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.read("begin")) - 1


def make_cells(vectors: Vectors, folder: Path, seed: int = 0, memory_gib: float = 0.0, run: Run = ALONE) -> Cells:
    """Divide unit vectors into cells, in files of `folder`."""
    count, number = len(vectors), max(1, round(len(vectors) / CELL))
    folder = folder.absolute()
    drawn = np.sort(numpy_rng(seed, "cells").permutation(count)[: number * SAMPLE])
    np.save(folder / "centres.npy", kmeans(vectors[drawn], number, seed))
    size = max(1, min(BLOCK, COSINES // number))
    begins = range(0, count, size)
    for _ in track(run(partial(_probe, size=size, vectors=vectors, folder=folder), begins), "cells", len(begins), "blocks"):
        pass
    probes_NP = np.concatenate([np.load(folder / f"probes-{begin}.npy") for begin in begins])
    which_N = np.argsort(probes_NP[:, 0], kind="stable")
    looks = probes_NP[which_N].ravel()
    np.save(folder / "which.npy", which_N)
    np.save(folder / "begin.npy", _begins(probes_NP[:, 0], number))
    np.save(folder / "lookers.npy", np.argsort(looks, kind="stable") // probes_NP.shape[1])
    np.save(folder / "looks.npy", _begins(looks, number))
    write_vectors(folder / "sorted.npy", vectors.shape, (vectors[which_N[i : i + BLOCK]] for i in range(0, count, BLOCK)))
    return Cells(Vectors(folder / "sorted.npy", memory_gib), folder)


def _probe(begin: int, size: int, vectors: Vectors, folder: Path) -> None:
    """A job: the cells that vectors look into, nearest first, [size, P]."""
    centres_ME = np.load(folder / "centres.npy")
    similar = vectors[begin : begin + size] @ centres_ME.T
    found = np.argpartition(-similar, min(PROBES, len(centres_ME)) - 1, axis=1)[:, :PROBES]
    order = np.argsort(-np.take_along_axis(similar, found, 1), axis=1, kind="stable")
    _save(folder / f"probes-{begin}.npy", np.take_along_axis(found, order, 1).astype(np.int32))


def similar_pairs(cells: Cells, threshold: float, most: int, run: Run = ALONE) -> tuple[Array, Array, Array]:
    """Pairs of vectors whose cosine is at least `threshold`, each within the `most` nearest of the other:
    numbers of the one [pairs], of the other [pairs] (the smaller first, sorted), and their cosine [pairs]."""
    count, number = len(cells.vectors), len(cells)
    jobs = [range(first, min(first + CELLS, number)) for first in range(0, number, CELLS)]
    for _ in track(run(partial(_pairs, cells=cells, threshold=threshold, most=most), jobs), "similar pairs", len(jobs), "jobs"):
        pass
    found, waiting = np.empty(0, PAIR), []
    for job in jobs:
        waiting.append(np.load(cells.folder / f"pairs-{job.start}.npy"))
        if job == jobs[-1] or sum(map(len, waiting)) > max(FOUND, len(found)):
            found, waiting = _nearest_ones([found, *waiting], most, count), []
    one, other = np.divmod(found["key"], count)
    both = np.isin(found["key"], other * count + one) & (one < other)
    return one[both], other[both], found["cosine"][both]


PAIR = np.dtype([("key", np.int64), ("cosine", np.float32)])  # from either vector to the other: vector × N + neighbour


def _pairs(job: range, cells: Cells, threshold: float, most: int) -> None:
    """A job: the pairs that lookers into these cells find there."""
    count, found = len(cells.vectors), [np.empty(0, PAIR)]
    which, begin, lookers, looks = (cells.read(name) for name in ("which", "begin", "lookers", "looks"))
    for cell in job:
        place = int(begin[cell])
        rows = cells.vectors[place : begin[cell + 1]]
        for start in range(looks[cell], looks[cell + 1], BLOCK):
            here = np.array(lookers[start : min(start + BLOCK, looks[cell + 1])])
            similar = cells.vectors[here] @ rows.T
            i, j = np.nonzero(similar >= threshold)
            apart = here[i] != place + j
            i, j = i[apart], j[apart]
            one, other = which[here[i]], which[place + j]
            for key in (one * count + other, other * count + one):
                found.append(np.rec.fromarrays([key, similar[i, j]], PAIR))
    _save(cells.folder / f"pairs-{job.start}.npy", _nearest_ones(found, most, count))


def _save(file: Path, array: Array) -> None:
    with atomic_path(file) as temporary:
        np.save(temporary, array)


def _nearest_ones(found: list[Array], most: int, count: int) -> Array:
    """Of each vector its `most` nearest neighbours, every one once, sorted."""
    pairs = np.concatenate(found)
    pairs = pairs[np.unique(pairs["key"], return_index=True)[1]]
    vector = pairs["key"] // count
    crowded = np.flatnonzero(np.bincount(vector, minlength=count)[vector] > most)
    order = crowded[np.lexsort((-pairs["cosine"][crowded], vector[crowded]))]
    rank = np.arange(len(order)) - np.searchsorted(vector[order], vector[order])
    keep = np.ones(len(pairs), bool)
    keep[order[rank >= most]] = False
    return pairs[keep]


def _begins(cell: Array, number: int) -> Array:
    """Where each of `number` cells begins among sorted cell numbers, and where the last ends."""
    return np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=number))])


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
