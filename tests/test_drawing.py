"""Pictures that say how they were made: settings in the PNG, `easyref generate --from`, references found again, bad input."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from easyref.cli import _draw, app
from easyref.data.shards import ImageStore
from easyref.drawing import PNG_KEY, Artist, Reference, Settings, Wish, _file, parse_scale
from easyref.images import ImageError
from easyref.pipeline import Request
from easyref.records import sha256_file
from easyref.seeds import numpy_rng

ROOT = Path(__file__).parents[1]
CHECKPOINT = Path("models/pretrain")
WISH = Wish(prompt="cat face", negative_prompt="robot", steps=3, guidance=2.5, scale=1.25)


def generate(*words: str) -> list[str]:
    """What `easyref generate` prints. What it raises is one line on the terminal (test_cli.py)."""
    done = CliRunner().invoke(app, ["generate", "--model", str(ROOT / CHECKPOINT), *words])
    if done.exception:
        raise done.exception
    return done.stdout.split()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, store = tmp_path_factory.mktemp("references"), ImageStore(Path("data/images"))
    for name, sha256 in zip(("a.png", "b.png"), store.rows, strict=False):
        store.image(sha256).save(folder / name)
    return [folder / "a.png", folder / "b.png"]


@pytest.fixture(scope="module")
def artist() -> Iterator[Artist]:
    torch.set_num_threads(1)
    yield Artist.load(CHECKPOINT, "pretrain")


def test_a_picture_says_how_it_was_made(artist: Artist, references: list[Path]) -> None:
    used = [Reference.read(references[0], weight=2.0), Reference.read(references[1].read_bytes(), "b.png")]
    steps: list[int] = []
    first, second = artist.draw(WISH, used, [7, 9], steps.append)
    settings = Settings.read(second)
    assert settings and steps == [1, 2, 3]
    assert {name: getattr(settings, name) for name in Wish.model_fields} == WISH.model_dump() | {"width": 64, "height": 64}
    assert (settings.seed, settings.batch, settings.width, settings.height) == (9, [7, 9], 64, 64)
    assert [(r.name, r.sha256, r.weight) for r in settings.references] == [
        ("a.png", sha256_file(references[0]), 2.0), ("b.png", sha256_file(references[1]), 1.0)
    ]  # fmt: skip
    assert settings.model == "pretrain" and settings.model_sha256 == sha256_file(CHECKPOINT / "easyref.safetensors")
    assert np.asarray(Image.open(io.BytesIO(first))).tobytes() != np.asarray(Image.open(io.BytesIO(second))).tobytes()


def test_what_a_step_raises_ends_the_drawing(artist: Artist, references: list[Path]) -> None:
    seen: list[int] = []

    def stop(number: int) -> None:
        seen.append(number)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        artist.draw(WISH, [Reference.read(references[0])], [0], stop)
    assert seen == [1] and artist.draw(WISH, [Reference.read(references[0])], [0])


def test_what_is_drawn_is_kept_when_a_later_batch_fails(
    artist: Artist, references: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = artist.easyref.draw

    def draw(requests: list[Request], *rest: Any, **options: Any) -> list[Image.Image]:
        if requests[0].seed == 8:
            raise InterruptedError
        return whole(requests, *rest, **options)

    monkeypatch.setattr(artist.easyref, "draw", draw)
    monkeypatch.setattr("easyref.cli._artist", lambda *_: artist)
    with pytest.raises(InterruptedError):
        generate("--ref", str(references[0]), "--steps", "1", "--num", "9", "--out", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{seed}.png" for seed in range(8)]


def test_a_folder_that_cannot_be_is_told_before_the_drawing(artist: Artist, references: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    refused = Wish(prompt="cat " * 300)  # by the drawing
    for out, error in ((tmp_path / "out", FileExistsError), (tmp_path / "other", ValueError)):
        with pytest.raises(error, match="File exists" if error is FileExistsError else "prompt"):
            _draw(artist, refused, [Reference.read(references[0])], [[0]], [0], out)


def test_generate_from_a_picture_draws_the_same_bits(tmp_path: Path, references: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch of three; the references are found by content under other names; an option on the command line changes it."""
    asked = ("--prompt", "cat face", "--steps", "3", "--guidance", "2.5", "--scale", "1.25", "--weight", "2", "--weight", "1")
    files = [word for path in references for word in ("--ref", str(path))]
    generate(*files, *asked, "--num", "3", "--seed", "4", "--out", str(tmp_path / "one"))
    made = tmp_path / "one" / "5.png"
    (tmp_path / "x.png").write_bytes(references[0].read_bytes())
    (tmp_path / "one" / "b.png").write_bytes(references[1].read_bytes())  # by its name, beside the picture
    again = tmp_path / "two" / "5.png"
    monkeypatch.chdir(tmp_path)
    assert generate("--from", str(made), "--ref", "x.png", "--out", str(tmp_path / "two")) == [str(again)]
    assert list((tmp_path / "two").iterdir()) == [again]
    assert np.array_equal(np.asarray(Image.open(made)), np.asarray(Image.open(again)))
    settings, other = Settings.read(made), Settings.read(again)
    assert settings and other
    renamed = [one.model_copy(update={"name": name}) for one, name in zip(other.references, ("a.png", "b.png"), strict=True)]
    assert other.model_copy(update={"references": renamed}) == settings

    for precision in ("fp32", "bf16"):
        generate(*files, *asked, "--seed", "5", "--precision", precision, "--out", str(tmp_path / precision))
    whole, half = (np.asarray(Image.open(tmp_path / name / "5.png"), np.float64) for name in ("fp32", "bf16"))
    assert Settings.read(tmp_path / "bf16" / "5.png") == settings.model_copy(update={"batch": [5], "precision": "bf16"})
    assert 0.02 < np.abs(half - whole).mean() < 8, "rounded, but the same picture"

    generate("--from", str(made), *files, "--prompt", "star", "--seed", "5", "--out", str(tmp_path / "three"))
    third = Settings.read(tmp_path / "three" / "5.png")
    assert third and (third.prompt, third.scale, third.batch, third.references[0].weight) == ("star", 1.25, [5], 2.0)
    more = generate("--from", str(made), *files, "--num", "2", "--out", str(tmp_path / "four"))
    assert [Path(name).name for name in more] == ["5.png", "6.png"], "from the picture's own seed on"


def test_base64_is_no_path_however_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYREF_REFERENCES", str(tmp_path))
    assert _file(base64.b64encode(bytes(600)).decode(), "references[0]") == bytes(600), "a name of a file has 255 bytes at most"


def test_of_a_file_elsewhere_it_is_not_even_said_that_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.txt").write_text("there")
    (tmp_path / "inside" / "link.txt").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setenv("EASYREF_REFERENCES", str(tmp_path / "inside"))
    for text in ("../secret.txt", "../nothing.txt", str(tmp_path / "secret.txt"), "link.txt", "a\0b"):
        with pytest.raises(ValueError, match=r"references\[0\]: not base64 of an image file; paths are taken only below"):
            _file(text, "references[0]")


def test_every_control_changes_the_picture_and_is_drawn_again(
    artist: Artist, tmp_path: Path, references: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative references, size, scale by block and window: each does something, stands in the picture, and comes out of it again."""
    used, against = [Reference.read(references[0])], Reference.read(references[1], negative=True)
    controls = {"scale": {"up_blocks": 1.5, "mid_block": 0.5}, "window": (0.0, 0.5), "width": 96, "height": 56}
    alone: list[tuple[dict, list[Reference]]] = [({}, used), ({}, [*used, against]), *(({k: v}, used) for k, v in controls.items())]
    drawn = {Image.open(io.BytesIO(artist.draw(Wish.of(steps=4, **given), some, [0])[0])).tobytes() for given, some in alone}
    words = ["--scale", "up_blocks=1.5,mid_block=0.5", "--window", "0", "0.5", "--width", "96", "--height", "56", "--steps", "4"]
    made, again = tmp_path / "made" / "0.png", tmp_path / "again" / "0.png"
    generate("--ref", str(references[0]), "--negative-ref", str(references[1]), *words, "--out", str(made.parent))
    (together,) = artist.draw(Wish.of(steps=4, **controls), [*used, against], [0])
    assert made.read_bytes() == together and Image.open(made).size == (96, 56)
    assert len({*drawn, Image.open(made).tobytes()}) == len(alone) + 1
    settings = Settings.read(made)
    assert settings and {name: getattr(settings, name) for name in controls} == controls
    assert [(one.name, one.negative) for one in settings.references] == [("a.png", False), ("b.png", True)]

    monkeypatch.chdir(references[0].parent)
    generate("--from", str(made), "--out", str(again.parent))
    assert again.read_bytes() == together


def test_a_picture_of_before_the_controls_is_still_read(artist: Artist, references: list[Path]) -> None:
    made = Settings.read(artist.draw(WISH, [Reference.read(references[0])], [0])[0])
    assert made
    old = made.model_dump(exclude={"window": True, "references": {0: {"negative"}}})
    assert "window" not in old and "negative" not in old["references"][0] and Settings.model_validate(old) == made


def test_controls_out_of_bounds_are_one_line(artist: Artist, references: list[Path]) -> None:
    used, against = Reference.read(references[0]), Reference.read(references[1], negative=True)
    for given, message in (
        ({"scale": {"up_blocks.7": 1.0}}, "no cross-attention starts with 'up_blocks.7'; names are like 'down_blocks.0."),
        ({"scale": 11}, "scale: give a number from 0 to 10"),
        ({"scale": {"mid_block": float("nan")}}, "scale: give a number from 0 to 10"),
        ({"scale": {"mid_block": "much"}}, "scale.mid_block: Input should be a valid number"),
        ({"scale": {}}, "scale: give a number from 0 to 10"),
        ({"window": (0.6, 0.5)}, "window (0.6, 0.5): ends before it starts"),
        ({"window": (0, 1.5)}, "window.1: Input should be less than or equal to 1"),
        ({"width": 60}, "width 60: give a multiple of 8 from 32 to 128"),
        ({"height": 136}, "height 136: give a multiple of 8 from 32 to 128"),
        ({"guidance": 1}, "negative references do nothing at guidance 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as failure:
            artist.check(Wish.of(**given), [used, against])
        assert len(str(failure.value).splitlines()) == 1
    with pytest.raises(ValueError, match="33 negative references, the model takes at most"):
        artist.check(WISH, [used, *[against] * 33])
    for text in ("strong", "up_blocks=", "up_blocks=1,", "up_blocks=1=2"):
        with pytest.raises(ValueError, match=re.escape(f"--scale {text!r}: give a number, or numbers by block such as")):
            parse_scale(text)


def test_pictures_that_tell_nothing_and_lost_references(
    tmp_path: Path, references: list[Path], artist: Artist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, torn, drawn = (tmp_path / name for name in ("plain.png", "torn.png", "drawn.png"))
    Image.fromarray(numpy_rng("plain").integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(plain)
    chunks = PngInfo()
    chunks.add_itxt(PNG_KEY, '{"prompt": 3}')
    Image.new("RGB", (8, 8)).save(torn, pnginfo=chunks)
    drawn.write_bytes(artist.draw(WISH, [Reference.read(references[0])], [0])[0])
    assert Settings.read(plain) is None
    settings = Settings.read(drawn)
    assert settings
    with pytest.raises(ValueError, match="seed 3 is not one of at most 8 in batch"):
        Settings.model_validate(settings.model_dump() | {"seed": 3})
    with pytest.raises(ImageError, match="not an image"):
        Settings.read(b"hello", "a.png")
    for words, message in (
        (["--from", str(plain)], "no settings in it; name a PNG that easyref drew"),
        (["--from", str(torn)], "settings of another version of easyref: prompt"),
        (["--from", str(drawn)], "a.png (sha256 "),
        (["--prompt", "star"], "no reference; give at least one with --ref"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as failure:
            generate(*words, "--out", str(tmp_path / "out"))
        assert len(str(failure.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
