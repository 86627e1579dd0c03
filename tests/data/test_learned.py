"""Learned groups against brute force, scipy, scikit-learn and groups that were planted."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import polars as pl
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics.cluster import pair_confusion_matrix
from typer.testing import CliRunner

from easyref.cli import app
from easyref.config import Group, Likeness, load_params
from easyref.data import group, learned, neighbours
from easyref.data.bench import LIKENESS, plant
from easyref.data.embed import read_space
from easyref.data.engine import Engine, run
from easyref.data.group import learned_groups, read_spaces
from easyref.data.learned import cohesion, communities, joined, later_of_twins, learn_groups, linked, pair_scores, parts, spread
from easyref.data.neighbours import Run, Vectors, make_cells, similar_pairs, write_vectors
from easyref.records import ROW_COLUMNS, read_json, write_table


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def stored(vectors: np.ndarray, folder: Path) -> Vectors:
    return write_vectors(folder / "stored.npy", vectors.shape, [vectors])


def two_workers(engine: Engine) -> Run:
    return partial(run, workers=2, engine=engine, threads=True)


def clustered(count: int, width: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((count // 8, width))
    return unit(centres[rng.integers(len(centres), size=count)] + 0.6 * rng.standard_normal((count, width))).astype(np.float32)


def test_similar_pairs_are_those_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CELL", 300)
    monkeypatch.setattr(neighbours, "FOUND", 2000)
    monkeypatch.setattr(neighbours, "COSINES", 40_000)
    monkeypatch.setattr(neighbours, "SPAN", 400)
    monkeypatch.setattr(neighbours, "CELLS", 2)
    vectors, most, threshold = clustered(1500).astype(np.float16), 10, 0.5
    cells = make_cells(stored(vectors, tmp_path), tmp_path)
    assert sorted(cells.read("which").tolist()) == list(range(1500)) and 4 <= len(cells) <= 6
    one, other, cosine = similar_pairs(cells, threshold, most, two_workers("local"))
    similar = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    np.fill_diagonal(similar, -2)
    nearest = np.zeros_like(similar, bool)
    np.put_along_axis(nearest, np.argsort(-similar, axis=1)[:, :most], True, axis=1)
    expected = np.argwhere(np.triu(nearest & nearest.T & (similar >= threshold)))
    found = np.stack([one, other], 1)
    assert np.array_equal(found[np.lexsort((found[:, 1], found[:, 0]))], expected)
    np.testing.assert_allclose(cosine, similar[one, other], atol=1e-5)


def test_equal_vectors_take_no_more_memory_than_others(tmp_path: Path) -> None:
    """As the captions of a folder are: each is like each, 36 million pairs."""
    code = (
        "import resource, sys; import numpy as np; from pathlib import Path\n"
        "from easyref.data.neighbours import make_cells, similar_pairs, write_vectors\n"
        "work = Path(sys.argv[1]); rows = np.zeros((6000, 8), np.float32); rows[:, 0] = 1\n"
        "cells = make_cells(write_vectors(work / 'v.npy', rows.shape, [rows]), work)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "one, other, cosine = similar_pairs(cells, 0.5, 16)\n"
        "print(len(one), cosine.min(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    pairs, least, mib = done.stdout.split()
    assert int(pairs) and float(least) == 1 and int(mib) < 400


def test_most_pairs_are_found_where_cells_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CELL", 128)
    monkeypatch.setattr(neighbours, "PROBES", 2)  # .97 if only one of two may see the other
    vectors, truth = plant(16000, tmp_path / "vectors.npy")
    cells = make_cells(vectors, tmp_path)
    assert 110 < len(cells) < 140
    one, other, _ = similar_pairs(cells, 0.5, 16)
    found = set(zip(one.tolist(), other.tolist(), strict=True))
    planted = [(a, b) for g in truth for i, a in enumerate(sorted(g)) for b in sorted(g)[i + 1 :]]
    assert np.mean([pair in found for pair in planted]) > 0.98


def test_planted_groups_come_back_whatever_workers_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, truth = plant(4000, tmp_path / "vectors.npy")
    groups, left_out = learn_groups(vectors, LIKENESS, tmp_path)
    scores = pair_scores([g.members for g in groups], truth)
    assert scores["precision"] > 0.97 and scores["recall"] > 0.97 and not len(left_out)
    monkeypatch.setattr(neighbours, "CELLS", 1)
    for memory_gib in (0.0, 1.0):
        assert learn_groups(vectors, LIKENESS, tmp_path, 0, memory_gib, two_workers("local"))[0] == groups
    rows = vectors[np.array(groups[0].members)].astype(np.float64)
    assert groups[0].cohesion == pytest.approx((rows @ rows.T)[np.triu_indices(len(rows), 1)].mean(), abs=1e-5)


def test_one_of_near_duplicates_stays(tmp_path: Path) -> None:
    vectors = clustered(400)
    twins = np.concatenate([vectors, vectors[:50]])
    p = Likeness(threshold=0.5, near_duplicate=0.999, neighbours=16, min_members=2, max_members=8)
    groups, left_out = learn_groups(stored(twins, tmp_path), p, tmp_path)
    assert left_out.tolist() == list(range(400, 450))
    members = [m for g in groups for m in g.members]
    assert len(members) == len(set(members)) and max(members) < 400 and max(len(g.members) for g in groups) <= 8
    assert later_of_twins(np.array([5, 2]), np.array([2, 7]), 9).tolist() == [5, 7]


def test_linkage_cut_is_scipys(tmp_path: Path) -> None:
    rows = clustered(60)
    tree = linkage(squareform(np.maximum(1 - rows @ rows.T, 0) * (1 - np.eye(60)), checks=False), "average")
    flat = fcluster(tree, 0.5, "distance")
    expected = {frozenset(np.flatnonzero(flat == k).tolist()) for k in set(flat) if (flat == k).sum() > 1}
    assert {frozenset(g.tolist()) for g in linked(rows, 0.5, 60)} == expected
    assert all(len(g) <= 4 for g in linked(rows, 0.5, 4))


def test_a_large_part_falls_apart_as_the_threshold_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "PART", 4)
    one, other = np.array([0, 1, 2, 3, 4, 8]), np.array([1, 2, 3, 4, 5, 9])
    cosine = np.array([0.9, 0.9, 0.55, 0.9, 0.9, 0.6])  # 0-1-2 and 3-4-5 hang together by a weak pair; 6, 7 are alone
    assert [part.tolist() for part in parts(one, other, cosine, 0.5, 10)] == [[0, 1, 2], [3, 4, 5], [8, 9]]


def test_communities_are_cliques_and_large_ones_are_divided() -> None:
    ring = networkx.ring_of_cliques(12, 6)  # https://doi.org/10.1073/pnas.0605965104
    one, other = np.array(ring.edges).T
    cliques = {frozenset(range(i, i + 6)) for i in range(0, 72, 6)}
    at_one = {frozenset(c.tolist()) for c in communities(one, other, np.ones(len(one)), 73, 2.0, 72)}
    assert at_one == cliques | {frozenset({72})}
    assert max(map(len, communities(one, other, np.ones(len(one)), 72, 0.1, 72))) > 6
    divided = list(communities(one, other, np.ones(len(one)), 72, 0.1, 6))
    assert max(map(len, divided)) <= 6 and sorted(np.concatenate(divided).tolist()) == list(range(72))
    assert not list(communities(one[:0], other[:0], np.ones(0), 72, 0.1, 6))


def test_communities_follow_chains_where_linkage_does_not(tmp_path: Path) -> None:
    """Two styles, each a long arc: neighbours are alike, both ends are not."""
    rng = np.random.default_rng(0)
    angle = np.sort(rng.uniform(0, 2.5, (2, 300)))
    arcs = np.zeros((2, 300, 32))
    for k, at in enumerate((0, 2)):
        arcs[k, :, at], arcs[k, :, at + 1] = np.cos(angle[k]), np.sin(angle[k])
    vectors = stored(unit(arcs.reshape(600, 32) + 0.02 * rng.standard_normal((600, 32))), tmp_path)
    truth = [list(range(300)), list(range(300, 600))]
    p = Likeness(threshold=0.3, near_duplicate=1.0, neighbours=16, min_members=2, max_members=600, resolution=0.01)
    loose, tight = (
        pair_scores([g.members for g in learn_groups(vectors, p.model_copy(update=of), tmp_path)[0]], truth)
        for of in ({}, {"resolution": None, "threshold": 0.8})
    )
    assert loose["f1"] > 0.99 and tight["recall"] < 0.6


def test_joined_cosines_are_the_weighted_mean(tmp_path: Path) -> None:
    first, second = clustered(50, 16), clustered(50, 8, 1)
    one, two = (write_vectors(tmp_path / f"{name}.npy", v.shape, [v]) for name, v in (("a", first), ("b", second)))
    both = joined(one, two, 0.5, tmp_path / "joined.npy")[:]
    np.testing.assert_allclose(both @ both.T, (first @ first.T + 0.25 * second @ second.T) / 1.25, atol=3e-3)


def test_pair_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(6, size=80), rng.integers(9, size=80)
    groups = [[np.flatnonzero(labels == k).tolist() for k in range(9)] for labels in (a, b)]
    (_, false_positive), (false_negative, right) = pair_confusion_matrix(b, a)
    scores = pair_scores(groups[0], groups[1])
    assert scores["precision"] == pytest.approx(right / (right + false_positive))
    assert scores["recall"] == pytest.approx(right / (right + false_negative))
    assert scores["f1"] == pytest.approx(2 * right / (2 * right + false_positive + false_negative))
    assert pair_scores([], [[1, 2]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_spread_damps_the_main_directions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((500, 16)) @ np.diag(np.linspace(9, 1, 16)) + 40
    out = spread(stored(raw, tmp_path), tmp_path / "spread.npy")[:].astype(np.float64)
    centred = raw - raw.mean(0)
    _, s, directions = np.linalg.svd(centred, full_matrices=False)
    expected = unit(centred @ directions.T * (s**2 / 500) ** -learned.DAMPING)
    np.testing.assert_allclose(out @ out.T, expected @ expected.T, atol=0.02)  # the signs of directions are free
    assert cohesion(out[:2].astype(np.float32)) == pytest.approx(out[0] @ out[1], abs=1e-3)


def embedded(folder: Path, names: list[str], vectors: np.ndarray, shards: list[np.ndarray]) -> None:
    folder.mkdir()
    for number, rows in enumerate(shards):
        table = [(names[i], "image", 0, 0, 8, 8, 1.0) for i in rows]
        write_table(folder / f"rows-{number:05d}.parquet", pl.DataFrame(table, schema=list(ROW_COLUMNS), orient="row"))
        np.save(folder / f"subject-{number:05d}.npy", vectors[rows].astype(np.float16))


def learning_subjects(threshold: float) -> Group:
    p = Likeness(threshold=threshold, near_duplicate=1.0, neighbours=16, min_members=2, max_members=8)
    return load_params("presets/nano.yaml").group.model_copy(update={"likeness": {"subject": p}})


def test_groups_do_not_depend_on_shards_and_nan_is_left_out(tmp_path: Path) -> None:
    vectors = clustered(300)
    vectors[7] = np.nan
    names = [f"{i:016x}" * 4 for i in range(300)]
    order = np.random.default_rng(1).permutation(300)
    embedded(tmp_path / "one", names, vectors, [np.arange(300)])
    embedded(tmp_path / "three", names, vectors, np.array_split(order, 3))
    params = learning_subjects(0.4)

    def grouped(folder: Path) -> pl.DataFrame:
        return learned_groups(read_spaces(folder, ["subject"], tmp_path / "work"), params, tmp_path / "work", 0)

    one, three = (grouped(tmp_path / place) for place in ("one", "three"))
    assert one.equals(three) and len(one) > 20
    members = [m for g in one["members"] for m in g]
    assert len(members) == len(set(members)) and names[7] not in members
    table, _ = read_space(tmp_path / "three", "subject", "image", tmp_path / "rows.npy")
    assert len(table) == 299
    assert one["group_id"].is_unique().all() and (one["cohesion"] > 0.4).all()


def test_a_group_that_loses_images_to_another_has_the_cohesion_of_the_rest(tmp_path: Path) -> None:
    """Two subjects in images 0 and 1: they go to the closer group, 4 and 5 stay."""
    rng = np.random.default_rng(0)
    near = [(0, 0.02), (0, 0.02), (0, 0.02), (0, 0.02), (1, 0.15), (1, 0.15), (1, 0.03), (1, 0.03)]
    vectors = stored(unit(np.array([np.eye(16)[axis] + noise * rng.standard_normal(16) for axis, noise in near])), tmp_path)
    names = [f"{i:064x}" for i in (0, 1, 2, 3, 0, 1, 4, 5)]
    first, second = learned_groups({"subject": (names, vectors)}, learning_subjects(0.5), tmp_path, 0).iter_rows(named=True)
    assert [first["members"], second["members"]] == [names[:4], names[6:]]
    assert second["cohesion"] == pytest.approx(float(vectors[6:7][0] @ vectors[7:8][0]), abs=1e-5) != first["cohesion"]


def doing_or_dying(job: Any, do: partial[None], marks: Path) -> None:
    """The first worker with a job of a kind is killed."""
    try:
        (marks / do.func.__name__).touch(exist_ok=False)
    except FileExistsError:
        return do(job)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_ray_finds_the_same_groups_when_workers_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CELLS", 1)
    vectors, params = clustered(2000), learning_subjects(0.4)
    embedded(tmp_path / "one", [f"{i:016x}" * 4 for i in range(2000)], vectors, [np.arange(2000)])
    spaces = read_spaces(tmp_path / "one", ["subject"], tmp_path / "work")
    marks = tmp_path / "marks"
    marks.mkdir()

    def killing(do: partial[None], jobs: Any, **how: Any) -> Iterator[None]:
        return run(partial(doing_or_dying, do=do, marks=marks), jobs, **how)

    write_table(tmp_path / "local.parquet", learned_groups(spaces, params, tmp_path / "work", 0))
    monkeypatch.setattr(group, "run", killing)
    write_table(tmp_path / "ray.parquet", learned_groups(spaces, params, tmp_path / "work", 0, "ray"))
    assert {mark.name for mark in marks.iterdir()} == {"_divide", "_probe", "_pairs"}
    assert (tmp_path / "local.parquet").read_bytes() == (tmp_path / "ray.parquet").read_bytes()


def test_bench_measures_planted_groups(tmp_path: Path) -> None:
    out = tmp_path / "group.json"
    done = CliRunner().invoke(app, ["bench", "group", "--n", "1e3,3e3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    runs = read_json(out)["runs"]
    assert [run["n"] for run in runs] == [1000, 3000] and all(run["f1"] > 0.95 and run["peak_gib"] > 0 for run in runs)
    for wrong in ("x", "10", "inf"):
        assert "--n" in str(CliRunner().invoke(app, ["bench", "group", "--n", wrong]).exception)
