"""Stage `report`: reports/data.html, what the data is: counts, sizes, groups to look at, rejects with their reasons."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image

from easyref.config import Report
from easyref.data.shards import ImageStore
from easyref.page import data_uri, picture, render
from easyref.records import GROUP_COLUMNS, REJECT_COLUMNS, read_json, read_table, write_bytes

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>easyref: the data</title><style>{{ style }}</style></head><body><main>
<h1>The data</h1>
<p>{{ images }} images in {{ shards }} shard{{ "s" if shards > 1 }}, {{ groups }} groups{% if splits %};
{% for name, n in splits %}{{ name | words }} {{ n }}{{ ", " if not loop.last }}{% endfor %}{% endif %}.
Licences: {% for name, n in licences %}{{ name }} {{ n }}{{ ", " if not loop.last
}}{% endfor %}.</p>
<figure><img alt="Sizes, aspects and group sizes" src="{{ plot }}"></figure>
{% if scores %}<h2>Learned groups against the labels</h2>
<p>Pairs of images: right when a labelled group of the kind holds both. Only images that the labels speak of count. Plain k-means on the
same vectors is told how many groups there are.</p>
<div class="scroll"><table><thead><tr><th>Kind</th><th>images</th><th>labelled groups</th><th>learned groups</th><th>precision</th>
<th>recall</th><th>F1</th><th>k-means precision</th><th>recall</th><th>F1</th></tr></thead><tbody>
{% for kind, s in scores.items() %}<tr><td>{{ kind }}</td><td>{{ s.images }}</td><td>{{ s.labelled_groups }}</td>
<td>{{ s.learned_groups }}</td>{% for of in (s.learned, s.kmeans) %}<td>{{ of.precision | share }}</td><td>{{ of.recall | share }}</td>
<td class="own">{{ of.f1 | share }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>{% endif %}
{% for kind in kinds %}<h2>{{ kind.title }}: {{ kind.groups }} groups, {{ kind.images }} images</h2>
{% for sheet in kind.sheets %}<h3>{{ sheet.title }}</h3><figure><img alt="{{ sheet.title }}" src="{{ sheet.picture }}">
<figcaption>A row is a group{{ sheet.words }}.</figcaption></figure>{% endfor %}{% endfor %}
<h2>Not taken</h2>
{% if rejects %}<div class="scroll"><table><thead><tr><th>Reason</th><th>images</th><th class="words">For example</th></tr></thead>
<tbody>
{% for reason in rejects %}<tr><td>{{ reason.name | words }}</td><td>{{ reason.count }}</td>
<td class="words">{% for line in reason.lines %}{{ line }}<br>{% endfor %}</td></tr>{% endfor %}</tbody></table></div>
{% else %}<p>Every image of the source was taken.</p>{% endif %}
</main></body></html>
"""

TILE, GAP = 64, 6  # pixels


def report(p: Report, data: Path, metrics: Path, out: Path, seed: int) -> None:
    """Write the page to `out`. Read: `data/images`, `data/groups`, where they are there `data/split` and `metrics` (scores)."""
    store = ImageStore(data / "images")
    groups = read_table(data / "groups" / "groups.parquet", GROUP_COLUMNS)
    split = data / "split" / "images.parquet"
    rejects = data / "images" / "rejects.parquet"
    page = render(
        _PAGE,
        {"words": lambda name: name.replace("_", " "), "share": lambda value: f"{value:.3f}"},
        images=len(store.table), shards=store.table["shard"].n_unique(), groups=len(groups),
        splits=_counts(read_table(split)["split"]) if split.exists() else [],
        licences=_counts(store.table["licence"]),
        plot=data_uri(_plot(store.table, groups)),
        scores=read_json(metrics) if metrics.exists() else {},
        kinds=[_kind(p, store, table, seed) for table in groups.sort("kind", "group_id").partition_by("kind", maintain_order=True)],
        rejects=_rejects(p, read_table(rejects, REJECT_COLUMNS)) if rejects.exists() else [],
    )  # fmt: skip
    write_bytes(out, page)


def _counts(column: pl.Series) -> list[tuple[str, int]]:
    return sorted(column.value_counts().iter_rows(), key=lambda row: (-row[1], row[0]))


def _rejects(p: Report, rejects: pl.DataFrame) -> list[dict[str, Any]]:
    return [
        {"name": name, "count": count, "lines": rejects.filter(reason=name)["detail"].head(p.rejects).to_list()}
        for name, count in _counts(rejects["reason"])
    ]


def _kind(p: Report, store: ImageStore, groups: pl.DataFrame, seed: int) -> dict[str, Any]:
    """Contact sheets of groups drawn at random and, where they have a cohesion, of the best and the worst."""
    kind = groups["kind"][0]
    rows = list(groups.iter_rows(named=True))
    sheets = [("Drawn at random", "", random.Random(f"{seed}/report/{kind}").sample(rows, min(p.groups, len(rows))))]
    if "cohesion" in groups.columns and groups["cohesion"].is_not_null().all():
        ranked = sorted(rows, key=lambda g: (-g["cohesion"], g["group_id"]))
        words = ", the most alike first; the number is the mean cosine"
        sheets += [("Most alike", words, ranked[: p.groups]), ("Least alike", words, ranked[-p.groups :])]
    pictures = [(title, words, data_uri(contact_sheet(p, store, chosen))) for title, words, chosen in sheets]
    return {
        "title": kind.capitalize(), "groups": len(rows), "images": len({m for g in rows for m in g["members"]}),
        "sheets": [{"title": title, "words": words, "picture": uri} for title, words, uri in pictures],
    }  # fmt: skip


def contact_sheet(p: Report, store: ImageStore, groups: list[dict[str, Any]]) -> Image.Image:
    """A row a group: its first members, and beside the last how alike they are and how many more there are."""
    from PIL import ImageDraw

    step = TILE + GAP
    sheet = Image.new("RGB", (p.members * step + 90, max(1, len(groups)) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for y, group in enumerate(groups):
        for x, member in enumerate(group["members"][: p.members]):
            image = store.image(member)
            image.thumbnail((TILE, TILE))
            sheet.paste(image, (x * step + (TILE - image.width) // 2, y * step + (TILE - image.height) // 2))
        more = len(group["members"]) - p.members
        lines = ([f"{group['cohesion']:.2f}"] if group.get("cohesion") is not None else []) + ([f"+{more}"] if more > 0 else [])
        draw.text((min(p.members, len(group["members"])) * step + 4, y * step + 8), "\n".join(lines), "#69717c", font_size=15)
    return sheet


def _plot(images: pl.DataFrame, groups: pl.DataFrame) -> Image.Image:
    """Histograms: longer side (the shorter is `ingest.size`), aspect, members of a group by kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10.4, 2.8), dpi=110)
    longer = images.select(pl.max_horizontal("width", "height"))["width"]
    axes[0].hist(longer, bins=30, color="#2f6fb0")
    axes[0].set_title("longer side, pixels", fontsize=10)
    axes[1].hist(images["width"] / images["height"], bins=30, color="#2f6fb0")
    axes[1].set_title("aspect, width / height", fontsize=10)
    sizes = groups.with_columns(size=pl.col("members").list.len())
    kinds = sorted(set(groups["kind"]))
    most = sizes["size"].quantile(0.98) or 2
    axes[2].hist([sizes.filter(kind=k)["size"].clip(upper_bound=int(most)) for k in kinds], bins=20, stacked=True, label=kinds)
    axes[2].set_title("images of a group", fontsize=10)
    axes[2].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    return picture(figure)
