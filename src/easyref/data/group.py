"""Stage `group`: which images share something, by their labels or by what they look like.

Of labels (nano; they are also the truth against which learned groups are scored):
subject: one concept drawn in several styles · person: one style, gender and skin tone in many roles ·
style: one set of drawings and one Unicode category · given: what the source says belongs together (folder, column, entry).

Learned from embeddings (data/learned.py):
subject: what is drawn is alike, in detected subjects where there are any · style: how it is drawn, and with which colours ·
tag: what the captions say · identity: whose face it is, the largest of each image.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from easyref.config import Group, Params
from easyref.data.captions import GIVEN
from easyref.data.embed import largest_faces, read_space
from easyref.data.engine import Engine, run
from easyref.data.learned import cohesion, joined, learn_groups, pair_scores, spread
from easyref.data.neighbours import Vectors, kmeans, nearest
from easyref.records import FACE_COLUMNS, GROUP_COLUMNS, IMAGE_COLUMNS, atomic_folder, read_table, write_json, write_table

KEYS = {"subject": ("concept", "gender"), "person": ("style", "gender", "tone"), "style": ("style", "category"), "given": ("concept",)}


def group_stage(params: Params, data: Path, metrics: Path, work: Path, engine: Engine = "local") -> pl.DataFrame:
    """Write `groups/groups.parquet`, where there are faces `groups/faces.parquet`, and, where there are labels, what learned groups are
    worth against them to `metrics`."""
    p = params.group
    labelled = label_groups(read_table(data / "images" / "images.parquet", IMAGE_COLUMNS), p)
    kinds = set(p.likeness) if p.by == "embeddings" else set(p.likeness) & set(labelled["kind"])
    spaces = read_spaces(data / "embeddings", sorted(kinds), work)
    learned = learned_groups(spaces, p, work, params.seed, engine)
    scores = score(learned, labelled, spaces, params.seed)
    table = labelled.with_columns(cohesion=pl.lit(None, pl.Float64)) if p.by == "labels" else learned
    if not len(table):
        fix = {
            "labels": "images of your own have only what their source says, group.kinds: [given], of group.min_members images or more; "
            "or set group.by: embeddings",
            "embeddings": "lower the thresholds or min_members in group.likeness, or set group.by: labels",
        }[p.by]
        raise ValueError(f"{data}: no groups of {p.by}; {fix}")
    faces = face_boxes(data)
    with atomic_folder(data / "groups") as folder:
        write_table(folder / "groups.parquet", table)
        if len(faces):
            write_table(folder / "faces.parquet", faces)
    write_json(metrics, scores)
    shutil.rmtree(work, ignore_errors=True)
    return table


def face_boxes(data: Path) -> pl.DataFrame:
    """Of each image that has a face the box that the source gives, else that of the largest that was found: FACE_COLUMNS."""
    found, given = largest_faces(data / "embeddings"), data / "images" / "faces.parquet"
    if given.exists():
        said = read_table(given, FACE_COLUMNS).select(FACE_COLUMNS).cast({name: pl.Int32 for name in FACE_COLUMNS[1:]})
        found = pl.concat([said, found.filter(~pl.col("sha256").is_in(said["sha256"].to_list()))]).sort("sha256")
    return found


#: By kind of learned group: the space of its vectors, and the parts that have one; the first part that is there counts.
LEARNED_FROM = {
    "subject": ("subject", ("subject", "image")),
    "style": ("style", ("image",)),
    "tag": ("text", ("image",)),
    "identity": ("face", ("face",)),
}
TEXTURE = 0.5  # what shallow features count for beside colours: best of 0, 0.5 and 1 on the training images of emoji


def label_groups(images: pl.DataFrame, params: Group) -> pl.DataFrame:
    """Groups of `images` as a table `group_id, kind, split, members`; `split` is empty until the stage `split`."""
    none = pl.DataFrame(schema={"group_id": pl.String, "kind": pl.String, "split": pl.String, "members": pl.List(pl.String)})
    return pl.concat([none, *(_groups_of_kind(images, kind, params) for kind in params.kinds)]).sort("group_id")


Space = tuple[list[str], Vectors]  # of each row the image, and its vector


def read_spaces(embeddings: Path, kinds: list[str], work: Path) -> dict[str, Space]:
    """By kind, the vectors that its groups are learned from. Those of faces stay as they are: ArcFace is trained for their cosines."""
    work.mkdir(parents=True, exist_ok=True)
    spaces: dict[str, Space] = {}
    for kind in kinds:
        space, parts = LEARNED_FROM[kind]
        rows = work / f"{space}-rows.npy"
        for part in parts:
            table, _ = read_space(embeddings, space, part, rows, largest=part == "face")
            if len(table):
                break
        if len(table) > 1:
            vectors = Vectors(rows)
            if space != "face":
                vectors = spread(vectors, work / f"{kind}.npy")
            if kind == "style":
                coloured, _ = read_space(embeddings, "palette", "image", work / "palette-rows.npy")
                if coloured["sha256"].to_list() != table["sha256"].to_list():
                    raise ValueError(f"{embeddings}: palettes are missing or of other images; run `easyref embed` again")
                colours = spread(Vectors(work / "palette-rows.npy"), work / "palette.npy", damping=0)
                vectors = joined(colours, vectors, TEXTURE, work / "joined.npy")
            spaces[kind] = table["sha256"].to_list(), vectors
        elif space == "face":
            print(f"{kind}: no faces in {embeddings}; set embed.faces and embed again, or leave {kind} out of group.likeness")
    return spaces


def learned_groups(spaces: dict[str, Space], params: Group, work: Path, seed: int, engine: Engine = "local") -> pl.DataFrame:
    """Groups of images whose vectors are alike, with their `cohesion` (mean cosine); an image is in one group of a kind at most."""
    rows, jobs = [], partial(run, workers=params.workers, engine=engine, threads=True)
    for kind, (names, vectors) in spaces.items():
        p = params.likeness[kind]  # type: ignore[index]
        taken: set[str] = set()
        groups, _ = learn_groups(vectors, p, work, seed, params.memory_gib, jobs)
        for group in sorted(groups, key=lambda g: (-g.cohesion, g.members)):
            left = [i for i in group.members if names[i] not in taken]
            members = sorted({names[i] for i in left})
            if len(members) >= p.min_members:
                taken.update(members)
                alike = group.cohesion if len(left) == len(group.members) else cohesion(vectors[np.array(left)])
                rows.append((f"{kind}/{members[0][:16]}", kind, "", members, alike))
    types = (pl.String, pl.String, pl.String, pl.List(pl.String), pl.Float64)
    schema: dict[str, Any] = dict(zip((*GROUP_COLUMNS, "cohesion"), types, strict=True))
    return pl.DataFrame(rows, schema=schema, orient="row").sort("group_id")


def _groups_of_kind(images: pl.DataFrame, kind: str, params: Group) -> pl.DataFrame:
    keys = list(KEYS[kind])
    if kind == "subject":
        images = images.filter(pl.col("tone") == "")
    if kind == "given":
        images = images.filter(pl.col("category") == GIVEN)
    if kind == "style":  # images of a heap have no label of it
        images = images.filter(pl.col("style") != "")
    if kind == "person":
        images = images.filter((pl.col("tone") != "") & (pl.col("gender") != ""))
    table = images.group_by(keys).agg(pl.col("sha256").sort().alias("members"), pl.col("style").n_unique().alias("styles"))
    table = table.filter(pl.col("members").list.len() >= params.min_members)
    if kind == "subject":
        table = table.filter(pl.col("styles") >= params.min_styles)
    name = pl.concat_str([pl.lit(kind), *(pl.col(k) for k in keys)], separator="/")
    return table.select(name.alias("group_id"), pl.lit(kind).alias("kind"), pl.lit("").alias("split"), "members")


def score(learned: pl.DataFrame, labelled: pl.DataFrame, spaces: dict[str, Space], seed: int) -> dict[str, Any]:
    """Pairwise precision, recall and F1 of learned groups against labelled ones of the same kind, and the same of plain k-means on
    the same vectors. Only images that the labels speak of count; k-means is told how many groups there are."""
    found: dict[str, Any] = {}
    for kind in sorted(set(learned["kind"]) & set(labelled["kind"])):
        truth = labelled.filter(kind=kind)["members"].to_list()
        covered = sorted({m for members in truth for m in members})
        place = {name: i for i, name in enumerate(covered)}
        mine = [[place[m] for m in members if m in place] for members in learned.filter(kind=kind)["members"].to_list()]
        names, vectors = spaces[kind]
        first = {name: row for row, name in reversed(list(enumerate(names))) if name in place}  # one subject of an image
        known_nE = vectors[np.array(list(first.values()))]
        cell = nearest(known_nE, kmeans(known_nE, len(truth), seed))
        of_row = [place[name] for name in first]
        plain = [[of_row[i] for i in np.flatnonzero(cell == number)] for number in range(len(truth))]
        true = [[place[m] for m in members] for members in truth]
        found[kind] = {
            "images": len(covered), "labelled_groups": len(truth), "learned_groups": len(mine),
            "learned": pair_scores(mine, true), "kmeans": pair_scores(plain, true),
        }  # fmt: skip
    return found
