"""Embeddings by the extractors that come inside, and by tiny models in the form of the hub's."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from easyref.config import Embed, Model, Subjects, load_params
from easyref.data.embed import Extractors, embed
from easyref.data.extractors import Lite0, MiniLM, Palette
from easyref.data.group import label_groups
from easyref.data.hub import HubImages, HubTexts, make_extractors
from easyref.data.shards import ImageStore
from easyref.data.split import split_images
from easyref.records import read_table, write_table
from tests.processes import exit_code, start

P = Embed(batch=4, workers=1, images=None, texts=None, subjects=None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images of each of two shards."""
    folder = tmp_path / "images"
    shutil.copytree("data/images", folder)
    table = ImageStore(folder).table
    shards = table["shard"].unique().sort().to_list()
    write_table(folder / "images.parquet", pl.concat([table.filter(shard=shard).head(6) for shard in shards[:2]]))
    return folder


def test_vectors_are_those_of_lite0_and_minilm(images: Path, tmp_path: Path) -> None:
    assert embed(P, images, tmp_path / "out", tmp_path / "work") == {"image": 12}
    store = ImageStore(images)
    lite0, minilm = Lite0(), MiniLM()
    for number, shard in enumerate(store.table["shard"].unique().sort()):
        rows = read_table(tmp_path / "out" / f"rows-{number:05d}.parquet")
        assert set(rows["sha256"]) == set(store.table.filter(shard=shard)["sha256"])
        deep, shallow = lite0.both([store.image(s) for s in rows["sha256"]])
        text = minilm([store.rows[s]["caption"] for s in rows["sha256"]])
        colours = Palette()([store.image(s) for s in rows["sha256"]])
        for space, expected in (("subject", deep), ("style", shallow), ("palette", colours), ("text", text)):
            found = np.load(tmp_path / "out" / f"{space}-{number:05d}.npy")
            # MiniLM's 8-bit products depend a little on the other texts of the batch
            np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.05 if space == "text" else 0.02, rtol=2e-3)
    assert not (tmp_path / "work").exists()


def slow(p: Embed) -> Extractors:
    extractors = make_extractors(p)

    def images(items):
        time.sleep(0.2)
        return extractors.images(items)

    return Extractors(images, extractors.texts)


@pytest.mark.long
def test_kill_9_and_again_gives_the_same_tables_and_keeps_finished_shards(images: Path, tmp_path: Path) -> None:
    embed(P, images, tmp_path / "whole", tmp_path / "work 0")
    work = tmp_path / "work"
    process = start(embed, P, images, tmp_path / "killed", work, "local", slow)
    while not [part for part in work.glob("*") if not part.name.startswith(".")]:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    assert exit_code(process) == -signal.SIGKILL and not (tmp_path / "killed").exists()
    first = next(part for part in work.glob("*") if not part.name.startswith("."))
    made = first.stat().st_mtime_ns
    watched: list[int] = []

    def watching(p: Embed) -> Extractors:
        watched.append(first.stat().st_mtime_ns)
        return make_extractors(p)

    embed(P, images, tmp_path / "killed", work, make=watching)
    assert watched == [made]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_two_workers_write_the_same_files(images: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        embed(P.model_copy(update={"workers": workers}), images, tmp_path / str(workers), tmp_path / "work")
    assert files(tmp_path / "1") == files(tmp_path / "2")


def dying(p: Embed) -> Extractors:
    """The first worker that embeds is killed in the middle of its piece."""
    extractors, mark = make_extractors(p), Path(os.environ["EASYREF_MARK"])

    def images(items):
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return extractors.images(items)
        os.kill(os.getpid(), signal.SIGKILL)

    return Extractors(images, extractors.texts)


@pytest.mark.long
def test_ray_writes_the_same_files_when_a_worker_is_killed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYREF_MARK", str(tmp_path / "mark"))
    p = P.model_copy(update={"workers": 2})
    embed(P, images, tmp_path / "local", tmp_path / "work")
    embed(p, images, tmp_path / "ray", tmp_path / "work", "ray", dying)
    assert (tmp_path / "mark").exists() and files(tmp_path / "local") == files(tmp_path / "ray")


def test_a_changed_parameter_embeds_anew(images: Path, tmp_path: Path) -> None:
    work, made = tmp_path / "work", []

    def failing(p: Embed) -> Extractors:
        made.append(p.batch)
        return Extractors(lambda _: (_ for _ in ()).throw(RuntimeError("no")), MiniLM())

    for batch in (4, 3):
        with pytest.raises(RuntimeError):
            embed(P.model_copy(update={"batch": batch}), images, tmp_path / "out", work, make=failing)
    assert made == [4, 3] and not (tmp_path / "out").exists()


def test_models_of_the_hub(images: Path, tmp_path: Path) -> None:
    """CLIP, DINOv2 and a detector in their published form, tiny and untrained."""
    from transformers import (
        BitImageProcessor,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
        Dinov2Config,
        Dinov2Model,
        YolosConfig,
        YolosForObjectDetection,
        YolosImageProcessor,
    )

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip, dino, yolos = (str(tmp_path / name) for name in ("clip", "dino", "yolos"))
    base = Path("models/base/diffusion/tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(base)
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**small, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    Dinov2Model(Dinov2Config(**small, image_size=28, patch_size=14)).save_pretrained(dino)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(dino)
    detector = YolosForObjectDetection(YolosConfig(**small, image_size=[64, 64], patch_size=16, num_detection_tokens=5, num_labels=3))
    detector.save_pretrained(yolos)
    YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(yolos)

    store = ImageStore(images)
    pictures = [store.image(s) for s in store.table["sha256"][:3]]
    texts = ["a farmer", "a cat in blue and yellow, noto style"]
    processor = CLIPImageProcessor.from_pretrained(clip)
    with torch.inference_mode():
        pixels = processor(images=pictures, return_tensors="pt")
        ids = tokenizer(texts, padding=True, return_tensors="pt")
        both = model(**pixels, **ids)
    for own, theirs in (
        (HubImages(Model(id=clip, revision=None))(pictures), both.image_embeds),
        (HubTexts(Model(id=clip, revision=None), 8)(texts), both.text_embeds),
    ):
        np.testing.assert_allclose(own / np.linalg.norm(own, axis=1, keepdims=True), theirs.numpy(), atol=1e-5)

    subjects = Subjects(id=yolos, revision=None, min_score=0.1, max_boxes=2, min_share=0.0)
    p = Embed(batch=4, workers=1, images=Model(id=dino, revision=None), texts=Model(id=clip, revision=None), subjects=subjects)
    counts = embed(p, images, tmp_path / "out", tmp_path / "work")
    rows, vectors = read_table(tmp_path / "out" / "rows-00000.parquet"), np.load(tmp_path / "out" / "subject-00000.npy")
    assert counts["image"] == 12 and 0 < counts["subject"] <= 24 and vectors.shape == (len(rows), 16)
    dinov2 = HubImages(Model(id=dino, revision=None))
    for row, vector in zip(rows.iter_rows(named=True), vectors, strict=True):
        image = store.image(row["sha256"]).crop((row["left"], row["top"], row["right"], row["bottom"]))
        np.testing.assert_allclose(vector.astype(np.float32), dinov2([image])[0], atol=5e-3)
    style = np.load(tmp_path / "out" / "style-00000.npy")
    assert np.array_equal(np.isnan(style[:, 0]), (rows["part"] == "subject").to_numpy())


def test_learned_subjects_stay_on_one_side(tmp_path: Path) -> None:
    """Images with names of their own, as a heap has them: what was found to be the same subject is not divided."""
    store = ImageStore("data/images")
    params = load_params("presets/nano.yaml")
    groups = label_groups(store.table, params.group).filter(kind="subject").with_columns(cohesion=pl.lit(0.5))
    named = store.table.with_columns(concept=pl.col("sha256"), subject=pl.col("sha256"))
    store.table, store.rows = named, {row["sha256"]: row for row in named.iter_rows(named=True)}
    side = dict(split_images(store, groups, params.split, 0)["images"].iter_rows())
    sides = [{"held_out" if side[m] == "held_out" else "train" for m in members} for members in groups["members"]]
    assert all(len(s) == 1 for s in sides) and sum(s == {"held_out"} for s in sides) > 20
