"""Stage `group`: which images share something. At nano the exact labels decide; the members are the ground truth
against which learned grouping is scored.

subject: one concept drawn in several styles · person: one style, gender and skin tone in many roles ·
style: one set of drawings and one Unicode category · given: what the source says belongs together (folder, column, entry).
"""

from __future__ import annotations

import polars as pl

from easyref.config import Group

KEYS = {"subject": ("concept", "gender"), "person": ("style", "gender", "tone"), "style": ("style", "category"), "given": ("concept",)}

GIVEN = "given"  # category of an image whose concept is the group that its source names


def group_images(images: pl.DataFrame, params: Group) -> pl.DataFrame:
    """Groups of `images` as a table `group_id, kind, split, members`; `split` is empty until the stage `split`."""
    tables = [_groups_of_kind(images, kind, params) for kind in params.kinds]
    return pl.concat(tables).sort("group_id")


def _groups_of_kind(images: pl.DataFrame, kind: str, params: Group) -> pl.DataFrame:
    keys = list(KEYS[kind])
    if kind == "subject":
        images = images.filter(pl.col("tone") == "")
    if kind == "given":
        images = images.filter(pl.col("category") == GIVEN)
    if kind == "person":
        images = images.filter((pl.col("tone") != "") & (pl.col("gender") != ""))
    table = images.group_by(keys).agg(pl.col("sha256").sort().alias("members"), pl.col("style").n_unique().alias("styles"))
    table = table.filter(pl.col("members").list.len() >= params.min_members)
    if kind == "subject":
        table = table.filter(pl.col("styles") >= params.min_styles)
    name = pl.concat_str([pl.lit(kind), *(pl.col(k) for k in keys)], separator="/")
    return table.select(name.alias("group_id"), pl.lit(kind).alias("kind"), pl.lit("").alias("split"), "members")
