"""A heap of images with every fault we know: each is rejected or repaired as documented, nothing of the rest is lost."""

import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from typer.testing import CliRunner

from easyref.cli import app
from easyref.config import Ingest, Params, Score, load_params
from easyref.data import check, ingest
from easyref.data.check import Checked
from easyref.data.dataset import TrainingImages
from easyref.data.group import label_groups
from easyref.data.shards import ImageStore
from easyref.data.sources import Found, from_folder, from_table, from_tars
from easyref.data.split import split_images, thumbnails
from easyref.images import Reason, open_image
from easyref.records import read_table, write_table

SIZE = 32


def settings(source: str, path: Path | None, **limits: Any) -> Params:
    values = load_params(Path("params.yaml"))
    small = {"max_pixels": 4_000_000, "max_side": 5000, "max_bytes": 2**20, "max_frames": 20, "max_metadata": 4096, "seconds": 30.0}
    given = values.ingest.limits.model_copy(update={**small, "min_side": 24, **limits})
    heap = Ingest(source=source, path=str(path), size=SIZE, palette=64, shard_images=40, limits=given)  # type: ignore[arg-type]
    return values.model_copy(update={"ingest": heap})


def picture(seed: int, width: int = 40, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Smooth noise: no two look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large, with hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def with_text(amount: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * amount, zip=True)
    return encoded(picture(902), pnginfo=info)


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[0x0112] = orientation
    return values


def swapped_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


GOOD = encoded(picture(900))
JPEG = encoded(picture(901), "JPEG", quality=90)
FRAMES = [picture(910 + i) for i in range(30)]
#: name → bytes, and the reason it must be rejected for (None: it must be kept).
FAULTS: dict[str, tuple[bytes, Reason | None]] = {
    "zero.png": (b"", "empty"),
    "text.png": (b"this is no image", "format"),
    "html.jpg": (b"<html><body>404</body></html>", "format"),
    "truncated.png": (GOOD[: len(GOOD) * 2 // 3], "broken"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "broken"),
    "header_only.png": (GOOD[:8], "format"),
    "corrupt_data.png": (GOOD[:60] + bytes(40) + GOOD[100:], "broken"),
    "bad_checksum.png": (GOOD[:29] + b"\0\0\0\0" + GOOD[33:], "format"),
    "bomb.png": (png_header(50_000, 50_000), "pixels"),
    "wide.png": (png_header(60_000, 10), "pixels"),
    "lying_size.png": (png_header(1000, 1000), "broken"),
    "many_bytes.bmp": (encoded(picture(903, 800, 800), "BMP"), "bytes"),
    "tiny.png": (encoded(picture(904, 10, 10)), "small"),
    "long.png": (encoded(picture(905, 300, 30)), "aspect"),
    "many_frames.gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "frames"),
    "metadata.png": (with_text(20_000), "metadata"),
    "text_bomb.png": (with_text(80 * 2**20), "metadata"),
    "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "format"),
    "drawing.svg": (b"<svg/>", "format"),
    "pickle.png": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.", "format"),
    "zero_size.png": (png_header(0, 0), "format"),
    "telephone.HEIC": (b"\0\0\0\x18ftypheic" + bytes(100), "format"),
    "float.tiff": (encoded(Image.fromarray(np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)), "TIFF"), "format"),
    "same_bytes.png": (encoded(picture(0)), "duplicate"),
    "saved_again.jpg": (encoded(picture(1), "JPEG", quality=97), "near_duplicate"),
    "windows.jfif": (encoded(picture(935), "JPEG"), None),
    "wrong_suffix.png": (encoded(picture(920), "JPEG"), None),
    "cmyk.jpg": (encoded(picture(921, mode="CMYK"), "JPEG"), None),
    "16_bit.png": (encoded(Image.fromarray(np.asarray(picture(922, mode="L"), np.uint16) * 257)), None),
    "palette_alpha.png": (encoded(picture(923).quantize(16), transparency=0), None),
    "alpha.png": (encoded(picture(924, mode="RGBA")), None),
    "gray.png": (encoded(picture(925, mode="L")), None),
    "bilevel.png": (encoded(picture(926, mode="1")), None),
    "animated.gif": (encoded(FRAMES[1], "GIF", save_all=True, append_images=FRAMES[2:5]), None),
    "turned.jpg": (encoded(picture(927, 60, 40), "JPEG", exif=exif(6), quality=95), None),
    "corrupt_profile.png": (encoded(picture(928), icc_profile=b"no profile at all"), None),
    "foreign_profile.png": (encoded(picture(929), icc_profile=swapped_profile()), None),
    "broken_exif.png": (encoded(picture(933), exif=b"no EXIF at all"), None),
    "cut_exif.webp": (encoded(picture(934), "WEBP", exif=b"Exif\0\0II*\0"), None),
    "animated.webp": (encoded(picture(930), "WEBP", save_all=True, append_images=[picture(931)]), None),
    "trailing.jpg": (encoded(picture(932), "JPEG") + b"rubbish" * 100, None),
}


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faults in 20 times as many good images, sorted among them."""
    folder = tmp_path_factory.mktemp("heap")
    for number in range(20 * len(FAULTS)):
        (folder / f"{number:04d}.png").write_bytes(encoded(picture(number)))
    for number, (name, (data, _)) in enumerate(FAULTS.items()):
        (folder / f"{(number * 19 + 7):04d}_{name}").write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_every_fault_has_its_reason_and_nothing_else_is_lost(heap: Path, tmp_path: Path, workers: int) -> None:
    assert len(FAULTS) >= 25
    counts = ingest.ingest(settings("folder", heap, workers=workers), tmp_path / "images", tmp_path / "work")
    table, rejects = (read_table(tmp_path / "images" / f"{name}.parquet") for name in ("images", "rejects"))
    wanted = {name: reason for name, (_, reason) in FAULTS.items() if reason}
    found = {name.split("_", 1)[1]: reason for name, reason, _ in rejects.iter_rows()}
    assert found == wanted
    kept = {source.split("_", 1)[1] for source in table["source"] if "_" in source}
    assert kept == set(FAULTS) - set(wanted)
    assert counts["images"] == len(table) == 20 * len(FAULTS) + len(kept)
    assert all("\n" not in detail and name in detail for name, _, detail in rejects.iter_rows())
    assert not (tmp_path / "work").exists()
    store = ImageStore(tmp_path / "images")
    for row in table.iter_rows(named=True):
        assert min(row["width"], row["height"]) == SIZE
        assert store.image(row["sha256"]).size == (row["width"], row["height"])
    shapes = {
        row["source"].split("_", 1)[1]: (row["width"], row["height"]) for row in table.iter_rows(named=True) if "_" in row["source"]
    }
    assert shapes["turned.jpg"] == (SIZE, SIZE * 3 // 2)  # 60×40, turned by its EXIF


def test_repairs_keep_what_the_picture_shows(tmp_path: Path) -> None:
    """Against the picture before it was encoded, to what the encoding loses."""
    folder = tmp_path / "heap"
    folder.mkdir()
    seeds = {"cmyk.jpg": 921, "gray.png": 925, "wrong_suffix.png": 920, "corrupt_profile.png": 928, "foreign_profile.png": 929}
    for name in seeds:
        (folder / name).write_bytes(FAULTS[name][0])
    ingest.ingest(settings("folder", folder), tmp_path / "images", tmp_path / "work")
    store = ImageStore(tmp_path / "images")
    for row in store.rows.values():
        expected = picture(seeds[row["source"]], mode="L" if "gray" in row["source"] else "RGB").convert("RGB")
        expected = expected.resize((row["width"], row["height"]), Image.Resampling.LANCZOS)
        error = np.abs(np.asarray(store.image(row["sha256"]), int) - np.asarray(expected, int)).mean()
        assert error < 12, row["source"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_those_of_the_profile_whatever_the_mode(mode: str) -> None:
    """A profile whose red is blue; what is transparent stays white."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = (profile.index(name, 128) for name in (b"rXYZ", b"bXYZ"))
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image = image.convert("RGB").quantize(2) if mode == "P" else image.convert(mode)
    clear = {} if mode == "RGBA" else {"transparency": image.getpixel((0, 0))}
    found = open_image(encoded(image, icc_profile=bytes(profile), **clear))
    assert (found.getpixel((0, 0)), found.getpixel((7, 0))) == ((255, 255, 255), (0, 0, 255))


def test_a_good_image_of_the_right_size_is_stored_as_it_came(tmp_path: Path) -> None:
    data = {
        "a.jpg": encoded(picture(1, SIZE, 48), "JPEG"),
        "b.png": encoded(picture(2, SIZE, SIZE)),
        "c.webp": encoded(picture(3, 64, SIZE), "WEBP"),
    }
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    ingest.ingest(settings("folder", tmp_path), tmp_path / "out" / "images", tmp_path / "work")
    store = ImageStore(tmp_path / "out" / "images")
    assert {row["source"]: store.bytes(sha256) for sha256, row in store.rows.items()} == data
    with tarfile.open(next((tmp_path / "out" / "images").glob("*.tar"))) as tar:
        assert sorted(Path(name).suffix for name in tar.getnames()) == [".jpg", ".png", ".webp"]


def slow(*_: Any) -> Any:
    time.sleep(60)


def greedy(*_: Any) -> Any:
    return len(bytes(6 * 2**30))


def dying(*_: Any) -> Any:
    signal.raise_signal(signal.SIGSEGV)


@pytest.mark.parametrize(("fault", "reason"), [(slow, "timeout"), (greedy, "crash"), (dying, "crash")])
def test_an_image_that_stalls_or_kills_its_worker_is_one_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], reason: str
) -> None:
    """In real worker processes."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
        (tmp_path / f"{number}.txt").write_text(fault.__name__ if number == 2 else "fine")
    found = list(ingest.from_folder(tmp_path))
    monkeypatch.setattr(check, "check", check_with_fault)
    with check.Checker(SIZE, settings("folder", tmp_path, seconds=5.0, memory_mib=4096).ingest.limits) as checker:
        results = list(checker(found))
    assert [r.reason if isinstance(r, check.Rejected) else "" for r in results] == ["", "", reason, "", "", ""]


def test_an_image_over_the_memory_says_so(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(encoded(Image.new("RGB", (6000, 6000))))
    with check.Checker(SIZE, load_params("params.yaml").ingest.limits.model_copy(update={"memory_mib": 150})) as checker:
        (result,) = checker([Found("big.png", str(tmp_path / "big.png"))])
    assert isinstance(result, check.Rejected) and result.reason == "crash" and "more memory than memory_mib 150" in result.detail


def test_images_are_not_rejected_for_processes_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """That none stays alive, as pebble says it, is an error of the stage; a smaller limit than ours (ulimit -v) holds."""
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 2**40))
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: taken.append(both))
    check._confine(2**30)
    check._confine(2**41)
    assert 2**30 < taken[0][0] < 2**40 and taken[1] == (2**40, 2**40)
    broken: Future[None] = Future()
    broken.set_exception(BrokenProcessPool("All workers expired"))
    with check.Checker(SIZE, settings("folder", None).ingest.limits) as checker:
        monkeypatch.setattr(checker.pool, "schedule", lambda *_, **__: broken)
        with pytest.raises(ValueError, match="lower ingest.limits.workers"):
            list(checker([Found("a.png", "a.png")]))


def check_with_fault(found: Any, size: int, limits: Any) -> Any:
    if found.caption != "fine":
        globals()[found.caption]()
    return CHECK(found, size, limits)


CHECK = check.check


def test_too_many_rejects_stop_the_stage_and_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "heap"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03d}.png").write_bytes(encoded(picture(number)) if number % 2 else b"no image")
    out, work = tmp_path / "images", tmp_path / "work"
    with pytest.raises(
        ValueError, match=r"50 of 100 images are not usable \(50 format\); 000.png: not an image .*; see .*, or raise"
    ) as error:
        ingest.ingest(settings("folder", folder), out, work)
    assert "\n" not in str(error.value) and not out.exists() and len(read_table(work / "rejects.parquet")) == 50
    times = {path: path.stat().st_mtime_ns for path in work.glob("[0-9]*/*")}
    parts = list(work.glob("[0-9]*/key.json"))
    assert len(parts) == 3
    inodes = [path.stat().st_ino for path in parts]
    with pytest.raises(ValueError, match="not usable"):
        ingest.ingest(settings("folder", folder, max_reject_share=0.4), out, work)
    assert [path.stat().st_ino for path in parts] == inodes and times == {
        path: path.stat().st_mtime_ns for path in work.glob("[0-9]*/*")
    }
    assert ingest.ingest(settings("folder", folder, max_reject_share=0.6), out, work)["images"] == 50


def test_killed_and_started_again_gives_the_same_tables(tmp_path: Path) -> None:
    """`easyref ingest`, kill -9 after some shards, twice; a finished shard is not made again."""
    heap = tmp_path / "heap"
    heap.mkdir()
    for number in range(200):
        (heap / f"{number:03d}.png").write_bytes(encoded(picture(number)) if number % 20 else b"no image")
    params = settings("folder", heap)
    ingest.ingest(params, tmp_path / "whole", tmp_path / "w")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump()))
    out, work = tmp_path / "data" / "images", tmp_path / ".work" / "ingest"
    command = [sys.executable, "-m", "easyref.cli", "ingest"]
    made: dict[Path, int] = {}
    for shards in (1, 3):
        process = subprocess.Popen(command, cwd=tmp_path)
        end = time.monotonic() + 120
        while len(list(work.glob("[0-9]*/key.json"))) < shards and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        now = {path: path.stat().st_ino for path in work.glob("[0-9]*/key.json")}
        assert made.items() <= now.items()
        made = now
    subprocess.run(command, cwd=tmp_path, check=True)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole and len(whole) == 7


# -- sources -----------------------------------------------------------------------------------------------------------


def pack(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_a_path_may_start_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "heap").mkdir()
    (tmp_path / "heap" / "a.png").write_bytes(GOOD)
    assert ingest.ingest(settings("folder", Path("~/heap")), tmp_path / "images", tmp_path / "work") == {"images": 1}


def test_tars_give_captions_and_refuse_what_leaves_them(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    pack(folder / "00000.tar", [
        ("000.jpg", JPEG), ("000.txt", b"a red thing"), ("000.json", json.dumps({"caption": "not this", "license": "CC0"}).encode()),
        ("dog/1.png", encoded(picture(1))), ("dog/1.json", json.dumps({"caption": "a dog", "group": "dogs"}).encode()),
        ("../evil.png", GOOD), ("/etc/evil.png", GOOD), ("model.pkl", b"\x80\x04."), ("x.npy", b"\x93NUMPY"),
        (link("soft.png", tarfile.SYMTYPE, "/etc/passwd"), b""), (link("hard.png", tarfile.LNKTYPE, "000.jpg"), b""),
        ("bad.png", encoded(picture(5))), ("bad.json", b"{not json"),
        ("deep.png", encoded(picture(6))), ("deep.json", b"[" * 200_000),
        ("forged.png", encoded(picture(7))), ("forged.json", json.dumps({"refused": ["format", "x"], "group": 0}).encode()),
    ])  # fmt: skip
    pack(folder / "00001.tar", [(f"{i}.png", encoded(picture(50 + i))) for i in range(6)])
    data = bytearray((folder / "00001.tar").read_bytes())
    with tarfile.open(folder / "00001.tar") as tar:
        fourth = tar.getmembers()[3].offset
    data[fourth : fourth + 100] = b"\xff" * 100  # the header of the fourth member
    (folder / "00001.tar").write_bytes(data)
    (folder / "00002.tar").write_bytes(b"no tar at all" * 100)
    (folder / "00003.tar").write_bytes(zlib.compress(b"x" * 1000))
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1
    (folder / "00004.tar").write_bytes((long_name.tobuf() + b"x".ljust(tarfile.BLOCKSIZE, b"\0")) * 3000)  # each names the next
    ingest.ingest(settings("tar", folder, max_reject_share=0.9), tmp_path / "images", tmp_path / "work")
    table, rejects = (read_table(tmp_path / "images" / f"{name}.parquet") for name in ("images", "rejects"))
    rows = {row["source"]: row for row in table.iter_rows(named=True)}
    whole = ["00000.tar/000.jpg", "00000.tar/dog/1.png", "00000.tar/forged.png", *(f"00001.tar/{i}.png" for i in range(3))]
    assert list(rows) == whole and rows["00000.tar/forged.png"]["concept"] == "0"
    assert rows["00000.tar/000.jpg"]["caption"] == "a red thing"
    assert (rows["00000.tar/000.jpg"]["licence"], rows["00000.tar/dog/1.png"]["caption"]) == ("CC0", "a dog")
    assert rows["00000.tar/dog/1.png"]["concept"] == "dogs"
    assert dict(rejects.select("name", "reason").iter_rows()) == {
        "00000.tar/../evil.png": "member", "00000.tar//etc/evil.png": "member", "00000.tar/soft.png": "member",
        "00000.tar/hard.png": "member", "00000.tar/bad.png": "record", "00000.tar/deep.png": "record",
        "00001.tar": "tar", "00002.tar": "tar", "00003.tar": "tar",
        "00004.tar": "tar",
    }  # fmt: skip


def test_a_damaged_tar_gives_what_stands_before_the_damage(tmp_path: Path) -> None:
    """A download that was cut off, in an image and in a caption; and a member whose size leads back to itself."""
    images = [encoded(picture(i)) for i in range(4)]
    pack(tmp_path / "a.tar", [m for i, image in enumerate(images) for m in ((f"{i}.png", image), (f"{i}.txt", b"words " * 200))])
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        at = [member.offset_data for member in tar]
    negative = bytearray(tarfile.TarInfo("back.png").tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = (256**12 - 512).to_bytes(12, "big")
    negative[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(negative))[0]
    for damaged, whole, captions in (
        (data[: at[4] + 700], 2, 2), (data[: at[5] + 700], 3, 2), (data[: at[6] + 5], 3, 3),
        (data[: at[4] - tarfile.BLOCKSIZE] + negative + bytes(1024), 2, 2),
    ):  # fmt: skip
        (tmp_path / "a.tar").write_bytes(damaged)
        *found, last = from_tars(tmp_path / "a.tar")
        assert [f.read(10**6) for f in found[:whole]] == images[:whole] and len(found) <= whole + 1  # of one there is a part
        assert [bool(f.caption) for f in found[:whole]] == [i < captions for i in range(whole)]
        assert last.refused and last.refused[0] == "tar" and last.refused[1].startswith("damaged (")


def test_what_macos_writes_beside_an_image_is_none(tmp_path: Path) -> None:
    notes = {"._0.png": b"\0\5\x16\7", "._0.json": b"\0\5\x16\7", ".DS_Store": b"x", "more/._1.png": b"x"}
    pack(tmp_path / "a.tar", [("0.png", GOOD), *notes.items(), ("more/1.png", GOOD)])
    (tmp_path / "more").mkdir()
    for name, data in {"0.png": GOOD, **notes}.items():
        (tmp_path / name).write_bytes(data)
    assert [(f.name, f.refused) for f in from_tars(tmp_path / "a.tar")] == [("a.tar/0.png", None), ("a.tar/more/1.png", None)]
    assert [f.name for f in from_folder(tmp_path)] == ["0.png"]


def test_a_field_that_is_a_list_or_missing(tmp_path: Path) -> None:
    """Captions of COCO, and what pandas writes into JSON where there is none."""
    rows = [{"caption": ["a red thing", "a thing"]}, {"caption": float("nan"), "group": 0}, {"caption": []}]
    pack(tmp_path / "a.tar", [m for i, of in enumerate(rows) for m in ((f"{i}.png", GOOD), (f"{i}.json", json.dumps(of).encode()))])
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "0.png"} | rows[0]))
    assert [f.caption for f in (*from_tars(tmp_path / "a.tar"), *from_table(tmp_path / "a.jsonl"))] == [
        "a red thing",
        "",
        "",
        "a red thing",
    ]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    """As Windows writes text."""
    words, fields = (text.encode("utf-8-sig") for text in ("a red thing", '{"caption": "a red thing"}'))
    (tmp_path / "0.png").write_bytes(GOOD)
    (tmp_path / "0.txt").write_bytes(words)
    pack(tmp_path / "a.tar", [("0.png", GOOD), ("0.txt", words), ("1.png", GOOD), ("1.json", fields)])
    assert [f.caption for f in (*from_folder(tmp_path), *from_tars(tmp_path / "a.tar"))] == ["a red thing"] * 3


def test_a_caption_is_not_read_through_a_link_that_leaves_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "heap").mkdir()
    for name, target in (("out", tmp_path / "secret"), ("in", tmp_path / "heap" / "words")):
        (tmp_path / "heap" / f"{name}.png").write_bytes(GOOD)
        (tmp_path / "heap" / f"{name}.txt").symlink_to(target)
    (tmp_path / "heap" / "words").write_text("a red thing")
    assert [(found.name, found.caption) for found in from_folder(tmp_path / "heap")] == [("in.png", "a red thing"), ("out.png", "")]


def test_an_image_that_raises_what_nobody_knows_is_one_reject() -> None:
    found = [Found("odd.png", "odd.png", refused=("anything",)), Found("gone.png", "gone.png")]  # type: ignore[arg-type]
    with check.Checker(SIZE, settings("folder", None).ingest.limits) as checker:
        rejected = list(checker(found))
    assert [(r.reason, r.detail.split(":")[0]) for r in rejected if isinstance(r, check.Rejected)] == [
        ("crash", "odd.png"), ("missing", "gone.png"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_face_is_where_the_image_is_turned_to_in_every_format(tmp_path: Path, kind: str) -> None:
    """Orientation 6: the top of the file is the image's right side."""
    (tmp_path / "a").write_bytes(encoded(picture(1, 64, 96), kind, exif=exif(6)))
    limits = settings("folder", None).ingest.limits
    checked = check.check(Found("a", str(tmp_path / "a"), face=(8, 16, 40, 32)), 64, limits)
    assert isinstance(checked, Checked) and (checked.width, checked.height) == (96, 64) and checked.face == [64, 8, 80, 40]


def test_a_telephones_jpeg_stays_one(tmp_path: Path) -> None:
    """With a second picture behind it, which Pillow calls MPO."""
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1, 64, 96), "MPO", save_all=True, append_images=[picture(2, 64, 96)]))
    checked = check.check(Found("a", str(tmp_path / "a.jpg")), 32, settings("folder", None).ingest.limits)
    assert isinstance(checked, Checked) and checked.suffix == "jpg"


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_tables_of_paths_and_captions(tmp_path: Path, suffix: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(picture(number)))
    rows = pl.DataFrame(
        {"file_name": ["0.png", "1.png", "2.png", "gone.png", None], "text": ["a", "b", None, "d", "e"], "group": [0] * 5}
    )
    table = tmp_path / f"table.{suffix}"
    {"parquet": rows.write_parquet, "jsonl": rows.write_ndjson, "csv": rows.write_csv}[suffix](table)
    ingest.ingest(settings("table", table, max_reject_share=0.9), tmp_path / "out" / "images", tmp_path / "work")
    made = read_table(tmp_path / "out" / "images" / "images.parquet")
    assert made.select("source", "caption", "concept").rows() == [("0.png", "a", "0"), ("1.png", "b", "0"), ("2.png", "0", "0")]
    rejects = read_table(tmp_path / "out" / "images" / "rejects.parquet")
    assert rejects["reason"].to_list() == ["missing", "record"]
    rows.rename({"file_name": "url"}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"no column path or file_name.*it has url, text, group"):
        ingest.ingest(settings("table", tmp_path / "other.parquet"), tmp_path / "x", tmp_path / "work")


def test_a_table_says_what_stands_in_it(tmp_path: Path) -> None:
    """`007` is no number, and a field need not be among the first hundred rows; a name is no pattern."""
    rows = [{"path": f"{i:03d}"} for i in range(150)] + [{"path": "true", "caption": "1e3", "group": "007"}]
    lines = "\n".join(map(json.dumps, [*rows[:2], *({"path": row["path"], "caption": None} for row in rows[2:-1]), rows[-1]]))
    (tmp_path / "t[1].csv").write_text("path,caption,group\n" + "\n".join(",".join([*row.values(), "", ""][:3]) for row in rows))
    (tmp_path / "t[1].jsonl").write_text(lines)
    (tmp_path / "t1.jsonl").write_text('{"path": "another"}')
    for suffix in ("csv", "jsonl"):
        found = list(from_table(tmp_path / f"t[1].{suffix}"))
        assert [f.name for f in found] == [row["path"] for row in rows]
        assert (found[-1].caption, found[-1].group, found[0].group) == ("1e3", "007", "")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{}", ""),
        ('[{"target": "a.png"}]', "KeyError"),
        ("[1]", "TypeError"),
        ("[", "JSONDecode"),
        ('[{"target": "a.png", "text": null}]', "text is words"),
        ('[{"target": "a.png", "text": "", "face": [[1, 2, 3]]}]', "a face has four numbers"),
        ('[{"target": "a.png", "text": "", "face": [[1, 2, 3, NaN]]}]', "a face has four numbers"),
    ],
)
def test_what_is_no_upstream_json_is_said(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=f"not a list of target, image_file, face and text.*{what}|not usable"):
        ingest.ingest(settings("upstream", tmp_path / "data.json"), tmp_path / "images", tmp_path / "work")


def test_given_groups_become_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstream JSON → images, groups, split: what a training reads, squares of one size."""
    entries = []
    for group in range(12):
        names = [f"{group}/{i}.png" for i in range(5)]
        (tmp_path / str(group)).mkdir()
        for i, name in enumerate(names):
            (tmp_path / name).write_bytes(encoded(picture(100 * group + i, 40 + i, 50 - i)))
        entries += [{"target": t, "image_file": [n for n in names if n != t], "text": [f"thing {group}"]} for t in names[:3]]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    params = settings("upstream", tmp_path / "data.json")
    data = tmp_path / "data"
    ingest.ingest(params, data / "images", tmp_path / "work")
    store = ImageStore(data / "images")
    groups = label_groups(store.table, params.group.model_copy(update={"kinds": ["given"]}))
    assert len(groups) == 12 and all(len(members) == 5 for members in groups["members"])
    for name, part in split_images(store, groups, params.split.model_copy(update={"held_out_share": 0.25}), 0).items():
        write_table(data / "split" / f"{name}.parquet", part)
    images = TrainingImages(data)
    assert images.pixels.shape[1:] == (SIZE, SIZE, 3) and images.groups and {kind for kind, _ in images.groups} == {"given"}
    samples = read_table(data / "split" / "samples.parquet")
    assert set(samples["kind"]) == {"given"} and all(p.startswith("thing") for p in samples["prompt"])

    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["upstream", "data"]).exception
    assert "data: is there and holds something else" in str(refused) and (data / "images" / "images.parquet").exists()
    for _ in range(2):  # an earlier one is replaced
        shown = CliRunner().invoke(app, ["upstream", "back"])
    assert f"back: {sum(len(members) for _, members in images.groups)} entries" in shown.output
    monkeypatch.undo()
    again = ingest.ingest(settings("upstream", tmp_path / "back" / "data.json"), tmp_path / "again" / "images", tmp_path / "work")
    assert again["images"] == len({i for _, members in images.groups for i in members})
    same = label_groups(ImageStore(tmp_path / "again" / "images").table, params.group.model_copy(update={"kinds": ["given"]}))
    assert sorted(map(sorted, same["members"])) == sorted(sorted(images.sha256s[i] for i in members) for _, members in images.groups)


def test_folders_of_numbered_files_are_things_of_their_own(tmp_path: Path) -> None:
    """1.png in each of twelve folders, no captions: each folder is its own concept, and some are held out."""
    for group in range(12):
        (tmp_path / "heap" / f"thing_{group}").mkdir(parents=True)
        for i in range(5):
            (tmp_path / "heap" / f"thing_{group}" / f"{i}.png").write_bytes(encoded(picture(100 * group + i)))
    params = settings("folder", tmp_path / "heap")
    ingest.ingest(params, tmp_path / "images", tmp_path / "work")
    store = ImageStore(tmp_path / "images")
    assert set(store.table["caption"]) == {f"thing {group}" for group in range(12)}
    groups = label_groups(store.table, params.group.model_copy(update={"kinds": ["given"]}))
    tables = split_images(store, groups, params.split.model_copy(update={"held_out_share": 0.25}), 0)
    assert {"train", "held_out"} <= set(tables["groups"]["split"]) and "held_out" in set(tables["samples"]["split"])


def test_faces_of_the_upstream_json_reach_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `easyref group` and `easyref split`: boxes in pixels of the files, half as large where images are stored at half size."""
    entries = []
    for group in range(8):
        names = [f"{group}-{i}.png" for i in range(4)]
        for i, name in enumerate(names):
            (tmp_path / name).write_bytes(encoded(picture(100 * group + i, 80, 64)))
            face = [[10 + group, 20, 30.6 + group, 44, 0.99], [0, 0, 9, 9]]
            entry = {"target": name, "image_file": [n for n in names if n != name], "text": f"person {group}"}
            entries.append(entry | ({"face": face} if i else {}))
    (tmp_path / "turned.jpg").write_bytes(encoded(picture(990, 64, 80), "JPEG", exif=exif(6)))
    (tmp_path / "outside.png").write_bytes(encoded(picture(991, 80, 64)))
    boxes = {"turned.jpg": [20, 10, 30, 30], "outside.png": [90, 10, 99, 30]}
    entries += [{"target": name, "text": "", "face": [box]} for name, box in boxes.items()]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    values = yaml.safe_load(Path("presets/nano.yaml").read_text())
    values["ingest"] |= {"source": "upstream", "path": "data.json", "size": SIZE}
    values["group"] |= {"kinds": ["given"]}
    values["split"] |= {"held_out_share": 0.25, "held_out_groups": 1, "held_in_groups": 1, "samples_per_group": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "data" / "embeddings").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for stage in ("ingest", "group", "split"):
        done = CliRunner().invoke(app, [stage], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    rejects = read_table("data/images/rejects.parquet")
    assert rejects.select("name", "reason").rows() == [("outside.png", "record")] and "is not inside of it" in rejects["detail"][0]
    images = TrainingImages(Path("data"))
    for i, label in enumerate(images.labels):
        name = label["source"]
        if name == "turned.jpg":
            assert images.faces[i] == ((80 - 30) / 2, 10, (80 - 10) / 2, 15)
        elif name[2] == "0":
            assert i not in images.faces  # none given
        else:
            left = 10 + int(name[0])
            assert images.faces[i] == (round(left / 2), 10, round((left + 20.6) / 2), 22)
    assert len(images.faces) > 12
    assert CliRunner().invoke(app, ["upstream", "back"]).exit_code == 0
    back = {Path(e["target"]).stem: e.get("face") for e in json.loads(Path("back/data.json").read_text())}
    assert back == {images.sha256s[i]: [list(images.faces[i])] if i in images.faces else None for _, of in images.groups for i in of}


@pytest.mark.parametrize("orientation", range(10))
def test_a_face_turns_with_its_image(tmp_path: Path, orientation: int) -> None:
    """As pillow turns a picture that is black but for the face; 0 and 9 mean nothing."""
    box, size = (50, 70, 90, 150), (120, 200)
    image = Image.new("RGB", size)
    image.paste("white", box)
    (tmp_path / "a.png").write_bytes(encoded(image, exif=exif(orientation)))
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    found = Found("a.png", str(tmp_path / "a.png"), face=box)
    done = check.check(found, 120, load_params("presets/nano.yaml").ingest.limits)
    assert isinstance(done, Checked) and tuple(done.face or ()) == turned.getbbox() and (done.width, done.height) == turned.size


def test_near_duplicates_are_those_of_brute_force(tmp_path: Path) -> None:
    """Of pictures that drift apart, in a process that knows all of them; a distance of 0 asks for the same pixels."""
    rng = np.random.default_rng(0)
    drift = rng.integers(80, 100, (16, 16, 3)) + np.cumsum(rng.integers(-3, 4, (80, 16, 16, 3)), 0)
    drift = (drift + np.arange(80)[:, None, None, None]).astype(np.uint8)  # and grow brighter, from cell to cell
    for distance in (0.0, 2.5, 4.0):
        seen, kept, found = ingest._Seen(distance), [], []
        for number, pixels in enumerate([*drift, drift[40]]):
            far = [float(np.sqrt(((pixels.astype(float) - drift[i]) ** 2).mean())) for i in kept]
            earlier = next((str(i) for i, of in zip(kept, far, strict=True) if of <= distance), None)
            image = Checked(b"", "png", 16, 16, str(number), pixels.tobytes())
            assert seen.duplicate(image) == (("near_duplicate", earlier) if earlier else None)
            found.append(earlier)
            if earlier is None:
                seen.take(str(number), str(number), pixels.tobytes())
                kept.append(number)
        assert found[-1] is not None and (distance == 0 or 10 < len(kept) < 80)


def test_few_images_are_compared_with_one() -> None:
    """Else a million take the square of a million: of emoji, which all lie on white, under one in a hundred."""
    store, seen = ImageStore("data/images"), ingest._Seen(4.0)
    pictures = [pixels.tobytes() for pixels in thumbnails(store, store.table["sha256"].gather_every(8).to_list())]
    cells = Counter(cell for pixels in pictures for cell in seen._cells(pixels, 0))
    assert sum(cells.values()) == len(pictures) > 1000
    compared = [sum(cells[cell] for cell in seen._cells(pixels, seen.reach)) for pixels in pictures[::8]]
    assert np.mean(compared) < 0.01 * len(pictures)


@pytest.mark.skipif(os.geteuid() != 0 or not hasattr(os, "setresuid"), reason="takes another user's rights")
def test_what_may_not_be_read_is_a_reject_of_its_own(tmp_path: Path) -> None:
    """As the user nobody: an image, a caption and a folder of somebody else."""
    heap = tmp_path / "heap"
    for name in ("locked", "listed"):
        (heap / name).mkdir(parents=True)
    for number, name in enumerate(("good.png", "secret.png", "said.png", "locked/in.png", "listed/in.png")):
        (heap / name).write_bytes(encoded(picture(number)))
    (heap / "said.txt").write_text("a caption")
    for name in ("secret.png", "said.txt", "locked", "listed"):
        (heap / name).chmod(0o444 if name == "listed" else 0)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from easyref.data.sources import from_folder; from easyref.images import ImageError\n"
        "os.chdir(sys.argv[1]); os.setresuid(65534, 65534, 65534)\n"
        "for found in from_folder(Path('.')):\n"
        "    try: print(found.name, len(found.read(10**6)))\n"
        "    except ImageError as error: print(found.name, error.reason, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(heap)], capture_output=True, text=True, check=True)
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()}
    assert set(lines) == {"good.png", "secret.png", "said.png", "locked", "listed/in.png"} and int(lines["good.png"][0]) > 100
    assert lines["listed/in.png"][0] == "missing"
    for name, reason in {"secret.png": "missing", "said.png": "record", "locked": "missing"}.items():
        assert lines[name][0] == reason and "Permission denied" in lines[name][1]


def test_links_in_a_circle_and_names_that_are_no_unicode(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, name in enumerate((b"good.png", b"bad\xff.png", "画像\n<b>.png".encode())):
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/" + name)).write_bytes(encoded(picture(number)))
    for name, to in {"circle.png": "circle.png", "gone.png": "nowhere", "up": ".."}.items():
        (tmp_path / "a" / name).symlink_to(to)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "good.txt").write_bytes(b"fine")
    p = load_params("presets/nano.yaml").ingest
    limits = p.limits.model_copy(update={"max_reject_share": 0.9})
    p = p.model_copy(update={"source": "folder", "path": str(tmp_path / "a"), "size": SIZE, "limits": limits})
    ingest._ingest_heap(p, tmp_path / "images", tmp_path / "work")
    assert sorted(read_table(tmp_path / "images" / "images.parquet")["source"]) == ["bad?.png", "good.png", "画像\n<b>.png"]
    rejects = read_table(tmp_path / "images" / "rejects.parquet")
    wanted = dict.fromkeys(("circle.png", "gone.png", "pipe.png"), "missing") | {"up": "member"}
    assert dict(rejects.select("name", "reason").rows()) == wanted


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_scores_reject_what_the_model_says(tmp_path: Path, kind: str) -> None:
    """Two tiny classifiers in transformers' form, untrained; what they say is asked of transformers itself."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    names = ["score"] if kind == "regression" else ["normal", "nsfw", "drawing"]
    size = dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 16) | {"patch_size": 8}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**size, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, problem_type=kind)
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    model.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "model")
    pictures = [picture(i, SIZE, SIZE) for i in range(70)]
    (tmp_path / "heap").mkdir()
    for i, image in enumerate(pictures):
        (tmp_path / "heap" / f"{i:02d}.png").write_bytes(encoded(image))
    (tmp_path / "heap" / "text.png").write_bytes(b"this is no image")
    with torch.inference_mode():
        logits = model(**processor(images=pictures, return_tensors="pt")).logits
    outputs = {"single": logits.softmax(1), "multi": logits.sigmoid(), "regression": logits}
    said = outputs[kind.split("_", maxsplit=1)[0]][:, -1].tolist()
    low, high = ((a + b) / 2 for a, b in (sorted(said)[19:21], sorted(said)[49:51]))
    given = {"id": str(tmp_path / "model"), "revision": None, "label": names[-1]}
    scores = {"nsfw": Score(**given, min=None, max=high), "aesthetic": Score(**given, min=low, max=None)}
    params = settings("folder", tmp_path / "heap")
    params = params.model_copy(update={"ingest": params.ingest.model_copy(update={"scores": scores})})
    counts = ingest.ingest(params, tmp_path / "images", tmp_path / "work")
    assert counts == {"images": 30, "rejected: nsfw": 20, "rejected: aesthetic": 20, "rejected: format": 1}
    rejects = read_table(tmp_path / "images" / "rejects.parquet")
    for reason, wrong in (("nsfw", lambda s: s > high), ("aesthetic", lambda s: s < low)):
        assert rejects.filter(reason=reason)["name"].to_list() == [f"{i:02d}.png" for i, s in enumerate(said) if wrong(s)]
    name, _, detail = rejects.filter(reason="nsfw").row(0)
    assert detail == f"{name}: nsfw {said[int(name[:2])]:.3f} is not from -inf to {high:g} (ingest.scores.nsfw)"
    (tmp_path / "empty").mkdir()
    for changed, message in (
        ({"label": "sfw"}, rf"^ingest.scores.nsfw.label = 'sfw': .* knows {', '.join(names)}; name one of them$"),
        ({"id": str(tmp_path / "empty")}, r"empty: AutoImageProcessor cannot load it .*; check id, revision and network$"),
    ):
        wrong = params.ingest.model_copy(update={"scores": {"nsfw": Score(**given | changed, min=None, max=high)}})
        with pytest.raises(ValueError, match=message):
            ingest.ingest(params.model_copy(update={"ingest": wrong}), tmp_path / "images", tmp_path / "work")
