"""Samples of the stages and their views on real images: what is drawn, and that all images of a sample are seen alike."""

import re
import shutil
from copy import copy
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from PIL import Image

from easyref.config import Params, parse_params
from easyref.data.captions import GIVEN, caption, invented
from easyref.data.dataset import SWAPS, TrainingImages
from easyref.data.frames import Framing
from easyref.data.shards import write_shard
from easyref.images import to_png
from easyref.records import IMAGE_COLUMNS, sha256_json, write_table
from easyref.training.ahead import ahead
from easyref.training.align import seen_labels
from easyref.training.inputs import NULL, Inputs, Sample, Sampler, Seen, keep_frozen, microbatches, open_store
from easyref.training.models import load_models
from easyref.training.stages import parts, sample_loss
from easyref.training.store import Disk, Store
from tests.projects import small_data

torch.set_num_threads(1)
NUMBERS = range(2000)


@pytest.fixture(scope="module")
def params() -> Params:
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["split"] |= {"held_out_groups": 1, "held_in_groups": 1, "samples_per_group": 1, "max_references": 2, "held_out_share": 0.2}
    values["finetune_multi"] |= {
        "swap_colours": 0.5,
        "mirror": 0.25,
        "group_share": 0.7,
        "drop_image": 0.1,
        "drop_text": 0.2,
        "drop_both": 0.05,
    }
    return parse_params(values)


@pytest.fixture(scope="module")
def images(params: Params, tmp_path_factory: pytest.TempPathFactory) -> TrainingImages:
    data = tmp_path_factory.mktemp("small")
    small_data(data / "data", params, every=20)
    return TrainingImages(data / "data")


def test_samples_have_the_shares_of_their_parameters(params: Params, images: TrainingImages) -> None:
    p = params.finetune_multi
    samples = [Sampler(images, p, 0, "test")(n) for n in NUMBERS]
    plain = [s for s in samples if not images.labels[s.target]["tone"]]

    def share(chosen: list[bool]) -> float:
        return sum(chosen) / len(chosen)

    assert share([s.references == (NULL,) for s in samples]) == pytest.approx(0.15, abs=0.03)
    assert share([not s.prompt for s in samples]) == pytest.approx(0.25, abs=0.03)
    assert share([s.view >= len(SWAPS) for s in samples]) == pytest.approx(0.25, abs=0.03)
    assert share([s.view % len(SWAPS) > 0 for s in plain]) == pytest.approx(0.5, abs=0.05)
    assert all(s.view % len(SWAPS) == 0 for s in samples if images.labels[s.target]["tone"])  # skin keeps its colour
    assert {s.view for s in plain} == set(range(2 * len(SWAPS)))
    assert share([s.references == (s.target,) for s in samples]) == pytest.approx(0.85 * 0.3, abs=0.03)
    for sample in samples:
        assert f"in {images.labels[sample.target]['colors']}" not in sample.prompt
        if sample.references not in ((NULL,), (sample.target,)):
            assert sample.target not in sample.references and len(sample.references) <= p.max_references
            assert any({sample.target, *sample.references} <= set(members) for _, members in images.groups)


def test_some_samples_keep_two_of_their_references_or_more(params: Params, images: TrainingImages) -> None:
    p = params.finetune_multi.model_copy(update={"group_share": 1.0, "drop_image": 0.0, "drop_both": 0.0})
    whole, cut = (
        [Sampler(images, p.model_copy(update={"truncate": share}), 0, "test")(n).references for n in NUMBERS] for share in (0.0, 0.4)
    )
    assert all(few == all_of_it[: max(2, len(few))] for all_of_it, few in zip(whole, cut, strict=True))
    shorter = [len(few) < len(all_of_it) for all_of_it, few in zip(whole, cut, strict=True) if len(all_of_it) > 2]
    assert sum(shorter) / len(shorter) == pytest.approx(0.4, abs=0.05)
    assert {len(few) for all_of_it, few in zip(whole, cut, strict=True) if len(all_of_it) == 4} == {2, 3, 4}


def test_target_and_references_are_seen_in_the_same_view(params: Params, images: TrainingImages) -> None:
    """Against pixels permuted and turned by numpy, the VAE and the vision tower called by hand."""
    models = load_models(params, Path("models"), None, "fp32")
    inputs = Inputs(models, images, frozen_prefix=True)
    for view, swap, step in ((0, (0, 1, 2), 1), (4, list(permutations(range(3)))[4], 1), (9, list(permutations(range(3)))[3], -1)):
        pixels = np.asarray(images.store.image(images.sha256s[5]))[:, ::step][..., list(swap)]
        x_13HW = torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        with torch.no_grad():
            latents = models.vae.encode(x_13HW).latent_dist.mean * models.vae.config.scaling_factor
        sample = Sample(5, (5,), "", view)
        torch.testing.assert_close(inputs.latents([sample]), latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs.latents([Sample(3, (5,), ""), sample])[1:], latents, rtol=1e-5, atol=1e-5)
        patches = models.processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(inputs.image_patches(Seen(5, view)).pixel_values, patches)
    tokens = [inputs.reference_tokens([Sample(5, (5,), "", view)]) for view in (0, 4)]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_colours_of_a_swapped_image_are_named_as_seen(params: Params, images: TrainingImages) -> None:
    """A heart that is red stays red with green and blue swapped, and is blue with red and blue swapped."""
    heart = next(i for i, label in enumerate(images.labels) if label["colors"] == "red")
    inputs = Inputs.__new__(Inputs)
    inputs.images = images
    seen = {swap: seen_labels(inputs, Sample(heart, (heart,), "", view)) for view, swap in enumerate(SWAPS)}
    assert "in red" in caption(seen[(0, 1, 2)], hide=()) and seen[(0, 1, 2)] is images.labels[heart]
    assert "in red" in caption(seen[(0, 2, 1)], hide=())
    assert "in blue" in caption(seen[(2, 1, 0)], hide=())
    assert {name: value for name, value in seen[(2, 1, 0)].items() if name != "colors"} == {
        name: value for name, value in images.labels[heart].items() if name != "colors"
    }


# -- aspects, splits, kept encodings --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heap(images: TrainingImages, tmp_path_factory: pytest.TempPathFactory) -> TrainingImages:
    """Eight real images on paper of several shapes, as `ingest` stores a heap: the shorter side is 64 pixels."""
    data = tmp_path_factory.mktemp("heap")
    shapes = [(64, 64), (96, 64), (64, 96), (64, 160), (96, 64), (64, 64), (64, 66), (130, 64)]  # width, height
    pictures, rows = [], []
    for shape, sha256, label in zip(shapes, images.sha256s, images.labels, strict=False):
        paper = Image.new("RGB", shape, "orange")
        paper.paste(images.store.image(sha256), ((shape[0] - 64) // 2, (shape[1] - 64) // 2))
        pictures.append(to_png(paper))
        rows.append({**label, "width": shape[0], "height": shape[1]})
    places = write_shard(data / "images" / "images-00000.tar", pictures)
    table = pl.DataFrame([{**row, **place} for row, place in zip(rows, places, strict=True)]).select(IMAGE_COLUMNS)
    write_table(data / "images" / "images.parquet", table)
    write_table(data / "split" / "images.parquet", table.select("sha256", split=pl.lit("train")))
    return TrainingImages(data, [place["sha256"] for place in places])


KEPT = Framing(64, 16)
SAMPLES = [
    Sample(0, (1, 2), "red apple"), Sample(1, (NULL,), ""), Sample(2, (3,), "farmer"), Sample(3, (3,), "cat face", 9),
    Sample(4, (5, 6, 7), ""), Sample(5, (4,), "farmer", 2), Sample(6, (6,), "star"), Sample(7, (0, 1, 2, 3), "sun"),
]  # fmt: skip


def test_a_target_that_keeps_its_aspect_is_the_resized_image(params: Params, heap: TrainingImages) -> None:
    """Against pixels resized and cut by hand; each target has its own sizes in SDXL's conditions."""
    models = load_models(params, Path("models"), None, "fp32")
    inputs = Inputs(models, heap, frozen_prefix=True, framing=KEPT)
    image = heap.store.image(heap.sha256s[3])  # 64 x 160 pixels: 40 x 101 have the area of 64 x 64, 48 x 96 are multiples of 16
    resized = image.resize((48, 120), Image.Resampling.LANCZOS).crop((0, 12, 48, 108))
    x_13HW = torch.tensor(np.asarray(resized) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        latents = models.vae.encode(x_13HW).latent_dist.mean * models.vae.config.scaling_factor
    torch.testing.assert_close(inputs.latents([Sample(3, (1,), "")]), latents, rtol=1e-5, atol=1e-5)
    assert inputs.time_ids([Sample(3, (1,), ""), Sample(0, (1,), "")]).tolist() == [[160, 64, 12, 0, 96, 48], [64, 64, 0, 0, 64, 64]]
    own, other = inputs.references(Sample(3, (3,), ""))[0], inputs.references(Sample(0, (3,), ""))[0]
    patches = models.processor.image_processor(images=[resized], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs.image_patches(own).pixel_values, patches)  # its own reference is cut like the target
    patches = models.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(inputs.image_patches(other).pixel_values, patches)


def test_invented_words_stand_for_the_subject_alone_and_change_no_other_draw(params: Params, images: TrainingImages) -> None:
    p = params.finetune_multi.model_copy(update={"hide_labels": 0.5})
    known = {word for label in images.labels for word in label["subject"].split()}
    plain, strange = (Sampler(images, p.model_copy(update={"invent_words": share}), 0, "test") for share in (0.0, 0.4))
    pairs = [(plain(n), strange(n)) for n in NUMBERS]
    assert all(replace(b, prompt=a.prompt) == a for a, b in pairs)
    named = [(a, b) for a, b in pairs if images.labels[a.target]["subject"] in a.prompt]
    changed = [(a, b) for a, b in named if a.prompt != b.prompt]
    assert len(changed) / len(named) == pytest.approx(0.4, abs=0.05)
    assert all(a.prompt == b.prompt for a, b in pairs if (a, b) not in named)
    for a, b in changed:
        subject = images.labels[a.target]["subject"]
        before, after = a.prompt.split(subject, 1)
        made = b.prompt.removeprefix(before).removesuffix(after)
        assert len(made.split()) == len(subject.split()) and not set(made.split()) <= set(subject.split())
    words = [word for _, b in changed for word in b.prompt.split(",")[0].split()]
    assert sum(word in known for word in words) / len(words) < 0.1


def test_invented_words_are_halves_of_known_ones() -> None:
    assert invented("woman farmer", "ice") == "wom" + "ce " + "far" + "ce"
    assert invented("ice", "woman farmer") == "icman"
    assert invented("woman", " ") == "wom"


@pytest.mark.parametrize("category", ["", GIVEN])
def test_a_caption_is_no_subject_to_invent_words_for(params: Params, images: TrainingImages, category: str) -> None:
    captioned = copy(images)
    captioned.labels = [{**label, "category": category, "subject": "a red dog on the beach"} for label in images.labels]
    sampler = Sampler(captioned, params.finetune_multi.model_copy(update={"invent_words": 1.0}), 0, "test")
    assert {sampler(n).prompt for n in range(200)} <= {"a red dog on the beach", ""}
    captioned.groups = []
    with pytest.raises(ValueError, match=r"test\.group_share 0\.7: the training images have no group; make some"):
        Sampler(captioned, params.finetune_multi, 0, "test")


def test_crops_are_drawn_from_a_few_places_and_change_no_other_draw(params: Params, images: TrainingImages) -> None:
    p = params.finetune_multi
    plain, cropped = (Sampler(images, p.model_copy(update={"crops": crops}), 0, "test") for crops in (1, 3))
    samples = [cropped(n) for n in NUMBERS]
    assert [replace(sample, place=0.5) for sample in samples] == [plain(n) for n in NUMBERS]
    shares = np.bincount([int(2 * sample.place) for sample in samples]) / len(samples)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)
    with pytest.raises(ValueError, match="keep_aspect leaves nothing to choose for crops 3"):
        type(p)(**(p.model_dump() | {"crops": 3, "keep_aspect": True}))


@pytest.fixture
def faces(heap: TrainingImages) -> TrainingImages:
    """Two of the images have a face, not in the middle."""
    found = copy(heap)
    found.faces = {1: (60, 10, 76, 30), 3: (30, 100, 50, 116)}
    return found


def test_a_share_of_faces_is_its_own_reference_and_no_other_draw_changes(params: Params, images: TrainingImages) -> None:
    some = copy(images)
    some.faces = {i: (10, 20, 30, 40) for i in range(0, len(images.sha256s), 2)}
    p = params.finetune_multi
    plain, faced = (Sampler(some, p.model_copy(update={"face_share": share}), 0, "test") for share in (0.0, 0.4))
    samples = [faced(n) for n in NUMBERS]
    assert [replace(sample, face=None) for sample in samples] == [plain(n) for n in NUMBERS]
    possible = [s for s in samples if s.references == (s.target,) and s.target in some.faces]
    seen = [s.face for s in possible if s.face]
    assert sum(s.face is not None for s in samples) == len(seen) and len(seen) / len(possible) == pytest.approx(0.4, abs=0.06)
    assert {f.frame.size[0] for f in seen if f.frame} <= set(range(20, 41)) and len({f.frame for f in seen}) > 15
    turned = [s.face.view >= len(SWAPS) for s in possible if s.face]
    assert np.mean(turned) == pytest.approx(0.5, abs=0.12)
    assert all(s.face.view % len(SWAPS) == s.view % len(SWAPS) for s in possible if s.face)  # colours as in the target
    with pytest.raises(ValueError, match=r"test.face_share 0.4: no face is known .* set embed.faces"):
        Sampler(images, p.model_copy(update={"face_share": 0.4}), 0, "test")


def test_a_face_that_is_the_reference_is_cut_from_the_image_as_it_is_seen(params: Params, faces: TrainingImages) -> None:
    """Against pixels cut first and mirrored afterwards; its key is of the image, the part and the view."""
    models = load_models(params, Path("models"), None, "fp32")
    inputs = Inputs(models, faces, frozen_prefix=True)
    p = params.finetune_single.model_copy(update={"face_share": 1.0, "drop_image": 0.0, "drop_both": 0.0, "mirror": 0.5})
    sampler = Sampler(faces, p, 0, "faces")
    samples = [s for s in map(sampler, range(200)) if s.target == 3]
    assert {s.face.view // len(SWAPS) for s in samples if s.face} == {0, 1} and len(samples) > 10
    keys = set()
    for sample in samples:
        assert sample.face and sample.face.frame and sample.references == (3,)
        (seen,) = inputs.references(sample)
        side = sample.face.frame.size[0]
        left, top = min(max(40 - side / 2, 0), 64 - side), 108 - side / 2
        plain = faces.store.image(faces.sha256s[3]).crop((round(left), round(top), round(left) + side, round(top) + side))
        pixels = np.asarray(plain)[..., list(SWAPS[seen.view % len(SWAPS)])]
        found = np.asarray(inputs._picture(seen))
        wanted = pixels[:, ::-1] if seen.view >= len(SWAPS) else pixels
        assert found.shape == wanted.shape
        if side % 2 == 0:  # else its middle is between two pixels, and which is taken depends on the side
            assert np.array_equal(found, wanted)
        keys.add(sha256_json(inputs._key(seen)))
        assert inputs.target(sample).view == sample.view and inputs.size(sample) == (64, 64)
    assert len(keys) == len({s.face for s in samples})
    inputs.load(samples[0])
    tokens = [inputs.reference_tokens([s])[0] for s in (samples[0], replace(samples[0], face=None))]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_microbatches_have_one_size_and_like_numbers_of_references(params: Params, heap: TrainingImages) -> None:
    samples = SAMPLES * 3
    for most in (1, 2, 5, 24):
        parts = microbatches(samples, most, lambda s: KEPT((heap.labels[s.target]["height"], heap.labels[s.target]["width"]), 0.5).size)
        assert sorted(i for part in parts for i in part) == list(range(24)) and all(len(part) <= most for part in parts)
        assert all(part == sorted(part) for part in parts)
    counts = [[len(samples[i].references) for i in part] for part in microbatches(samples, 6, lambda _: (64, 64))]
    assert all(max(few) <= min(more) for few, more in pairwise(counts)) and len(counts) == 4
    assert microbatches(samples, 24, lambda _: (64, 64)) == [list(range(24))]  # in a whole batch the order stays


@pytest.mark.parametrize("stage", ["pretrain", "finetune_multi"])
def test_any_split_of_an_update_gives_the_gradients_of_one_image_at_a_time(stage: str, params: Params, heap: TrainingImages) -> None:
    p = getattr(params, stage)
    models = load_models(params, Path("models"), p.lora_rank or None, "fp32")
    trained, _ = models.trainable(parts(stage, p))
    inputs = Inputs(models, heap, frozen_prefix=stage == "pretrain", framing=KEPT)

    def gradients(most: int) -> tuple[float, list[torch.Tensor]]:
        total = 0.0
        for part in microbatches(SAMPLES, most, inputs.size):
            loss = sample_loss(models, inputs, [SAMPLES[i] for i in part], 0, [f"test/{i}" for i in part]) * (len(part) / len(SAMPLES))
            loss.backward()
            total += loss.item()
        found = [tensor.grad.clone() for tensor in trained.values() if tensor.grad is not None]
        for tensor in trained.values():
            tensor.grad = None
        assert len(found) == len(trained)
        return total, found

    alone, gradients_alone = gradients(1)
    loss, found = gradients(3)
    assert loss == pytest.approx(alone, rel=1e-5)
    for a, b in zip(found, gradients_alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_kept_encodings_give_the_same_bits_without_running_a_model(
    params: Params, heap: TrainingImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix states on disk: a second run runs the last layer only; what is missing is made alone, so a batch changes nothing."""
    models = load_models(params, Path("models"), None, "fp32")

    def fresh(memory: int = 2**30, **options: Any) -> Inputs:
        disk = Disk(tmp_path / "encodings.sqlite", 2**28, dict.fromkeys(("text", "latents", "vision", "prefix"), "models"))
        return Inputs(models, heap, frozen_prefix=True, framing=KEPT, store=Store(memory, disk), **options)

    def encoded(inputs: Inputs) -> list[torch.Tensor]:
        with torch.no_grad():
            tokens_BTX = inputs.reference_tokens(SAMPLES)
        return [tokens_BTX, *inputs.text_states([s.prompt for s in SAMPLES]), *(inputs.latents([s]) for s in SAMPLES)]

    whole = encoded(Inputs(models, heap, frozen_prefix=False, framing=KEPT))
    batched = encoded(fresh())
    made = fresh(cache_prefix=True)
    made.reference_tokens(SAMPLES[4:6])  # some are there before
    one = encoded(made)
    for name in ("prefix", "vision"):
        monkeypatch.setattr(models.encoder, name, lambda *_: pytest.fail("run again"))
    monkeypatch.setattr(models.vae, "encode", lambda *_: pytest.fail("run again"))
    monkeypatch.setattr(models.processor, "image", lambda *_: pytest.fail("cut again"))
    for memory in (2**30, 8):  # with 8 bytes nothing stays in memory
        again = fresh(memory, cache_prefix=True)
        for sample in SAMPLES:
            again.load(sample)
        assert all(torch.equal(a, b) for a, b in zip(encoded(again), one, strict=True))
    for others in (whole, batched):
        for a, b in zip(others, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_encodings_of_other_models_precision_or_tokenizers_are_not_found(params: Params, tmp_path: Path) -> None:
    models = load_models(params, Path("models"), None, "fp32")
    base = tmp_path / "base"
    shutil.copytree("models/base", base, ignore=shutil.ignore_patterns("*.safetensors"))
    loading = params.loading.model_copy(update={"disk_gib": 0.1, "folder": str(tmp_path / "kept")})

    def kinds_found(kept: Store) -> set[str]:
        return {kind for kind in ("latents", "text", "vision", "prefix", "pixels") if kept.find(kind, "key")}

    def opened(how: str = "fp32", frozen: str | None = "mllm", **changed: Any) -> set[str]:
        kept = open_store(loading, replace(models, **changed), [how], base)
        if frozen:
            keep_frozen(kept, models, frozen)
        return kinds_found(kept)

    first = open_store(loading, models, ["fp32"], base)
    keep_frozen(first, models, "mllm")
    for kind in ("latents", "text", "vision", "prefix", "pixels"):
        first.get(lambda: {"x": torch.ones(3)}, kind, "key")
    assert opened() == {"latents", "text", "vision", "prefix"}
    assert opened(frozen="other") == opened(frozen=None) == {"latents", "text"}  # another MLLM, or one that trains
    assert not opened("bf16") and not opened(base_hash="other")
    (base / "diffusion" / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert not opened()


def test_a_training_does_not_go_on_under_other_captions(heap: TrainingImages, tmp_path: Path) -> None:
    shutil.copytree(heap.store.folder.parent, tmp_path / "data")
    assert TrainingImages(tmp_path / "data", heap.sha256s).content == heap.content
    table = pl.read_parquet(tmp_path / "data" / "images" / "images.parquet")
    write_table(tmp_path / "data" / "images" / "images.parquet", table.with_columns(subject=pl.col("subject") + " at night"))
    assert TrainingImages(tmp_path / "data", heap.sha256s).content != heap.content


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torn_shard_is_one_line_that_names_it(params: Params, heap: TrainingImages, tmp_path: Path, workers: int) -> None:
    shutil.copytree(heap.store.folder.parent, tmp_path / "data")
    torn = TrainingImages(tmp_path / "data", heap.sha256s)
    shard, row = tmp_path / "data" / "images" / "images-00000.tar", torn.labels[6]
    models = load_models(params, Path("models"), None, "fp32")
    feed = ahead(iter([[0, 1], [2, 3], [6]]), SAMPLES.__getitem__, Inputs(models, torn, True).load, workers)
    data = bytearray(shard.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 1
    shard.write_bytes(data)
    assert [next(feed), next(feed)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=rf"^{re.escape(str(shard))}: bytes of {row['sha256']} do not match its hash; .*$"):
        next(feed)
