"""A few of the real images, split anew, for tests that run stages."""

import shutil
from pathlib import Path

import yaml

from easyref.config import Params, parse_params
from easyref.data.group import label_groups
from easyref.data.shards import ImageStore
from easyref.data.split import split_images
from easyref.records import write_table
from easyref.training.stages import STAGES

#: A training of two updates.
TINY = {"images": 8, "batch": 4, "microbatch": 2, "save_images": 4, "warmup_images": 0, "cooldown_images": 0, "ema_images": 4}


def tiny_project(place: Path) -> Path:
    """Every 160th concept of the real images, split anew, the shipped base models, and parameters that train in seconds."""
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["threads"] = 1
    values["loading"] = {"workers": 2, "memory_gib": 0.05, "disk_gib": 0.05, "folder": ".work"}
    values["split"] |= {"held_out_groups": 1, "held_in_groups": 1, "samples_per_group": 1, "max_references": 2, "held_out_share": 0.2}
    values["align"] |= TINY
    for name in STAGES:
        values[name] |= TINY
        values[name]["lora_rank"] = 2 if name != "pretrain" else 0
        values[name]["max_references"] = 2 if name == "finetune_multi" else 1
    params = parse_params(values)
    (place / "params.yaml").write_text(yaml.safe_dump(values))
    small_data(place / "data", params, every=160)
    (place / "models").mkdir()
    (place / "models" / "base").symlink_to((Path("models") / "base").resolve())
    return place


def small_data(folder: Path, params: Params, every: int) -> None:
    """`folder` as the stages ingest, group and split leave `data`, with one concept of `every`."""
    shutil.copytree(Path("data") / "images", folder / "images")
    table = ImageStore(folder / "images").table
    concepts = table["concept"].unique().sort().to_list()[::every]
    write_table(folder / "images" / "images.parquet", table.filter(table["concept"].is_in(concepts)))
    store = ImageStore(folder / "images")
    for name, part in split_images(store, label_groups(store.table, params.group), params.split, 0).items():
        write_table(folder / "split" / f"{name}.parquet", part)
