"""Groups from vectors alone: images whose vectors are alike, without any label (the paper's idea, method.md §5, made explicit).

candidate pairs (neighbours.py) → near duplicates: one stays → groups of the pairs. Every image is in one group at most. Either

tight  connected parts of the pairs, in each average linkage, cut where the mean cosine between two clusters falls under the threshold
       or the union gets too large: all members are alike.
loose  communities (`resolution`): more pairs inside than chance has it. Neighbours are alike, those far apart need not be: a style
       has faces and boats, which share neither colours nor textures, but a chain of images leads from one to the other.

Letters: N vectors · E width · P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from easyref.config import Likeness
from easyref.data.neighbours import ALONE, Run, Vectors, make_cells, similar_pairs, write_vectors

Array = np.ndarray[Any, np.dtype[Any]]

PART = 3000  # vectors of a part that linkage looks at as a whole: its distances fit into 72 MB
WIDTH = 512  # directions that count
DAMPING = 0.25  # 0: as they are, 0.5: all of the same variance. 0.25 was best on emoji, by .02 and .05 of F1 of subjects
STEP = 0.01  # by which the threshold of a larger part is raised until it falls apart


@dataclass(frozen=True)
class LearnedGroup:
    members: list[int]  # row numbers, ascending
    cohesion: float  # mean cosine of its pairs


def learn_groups(
    vectors: Vectors, p: Likeness, work: Path, seed: int = 0, memory_gib: float = 0.0, run: Run = ALONE
) -> tuple[list[LearnedGroup], Array]:
    """Groups of unit vectors in the order of their first members, and the rows left out as near duplicates.

    The rows' order matters only for which of two near duplicates stays (the first): sort them by name before. Files of `work` hold what
    is long; vectors of more than `memory_gib` are read from there, cell by cell.
    """
    if len(vectors) < 2:
        return [], np.empty(0, np.int64)
    with TemporaryDirectory(dir=work) as folder:
        cells = make_cells(vectors, Path(folder), seed, memory_gib, run)
        one, other, cosine = similar_pairs(cells, p.threshold, p.neighbours, run)
        left_out = later_of_twins(one[cosine >= p.near_duplicate], other[cosine >= p.near_duplicate], len(vectors))
        keep = ~(np.isin(one, left_out) | np.isin(other, left_out))
        one, other, cosine = one[keep], other[keep], cosine[keep]
        place, groups = np.argsort(cells.read("which")), []
        if p.resolution:
            found = communities(one, other, cosine, len(vectors), p.resolution, p.max_members)
        else:
            alike = parts(one, other, cosine, p.threshold, len(vectors))
            found = (part[rows] for part in alike for rows in linked(cells.vectors[place[part]], p.threshold, p.max_members))
        for members in found:
            if len(members) >= p.min_members:
                groups.append(LearnedGroup(members.tolist(), cohesion(cells.vectors[place[members]])))
    return sorted(groups, key=lambda g: g.members[0]), left_out


def spread(vectors: Vectors, file: Path, damping: float = DAMPING) -> Vectors:
    """Centred, with its main directions damped, unit length: [N, ≤ WIDTH] in `file`. Features of an ImageNet network are
    nearly parallel, and a few directions (bright, round, with a face) outweigh what tells one subject from the next."""
    from threadpoolctl import threadpool_limits

    count, width = vectors.shape
    blocks = [slice(i, i + 8192) for i in range(0, count, 8192)]
    with threadpool_limits(1):
        total, products = np.zeros(width), np.zeros((width, width))
        for block in blocks:
            rows = vectors[block]
            total += rows.sum(0, dtype=np.float64)
            products += rows.T @ rows
        mean = total / count
        variances, directions = np.linalg.eigh(products / count - np.outer(mean, mean))
        kept = min(WIDTH, width, max(1, count - 1))
        variances, directions = np.maximum(variances[::-1][:kept], 1e-12), directions[:, ::-1][:, :kept]
        turn = (directions * variances**-damping).astype(np.float32)
        return write_vectors(file, (count, kept), (_unit((vectors[block] - mean.astype(np.float32)) @ turn) for block in blocks))


def joined(first: Vectors, second: Vectors, share: float, file: Path) -> Vectors:
    """Unit vectors of two spaces as those of one in `file`, the second `share` times as long."""
    blocks = (slice(i, i + 8192) for i in range(0, len(first), 8192))
    width = first.shape[1] + second.shape[1]
    return write_vectors(file, (len(first), width), (_unit(np.hstack([first[b], share * second[b]])) for b in blocks))


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def later_of_twins(one: Array, other: Array, count: int) -> Array:
    """All but the first row of each chain of near duplicates."""
    labels = _components(one, other, count)
    _, first = np.unique(labels, return_index=True)
    later = np.ones(count, bool)
    later[first] = False
    return np.flatnonzero(later)


def parts(one: Array, other: Array, cosine: Array, threshold: float, count: int) -> Iterator[Array]:
    """Rows that pairs connect, at most PART together: what is larger falls apart as the threshold rises."""
    labels = _components(one, other, count)
    order = np.argsort(labels, kind="stable")
    begin = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sizes = np.diff(begin, append=count)
    where = np.argsort(labels[one], kind="stable")  # the pairs of a part stand together
    of_pair = labels[one][where]
    for label in np.flatnonzero(sizes > 1):
        rows = order[begin[label] : begin[label] + sizes[label]]
        if len(rows) <= PART:
            yield rows
            continue
        mine = where[np.searchsorted(of_pair, label) : np.searchsorted(of_pair, label, side="right")]
        mine = mine[cosine[mine] >= threshold + STEP]
        place = np.full(count, -1)
        place[rows] = np.arange(len(rows))
        for inside in parts(place[one[mine]], place[other[mine]], cosine[mine], threshold + STEP, len(rows)):
            yield rows[inside]


def linked(vectors_nE: Array, threshold: float, most: int) -> Iterator[Array]:
    """Average linkage (UPGMA): clusters of at most `most` rows whose last two halves have a mean cosine of `threshold` or more."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distance = np.maximum(1 - vectors_nE @ vectors_nE.T, 0)
    np.fill_diagonal(distance, 0)
    clusters: dict[float, list[int]] = {row: [row] for row in range(len(distance))}
    tree = linkage(squareform(distance, checks=False), "average")  # its distances rise
    for node, (one, other, apart, size) in enumerate(tree.tolist(), len(distance)):
        if apart <= 1 - threshold and size <= most:
            clusters[node] = clusters.pop(one) + clusters.pop(other)
    yield from (np.sort(rows) for rows in clusters.values() if len(rows) > 1)


def communities(one: Array, other: Array, cosine: Array, count: int, resolution: float, most: int) -> Iterator[Array]:
    """Louvain's (arXiv 0803.0476): rows with more pairs among them than `resolution` times what chance has; those of more than `most`
    rows are divided at twice the resolution, and so on."""
    from scipy.sparse import csr_matrix
    from sknetwork.clustering import Louvain

    if not len(one):
        return
    graph = csr_matrix((np.tile(cosine, 2), (np.r_[one, other], np.r_[other, one])), (count, count))
    labels = Louvain(resolution).fit_predict(graph)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(members) <= most:
            yield members
            continue
        inside = graph[members][:, members].tocoo()
        half = inside.row < inside.col
        yield from (
            members[rows]
            for rows in communities(inside.row[half], inside.col[half], inside.data[half], len(members), 2 * resolution, most)
        )


def cohesion(vectors_nE: Array) -> float:
    """Mean cosine of the pairs of n unit vectors."""
    count = len(vectors_nE)
    total = vectors_nE.sum(0, dtype=np.float64)
    return float((total @ total - (vectors_nE.astype(np.float64) ** 2).sum()) / (count * (count - 1)))


def _components(one: Array, other: Array, count: int) -> Array:
    """Number of its part, for each row; the parts in the order of their first rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(one), bool), (one, other)), (count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


# -- against the truth -------------------------------------------------------------------------------------------------


def pair_scores(found: list[list[int]], truth: list[list[int]]) -> dict[str, float]:
    """Precision, recall and F1 over pairs of rows; a pair is right when a group of `truth` holds both. A row is in one group of each
    list at most."""
    group_of = {row: number for number, members in enumerate(truth) for row in members}
    shared: dict[tuple[int, int], int] = {}
    for number, members in enumerate(found):
        for row in members:
            if row in group_of:
                key = (number, group_of[row])
                shared[key] = shared.get(key, 0) + 1
    right = sum(n * (n - 1) // 2 for n in shared.values())
    made, there = (sum(len(g) * (len(g) - 1) // 2 for g in groups) for groups in (found, truth))
    precision, recall = right / made if made else 0.0, right / there if there else 0.0
    return {"precision": precision, "recall": recall, "f1": 2 * right / (made + there) if made + there else 0.0}
