"""Which vectors are alike, among any number of them: k-means cells, then exact cosines of a vector and the cells nearest to it.

A vector stands in the cell of its nearest centre and looks into the PROBES cells nearest to itself: what it is like may stand beyond
the border of its cell, on its own side of it. A pair counts that either of the two sees. Everything that is as long as the vectors are
many lies in files, cell by cell; what memory holds of a vector (of 2³¹ at most) is the numbers of its cells, while they are sorted, and
its mutual neighbours, 12 bytes each.
The result depends on the vectors and the seed only: every product has the same shape and one BLAS thread, whatever runs the jobs.

Letters: N vectors · E width · M cells · P probes · n vectors of a cell.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
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
COARSE = 256  # the same of a centre of the first level
NEAR = 12  # centres of the first level under which the cells of a vector are looked for. Of 8, .986 of 1e6 vectors' pairs are found
LOOKERS = 2**15  # vectors of a job that looks for cells
BLOCK = 4096  # vectors at once
COSINES = 2**23  # cosines at once
CELLS = 16  # of a job
SPAN = 2**18  # vectors whose nearest are chosen at once
FOUND = 2**22  # pairs at once


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
        if isinstance(places, slice):  # mapped anew each time: what was read goes with the mapping
            return np.memmap(self.file, np.float16, "r", self.offset, self.shape)[places].astype(np.float32)
        size = 2 * self.shape[1]
        with open(self.file, "rb", buffering=0) as file:  # a third of the time of a mapping, whose pages come and go by the sixteen
            rows = b"".join([os.pread(file.fileno(), size, self.offset + size * place) for place in places.tolist()])
        return np.frombuffer(rows, np.float16).reshape(-1, self.shape[1]).astype(np.float32)


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
    count, folder = len(vectors), folder.absolute()
    number = make_centres(vectors, folder, seed, run)
    begins = range(0, count, LOOKERS)
    for _ in track(run(partial(_probe, vectors=vectors, folder=folder), begins), "cells", len(begins), "blocks"):
        pass
    probes_NP = np.concatenate([np.load(folder / f"probes-{begin}.npy") for begin in begins])
    which_N, begin = _by_cell(probes_NP[:, :1], number)
    lookers, looks = _by_cell(probes_NP[which_N], number)
    for name, array in {"which": which_N, "begin": begin, "lookers": lookers, "looks": looks}.items():
        np.save(folder / f"{name}.npy", array)
    write_vectors(folder / "sorted.npy", vectors.shape, (vectors[which_N[i : i + BLOCK]] for i in range(0, count, BLOCK)))
    return Cells(Vectors(folder / "sorted.npy", memory_gib), folder)


def make_centres(vectors: Vectors, folder: Path, seed: int, run: Run) -> int:
    """Centres of cells [M, E] as a FAISS index in `folder`, and how many they are. Of one vector in CELL / SAMPLE, in two levels of √M:
    k-means of M centres at once, and looking among all of them, would cost the square of N."""
    import faiss

    count, width = vectors.shape
    step = max(1, CELL // SAMPLE)
    drawn = np.arange(0, count, step)
    drawn = np.minimum(drawn + numpy_rng(seed, "cells").integers(step, size=len(drawn)), count - 1).astype(np.int32)
    few = max(1, round(math.sqrt(count / CELL)))
    coarse = kmeans(vectors[drawn[:: max(1, len(drawn) // (few * COARSE))]], few, seed)
    of_drawn = np.concatenate([nearest(vectors[drawn[i : i + BLOCK]], coarse) for i in range(0, len(drawn), BLOCK)])
    rows, begin = _by_cell(of_drawn[:, None], few)
    jobs = [(number, drawn[rows[begin[number] : begin[number + 1]]]) for number in range(few) if begin[number] < begin[number + 1]]
    for _ in track(run(partial(_divide, vectors=vectors, folder=folder, seed=seed), jobs), "centres", len(jobs), "jobs"):
        pass
    centres_ME = np.concatenate([np.load(folder / f"centres-{number}.npy") for number, _ in jobs])
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, few, faiss.METRIC_INNER_PRODUCT)
    index.quantizer.add(coarse)
    index.train(coarse)  # it finds its centres there
    index.nprobe = NEAR
    index.add(centres_ME)
    faiss.write_index(index, str(folder / "centres.faiss"))
    return len(centres_ME)


def _divide(job: tuple[int, Array], vectors: Vectors, folder: Path, seed: int) -> None:
    """A job: the centres of a coarse cell."""
    number, drawn = job
    _save(folder / f"centres-{number}.npy", kmeans(vectors[drawn], max(1, round(len(drawn) / SAMPLE)), seed))


def _probe(begin: int, vectors: Vectors, folder: Path) -> None:
    """A job: the cells that vectors look into, nearest first, [n, P]."""
    import faiss

    index = faiss.read_index(str(folder / "centres.faiss"))
    probes, found = min(PROBES, index.ntotal), []
    for start in range(begin, min(begin + LOOKERS, len(vectors)), BLOCK):
        block = vectors[start : min(start + BLOCK, begin + LOOKERS)]
        nearest_nP = index.search(block, probes)[1].astype(np.int32)
        found.append(np.where(nearest_nP < 0, np.maximum(nearest_nP[:, :1], 0), nearest_nP))  # where NEAR have fewer than P
    _save(folder / f"probes-{begin}.npy", np.concatenate(found))


def similar_pairs(cells: Cells, threshold: float, most: int, run: Run = ALONE) -> tuple[Array, Array, Array]:
    """Pairs of vectors whose cosine is at least `threshold`, each within the `most` nearest of the other:
    numbers of the one [pairs], of the other [pairs] (the smaller first, sorted), and their cosine [pairs]."""
    count, number = len(cells.vectors), len(cells)
    jobs = [range(first, min(first + CELLS, number)) for first in range(0, number, CELLS)]
    for _ in track(run(partial(_pairs, cells=cells, threshold=threshold, most=most), jobs), "similar pairs", len(jobs), "jobs"):
        pass
    files = [cells.folder / f"pairs-{job.start}.npy" for job in jobs]
    keys, cosines = cells.folder / "keys.bin", cells.folder / "cosines.bin"
    with open(keys, "wb") as key_file, open(cosines, "wb") as cosine_file:
        for first in range(0, count, SPAN):
            span = [_between(np.load(file, mmap_mode="r"), first * count, (first + SPAN) * count) for file in files]
            kept = _nearest_ones(span, most, count)
            kept["key"].tofile(key_file)
            kept["cosine"].tofile(cosine_file)
    there = np.memmap(keys, np.int64, "r") if keys.stat().st_size else np.empty(0, np.int64)
    found = [np.empty(0, MUTUAL)]
    for start in range(0, len(there), FOUND):
        one, other = np.divmod(there[start : start + FOUND], count)
        pairs = np.rec.fromarrays([one, other, np.fromfile(cosines, np.float32, len(one), offset=4 * start)], MUTUAL)[one < other]
        back = pairs["other"] * np.int64(count) + pairs["one"]
        order = np.argsort(back)  # a search in order is faster than its sorting takes
        found.append(pairs[np.sort(order[_holds(there, back[order])])])
    mutual = np.concatenate(found)
    return mutual["one"], mutual["other"], mutual["cosine"]


MUTUAL = np.dtype([("one", np.int32), ("other", np.int32), ("cosine", np.float32)])
PAIR = np.dtype([("key", np.int64), ("cosine", np.float32)])  # from either vector to the other: vector × N + neighbour


def _pairs(job: range, cells: Cells, threshold: float, most: int) -> None:
    """A job: the pairs that lookers into these cells find there."""
    count, found = len(cells.vectors), [np.empty(0, PAIR)]
    which, begin, lookers, looks = (cells.read(name) for name in ("which", "begin", "lookers", "looks"))
    for cell in job:
        place = int(begin[cell])
        rows = cells.vectors[place : begin[cell + 1]]
        size = max(1, min(BLOCK, COSINES // max(1, len(rows))))  # a cell of thousands of equal captions is large
        for start in range(looks[cell], looks[cell + 1], size):
            here = np.array(lookers[start : min(start + size, looks[cell + 1])])
            similar = cells.vectors[here] @ rows.T
            own = np.flatnonzero((here >= place) & (here < place + len(rows)))
            similar[own, here[own] - place] = -2
            alike = similar >= threshold
            crowded = np.flatnonzero(alike.sum(1) > most)  # what is not among the nearest here is not among the nearest
            alike[crowded] = False
            alike[crowded[:, None], np.argsort(-similar[crowded], axis=1, kind="stable")[:, :most]] = True
            i, j = np.nonzero(alike)
            one, other = which[here[i]], which[place + j]
            for key in (one * count + other, other * count + one):
                found.append(np.rec.fromarrays([key, similar[i, j]], PAIR))
    _save(cells.folder / f"pairs-{job.start}.npy", _nearest_ones(found, most, count))


def _save(file: Path, array: Array) -> None:
    with atomic_path(file) as temporary:
        np.save(temporary, array)


def _between(pairs: Array, low: int, high: int) -> Array:
    """Of sorted pairs those whose key is at least `low` and under `high`."""
    return pairs[bisect_left(pairs["key"], low) : bisect_left(pairs["key"], high)]  # type: ignore[type-var]


def _holds(ascending: Array, values: Array) -> Array:
    return ascending[np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)] == values


def _nearest_ones(found: list[Array], most: int, count: int) -> Array:
    """Of each vector its `most` nearest neighbours, every one once, sorted."""
    pairs = np.concatenate(found)
    pairs = pairs[np.unique(pairs["key"], return_index=True)[1]]
    vector = pairs["key"] // count
    sizes = np.diff(np.flatnonzero(np.diff(vector, prepend=-1)), append=len(vector))
    crowded = np.flatnonzero(np.repeat(sizes, sizes) > most)
    order = crowded[np.lexsort((-pairs["cosine"][crowded], vector[crowded]))]
    rank = np.arange(len(order)) - np.searchsorted(vector[order], vector[order])
    keep = np.ones(len(pairs), bool)
    keep[order[rank >= most]] = False
    return pairs[keep]


def _by_cell(cells_NP: Array, number: int) -> tuple[Array, Array]:
    """Rows that name a cell, cell by cell, and where each of `number` cells begins and the last ends."""
    from scipy.sparse import csr_array

    count, most = cells_NP.shape
    named = csr_array((np.ones(cells_NP.size, bool), cells_NP.ravel(), np.arange(0, cells_NP.size + 1, most)), (count, number)).tocsc()
    return named.indices, named.indptr


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
