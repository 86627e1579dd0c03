"""Training groups as the JSON and image files that the published training code reads (`{target, image_file, text}`, and `face` where
the target has one)."""

from __future__ import annotations

from pathlib import Path

from easyref.data.shards import ImageStore
from easyref.images import file_suffix
from easyref.progress import track
from easyref.records import FACE_COLUMNS, atomic_folder, read_table, write_json


def write_upstream(data: Path, out: Path) -> int:
    """Write `out`/data.json and `out`/images: each member of a training group once as the target, the others as its references.
    Returns the number of entries.

    Raises:
        ValueError: something else is in `out`.
    """
    if out.exists() and not (out / "data.json").exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out}: is there and holds something else, which would be lost; give a new folder")
    store = ImageStore(data / "images")
    groups = read_table(data / "split" / "groups.parquet").filter(split="train").sort("group_id")
    boxes = data / "split" / "faces.parquet"
    faces = {sha256: box for sha256, *box in read_table(boxes).select(FACE_COLUMNS).iter_rows()} if boxes.exists() else {}
    entries: list[dict] = []
    with atomic_folder(out) as folder:
        (folder / "images").mkdir()
        names: dict[str, str] = {}
        for group in track(groups.iter_rows(named=True), "upstream", len(groups), "groups"):
            for sha256 in group["members"]:
                if sha256 not in names:
                    content = store.bytes(sha256)
                    names[sha256] = f"images/{sha256}{file_suffix(content)}"
                    (folder / names[sha256]).write_bytes(content)
            for target in group["members"]:
                others = [names[sha256] for sha256 in group["members"] if sha256 != target]
                entry = {"target": names[target], "image_file": others, "text": store.rows[target]["caption"]}
                entries.append(entry | ({"face": [faces[target]]} if target in faces else {}))
        write_json(folder / "data.json", entries)
    return len(entries)
