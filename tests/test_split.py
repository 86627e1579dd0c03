"""MRBench's split on the real images: no image, concept, name or near-duplicate crosses from training to evaluation."""

from pathlib import Path

import faiss
import numpy as np
import polars as pl
import pytest

from easyref.config import load_params
from easyref.data import split
from easyref.data.captions import SHARED
from easyref.data.group import label_groups
from easyref.data.shards import ImageStore
from easyref.data.split import near_pairs, split_images, thumbnails
from easyref.records import SAMPLE_COLUMNS

IMAGES = Path("data/images")


@pytest.fixture(scope="module")
def tables():
    if not IMAGES.exists():
        pytest.fail("data/images is missing; run `dvc pull ingest`")
    params = load_params("presets/nano.yaml")
    store = ImageStore(IMAGES)
    return store, split_images(store, label_groups(store.table, params.group), params.split, 0), params


def test_held_out_concepts_and_names_never_occur_in_training(tables) -> None:
    store, split, _ = tables
    side = dict(split["images"].iter_rows())
    for column in ("concept", "subject"):
        held_out = {store.rows[s][column] for s, name in side.items() if name == "held_out"}
        training = {store.rows[s][column] for s, name in side.items() if name != "held_out"}
        assert len(held_out) > 50
        assert not held_out & training


def test_no_near_duplicate_leaks_into_training(tables) -> None:
    store, split, params = tables
    side = dict(split["images"].iter_rows())
    training = [s for s, name in side.items() if name == "train"]
    evaluated = [s for s, name in side.items() if name == "held_out"] + split["samples"].filter(split="held_in")["target"].to_list()
    a, b = (thumbnails(store, names).reshape(len(names), -1).astype(np.float32) for names in (evaluated, training))
    index = faiss.IndexFlatL2(a.shape[1])  # independent of near_pairs
    index.add(b)
    closest = np.sqrt(index.search(a, 1)[0] / a.shape[1])
    assert closest.min() > params.split.near_duplicate_distance


def test_samples_are_leave_one_out_and_hide_what_references_share(tables) -> None:
    store, split, _ = tables
    side = dict(split["images"].iter_rows())
    members = {g["group_id"] + g["split"]: set(g["members"]) for g in split["groups"].iter_rows(named=True)}
    counts = split["samples"].group_by("split", "kind").len()
    assert counts["len"].min() >= 20 and len(counts) == 6
    for s in split["samples"].iter_rows(named=True):
        assert s["target"] not in s["references"] and 1 < len(s["references"]) <= 6
        assert side[s["target"]] == s["split"]
        if s["split"] == "held_in":
            assert s["target"] not in members[s["group_id"] + "train"]
        else:
            assert {s["target"], *s["references"]} <= members[s["group_id"] + "held_out"]
        label = store.rows[s["target"]]
        words = set(s["prompt"].replace(",", "").split())
        for name in SHARED[s["kind"]]:
            if name in ("style", "tone") and label[name]:
                assert label[name] not in words


def test_given_groups_of_three_are_trained_on_and_others_images_are_refused(tables) -> None:
    _, _, params = tables
    store = ImageStore(IMAGES)
    of_concept = store.table.group_by("concept", maintain_order=True).agg("sha256").filter(pl.col("sha256").list.len() >= 3).head(40)
    store.table = store.table.filter(store.table["concept"].is_in(of_concept["concept"].to_list()))
    groups = of_concept.select(
        pl.col("concept").alias("group_id"), pl.lit("given").alias("kind"), pl.lit("").alias("split"),
        pl.col("sha256").list.head(3).alias("members"),
    )  # fmt: skip
    made = split_images(store, groups, params.split, 0)
    assert made["groups"].height == 40 and set(made["groups"]["split"]) == {"train", "held_out"}
    assert made["samples"].is_empty() and made["samples"].columns == list(SAMPLE_COLUMNS), "samples need four images"
    with pytest.raises(ValueError, match="nothing to train on"):
        split_images(store, groups.with_columns(pl.col("members").list.head(1)), params.split, 0)
    with pytest.raises(ValueError, match="groups are of other images"):
        split_images(store, groups.with_columns(pl.lit(["0" * 64], pl.List(pl.String)).alias("members")), params.split, 0)


def test_every_sample_has_two_references_where_kinds_share_images(tables) -> None:
    """Of ten subjects in four images, which are two styles as well, many targets are withheld."""
    _, _, params = tables
    store = ImageStore(IMAGES)
    store.table = store.table.unique("concept", maintain_order=True).unique("subject", maintain_order=True).head(40)
    names = store.table["sha256"].to_list()
    groups = [("subject", names[4 * i : 4 * i + 4]) for i in range(10)] + [("style", names[i::2]) for i in range(2)]
    rows = [{"group_id": f"{kind}/{i}", "kind": kind, "split": "", "members": of} for i, (kind, of) in enumerate(groups)]
    p = params.split.model_copy(update={"samples_per_group": 6, "held_out_share": 0.2})
    for seed in range(5):
        samples = split_images(store, pl.DataFrame(rows), p, seed)["samples"].filter(split="held_in")
        assert len(samples) > 8 and samples["references"].list.len().min() >= 2


def test_split_is_the_same_for_the_same_seed_and_another_for_another(tables) -> None:
    _, _, params = tables
    store = ImageStore(IMAGES)
    store.table = store.table.filter(store.table["concept"].is_in(store.table["concept"].unique().sort().to_list()[::5]))
    groups = label_groups(store.table, params.group)
    split = split_images(store, groups, params.split, 0)
    again = split_images(store, groups.sample(fraction=1.0, shuffle=True, seed=1), params.split, 0)
    other = split_images(store, groups, params.split, 1)
    for name in split:
        assert again[name].equals(split[name])
    assert not other["images"].sort("sha256").equals(split["images"].sort("sha256"))


def test_near_pairs_against_explicit_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of neighbours on a line of pictures that drift apart; two differ by exactly the distance, in a single channel."""
    monkeypatch.setattr(split, "CANDIDATES", 7)
    rng = np.random.default_rng(0)
    drift = rng.integers(40, 200, (16, 16, 3)) + np.cumsum(rng.integers(-2, 3, (60, 16, 16, 3)), 0)
    edge = np.full((2, 16, 16, 3), 9)
    edge[1, ..., 0] += 4
    images = np.concatenate([drift, edge]).astype(np.uint8)
    distance = 4 / 3**0.5
    far = np.sqrt(((images[:, None].astype(float) - images[None]) ** 2).mean((2, 3, 4)))
    expected = np.argwhere(np.triu(far <= distance + 1e-9, 1)).tolist()
    assert 60 < len(expected) < 900 and [60, 61] in expected
    assert [list(pair) for pair in near_pairs(images, distance + 1e-9)] == expected


def test_every_image_has_a_licence_and_a_caption() -> None:
    table = pl.read_parquet(IMAGES / "images.parquet")
    assert set(table["licence"]) == {"Apache-2.0", "CC-BY-4.0", "MIT"}
    assert table.filter(pl.col("caption") == "").is_empty()
    assert table["sha256"].n_unique() == len(table)
