"""Stage `split`: MRBench's protocol (method.md §5). Held-out groups of concepts never seen in training, held-in groups of
which only the targets are withheld, training groups; evaluation samples are leave-one-out.

A concept and everything that looks or is called the same stay on one side: concepts joined by near-duplicate images or
by the same subject words, or learned to be the same subject, form one component, and components are what is split.
"""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import polars as pl

from easyref.config import Split
from easyref.data.captions import SHARED, caption
from easyref.data.shards import ImageStore
from easyref.progress import track
from easyref.records import GROUP_COLUMNS, SAMPLE_COLUMNS

CANDIDATES = 2**14  # pairs at once
SAMPLES = dict.fromkeys(SAMPLE_COLUMNS, pl.String) | {"references": pl.List(pl.String)}


def thumbnails(store: ImageStore, sha256s: list[str]) -> np.ndarray:
    """16×16 RGB thumbnails, uint8 [N, 16, 16, 3]."""
    found = np.empty((len(sha256s), 16, 16, 3), np.uint8)
    for i, sha256 in enumerate(track(sha256s, "thumbnails", len(sha256s))):
        found[i] = np.asarray(store.image(sha256).resize((16, 16)))
    return found


def near_pairs(images: np.ndarray, distance: float) -> list[tuple[int, int]]:
    """Numbers of two thumbnails, the smaller first, whose root mean square difference is at most `distance`. That of the means of their
    quarters is no larger: a tree of those says whom to compare."""
    from scipy.spatial import KDTree

    means = images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4), dtype=np.float32).reshape(len(images), -1)
    pairs = KDTree(means).query_pairs(distance * means.shape[1] ** 0.5 + 1e-3, output_type="ndarray")
    near = []
    for start in range(0, len(pairs), CANDIDATES):
        one, other = pairs[start : start + CANDIDATES].T
        errors = (images[one].astype(np.int32) - images[other]) ** 2
        near += pairs[start : start + CANDIDATES][errors.sum((1, 2, 3)) <= distance**2 * images[0].size].tolist()
    return sorted((min(pair), max(pair)) for pair in near)


def split_images(store: ImageStore, groups: pl.DataFrame, params: Split, seed: int) -> dict[str, pl.DataFrame]:
    """Tables `images` (sha256, split), `groups` (with `split`) and `samples`.

    Raises:
        ValueError: groups of other images, or none to train on.
    """
    if not store.rows.keys() >= {member for members in groups["members"] for member in members}:
        raise ValueError(f"the groups are of other images than {store.folder} has; run `easyref group` again")
    images = store.table.sort("sha256")
    near = near_pairs(thumbnails(store, images["sha256"].to_list()), params.near_duplicate_distance)
    place = {s: i for i, s in enumerate(images["sha256"])}
    learned = groups.filter(pl.col("cohesion").is_not_null(), pl.col("kind") != "style") if "cohesion" in groups.columns else groups[:0]
    together = [[place[m] for m in members] for members in learned["members"]]
    held_out = _held_out_concepts(images, near, together, params.held_out_share, seed)
    side = {s: "held_out" if c in held_out else "train" for s, c in images.select("sha256", "concept").iter_rows()}
    parts = [
        {**g, "split": name, "members": members}
        for g in groups.sort("group_id").iter_rows(named=True)
        for name in ("held_out", "train")
        if len(members := [m for m in g["members"] if side[m] == name]) >= (2 if _is_wanted(g) else _least(g["kind"]))
    ]
    shas = images["sha256"].to_list()
    has_twin = {shas[i] for pair in near for i in pair}
    samples = []
    asked: dict[str, list[dict]] = defaultdict(list)  # image → groups with samples
    for name, count in (("held_out", params.held_out_groups), ("held_in", params.held_in_groups)):
        of_side = [p for p in parts if p["split"] == ("held_out" if name == "held_out" else "train")]
        chosen = _balanced([p for p in of_side if len(p["members"]) >= _least(p["kind"])], count, seed)
        for group in chosen:
            rng = random.Random(f"{seed}/samples/{group['group_id']}")
            targets = [m for m in group["members"] if m not in has_twin or name == "held_out"]
            for target in rng.sample(targets, min(params.samples_per_group, len(targets))):
                if name == "held_in":  # withheld targets are no references: at least two must remain, in other groups of theirs too
                    if any(sum(side[m] == "train" and m != target for m in g["members"]) < 2 for g in [group, *asked[target]]):
                        continue
                    side[target] = "held_in"
                samples.append({"split": name, "target": target, "group": group})
            if samples and samples[-1]["group"] is group:
                for member in group["members"]:
                    asked[member].append(group)
    for part in parts:
        if part["split"] == "train":
            part["members"] = [m for m in part["members"] if side[m] == "train"]
    kept = [p for p in parts if len(p["members"]) >= 2]
    if not kept:
        raise ValueError("no group has two images on one side of the split: there is nothing to train on; see `group` in params.yaml")
    return {
        "images": images.select("sha256", pl.col("sha256").replace_strict(side).alias("split")),
        "groups": pl.DataFrame(kept).select(*GROUP_COLUMNS),
        "samples": pl.DataFrame([_sample(s, store, params.max_references, seed) for s in samples], SAMPLES),
    }


def _is_wanted(group: dict) -> bool:
    """Whether two members are enough for training: it was learned, as `group.likeness` says, or is as the source gave it."""
    return group.get("cohesion") is not None or group["kind"] == "given"


def _least(kind: str) -> int:
    """Members of a group that samples are drawn from."""
    return 3 if kind == "subject" else 4


def _sample(sample: dict, store: ImageStore, most: int, seed: int) -> dict:
    """A leave-one-out sample: the target, up to `most` other members as references, a prompt that hides what they share."""
    group, target = sample["group"], sample["target"]
    rng = random.Random(f"{seed}/references/{group['group_id']}/{target}")
    others = [m for m in group["members"] if m != target]
    prompt = caption(store.rows[target], hide={*SHARED.get(group["kind"], ()), "colors"})
    return {
        "sample_id": f"{sample['split']}-{group['kind']}-{target[:12]}", "group_id": group["group_id"], "kind": group["kind"],
        "split": sample["split"], "target": target, "references": rng.sample(others, min(most, len(others))), "prompt": prompt,
    }  # fmt: skip


def _held_out_concepts(
    images: pl.DataFrame, near: list[tuple[int, int]], together: list[list[int]], share: float, seed: int
) -> set[str]:
    """About `share` of the concepts. `together`: images that were found to show the same, whatever they are called."""
    concepts = images["concept"].to_list()
    parent = {c: c for c in concepts}

    def root(c: str) -> str:
        while parent[c] != c:
            parent[c] = parent[parent[c]]
            c = parent[c]
        return c

    by_subject: dict[str, str] = {}
    for subject, concept in images.select("subject", "concept").iter_rows():
        parent[root(concept)] = root(by_subject.setdefault(subject, concept))
    for i, j in [*near, *((members[0], other) for members in together for other in members[1:])]:
        parent[root(concepts[i])] = root(concepts[j])
    components = defaultdict(list)
    for concept in sorted(set(concepts)):
        components[root(concept)].append(concept)
    order = sorted(components.values())
    random.Random(f"{seed}/split").shuffle(order)
    held_out: set[str] = set()
    most = max([10, *map(len, together)])
    for component in order:
        # a large component would be the whole held-out set by itself, and says nothing new image by image
        if len(component) <= most and len(held_out) + len(component) <= share * len(parent):
            held_out.update(component)
    return held_out


def _balanced(groups: list[dict], count: int, seed: int) -> list[dict]:
    """`count` groups, the kinds in turn, each kind in a seeded random order."""
    by_kind = defaultdict(list)
    for group in sorted(groups, key=lambda g: g["group_id"]):
        by_kind[group["kind"]].append(group)
    for kind, members in by_kind.items():
        random.Random(f"{seed}/groups/{kind}").shuffle(members)
    chosen: list[dict] = []
    while len(chosen) < count and any(by_kind.values()):
        chosen += [by_kind[kind].pop() for kind in sorted(by_kind) if by_kind[kind]]
    return chosen[:count]
