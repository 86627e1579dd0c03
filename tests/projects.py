"""A few of the real images, split anew, for tests that run stages."""

import shutil
from pathlib import Path

from easyref.config import Params
from easyref.data.group import label_groups
from easyref.data.shards import ImageStore
from easyref.data.split import split_images
from easyref.records import write_table


def small_data(folder: Path, params: Params, every: int) -> None:
    """`folder` as the stages ingest, group and split leave `data`, with one concept of `every`."""
    shutil.copytree(Path("data") / "images", folder / "images")
    table = ImageStore(folder / "images").table
    concepts = table["concept"].unique().sort().to_list()[::every]
    write_table(folder / "images" / "images.parquet", table.filter(table["concept"].is_in(concepts)))
    store = ImageStore(folder / "images")
    for name, part in split_images(store, label_groups(store.table, params.group), params.split, 0).items():
        write_table(folder / "split" / f"{name}.parquet", part)
