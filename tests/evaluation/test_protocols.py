"""Folders of the protocols become samples; what cannot be used is one line; `evaluate` takes them as they are."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from easyref.evaluation.evaluate import evaluate
from easyref.evaluation.generations import Painter, Request
from easyref.evaluation.probes import fit_dual
from easyref.evaluation.protocols import COMPARISON, dreambench, single
from easyref.evaluation.summary import table
from easyref.records import sha256_file

from .conftest import Emoji
from .test_evaluate import PARAMS


@pytest.fixture
def folder(emoji: Emoji, tmp_path: Path) -> Path:
    """Two subjects of three images and two prompts, a third one with a broken image; a caption beside each image but one."""
    held_out = emoji.images.filter(pl.col("split") == "held_out")
    things = [sorted(group["sha256"]) for _, group in held_out.filter(pl.col("tone") == "").sort("sha256").group_by("concept")]
    for name, shas in zip(("cat2", "dog_brown"), sorted(things), strict=False):
        (tmp_path / name).mkdir()
        for number, sha in enumerate(shas[:3]):
            emoji.load(sha).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"a {name} {number}\n")
    (tmp_path / "dog_brown" / "2.txt").unlink()
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "0.png").write_bytes(b"not a picture")
    (tmp_path / "owl" / "0.txt").write_text("an owl")
    (tmp_path / "prompts.txt").write_text("a {} on the beach\n\n{} in the snow\n")
    return tmp_path


def test_dreambench_is_every_subject_in_every_prompt(emoji: Emoji, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dreambench(emoji.images, emoji.load, folder)
    samples = found.samples.to_dicts()
    assert [row["prompt"] for row in samples] == [
        *("a cat on the beach", "cat in the snow", "a dog brown on the beach", "dog brown in the snow"),
    ]
    first = {row["group_id"]: found.paths[row["target"]].name for row in samples}
    assert first == {"cat2": "0.png", "dog_brown": "0.png"} and all(row["references"] == [row["target"]] for row in samples)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "owl/0.png: not an image" in lines[0] and "owl: no image that can be read" in lines[1]


def test_dreambench_takes_the_published_classes_and_prompts_of_a_subjects_own(emoji: Emoji, folder: Path) -> None:
    (folder / "classes.txt").write_text("subject_name,class\nred_cartoon,cartoon\ndog_brown,stuffed animal\n")
    (folder / "cat2" / "prompts.txt").write_text("a {} wearing a red hat\n")
    prompts = dreambench(emoji.images, emoji.load, folder).samples["prompt"].to_list()
    assert prompts == ["a cat wearing a red hat", "a stuffed animal on the beach", "stuffed animal in the snow"]


def test_single_is_every_image_with_its_caption(emoji: Emoji, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, caption in (("3", b"un chat fatigu\xe9"), ("4", b" \n")):
        shutil.copy(folder / "cat2" / "0.png", folder / "cat2" / f"{name}.png")
        (folder / "cat2" / f"{name}.txt").write_bytes(caption)
    samples = single(emoji.images, emoji.load, folder).samples
    assert sorted(samples["prompt"]) == ["a cat2 0", "a cat2 1", "a cat2 2", "a dog_brown 0", "a dog_brown 1"]
    assert samples["target"].to_list() == [references[0] for references in samples["references"]]
    err = capsys.readouterr().err
    assert "dog_brown/2.png: no caption; write it to 2.txt" in err and "owl/0.png" in err
    assert "cat2/3.txt: cannot be read" in err and "cat2/4.png: no caption" in err
    held_out = single(emoji.images, emoji.load, None).samples
    assert sorted(held_out["target"]) == sorted(emoji.images.filter(pl.col("split") == "held_out")["sha256"])


def test_an_image_of_the_training_split_is_one_row(emoji: Emoji, folder: Path) -> None:
    """Of two rows with one sha256 the features of every other image would be taken from its neighbour."""
    pasted = sha256_file(folder / "cat2" / "1.png")
    known = emoji.images.filter(split="train")["sha256"][0]
    images = emoji.images.with_columns(pl.col("sha256").replace({known: pasted}))
    for found in (single(images, emoji.load, folder), dreambench(images, emoji.load, folder)):
        rows = found.images.filter(sha256=pasted)
        assert rows["split"].to_list() == [found.protocol] and found.images["sha256"].is_unique().all()


@pytest.mark.parametrize(("prompts", "message"), [(None, "no prompts"), ("a cat", r"has no \{\}")])
def test_prompts_that_cannot_be_used_are_one_line(emoji: Emoji, folder: Path, prompts: str | None, message: str) -> None:
    (folder / "prompts.txt").unlink()
    if prompts:
        (folder / "prompts.txt").write_text(prompts)
    with pytest.raises(ValueError, match=message):
        dreambench(emoji.images, emoji.load, folder)
    with pytest.raises(ValueError, match="no sample"):
        _ = single(emoji.images, emoji.load, folder / "owl").samples


def test_evaluate_takes_them(emoji: Emoji, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyref.evaluation.judges.fit_dual", partial(fit_dual, steps=20))
    found = dreambench(emoji.images, emoji.load, folder)

    def paste(requests: list[Request]) -> list[Image.Image]:
        return [r["references"][0] if r["references"] else emoji.load(emoji.images["sha256"][0]) for r in requests]

    arguments = {"seed": 0, "out": tmp_path / "out", "embedded": tmp_path, "limits": {"dreambench": 3}}
    painters = {"together": Painter(lambda: paste, "paste")}
    result = evaluate(COMPARISON, found.samples, found.images, found.load, painters, PARAMS, **arguments).result["dreambench"]
    assert result["fidelity"]["samples"] == 3 and result["fidelity"]["easyref"] == pytest.approx(1, abs=1e-3)
    assert result["fidelity"]["easyref_minus_shuffled"]["mean"] > 0.2
    head, _, *rows = table("dreambench", result)
    assert head.startswith("| dreambench | fidelity |") and [row.split(" | ")[0] for row in rows] == [
        *("| easyref", "| text only", "| shuffled", "| ceiling"),
    ]
    assert result["style"] is None and result["tone"] is None, "their images have no such labels"
