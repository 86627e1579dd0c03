"""What is kept on disk: bounded, least recently used first to go, safe against torn files and other processes."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from easyref.cache import DiskCache
from easyref.pipeline import EasyRef

CPU = torch.device("cpu")
KIB = {"x": torch.arange(256, dtype=torch.float32)}


def kept(cache: DiskCache, *names: str) -> list[str]:
    return [name for name in names if cache.get(CPU, name) is not None]


def age(cache: DiskCache, name: str, seconds: int) -> None:
    stat = cache.path(name).stat()
    os.utime(cache.path(name), (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_the_same_bits_come_back_under_the_same_key_only(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new", 2**20, ["model"])
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor([1, 2]), "c": torch.randn(5).bfloat16()}
    cache.put(tensors, "start", ("digest",))
    found = cache.get(CPU, "start", ("digest",))
    assert found is not None and found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)
    assert cache.get(CPU, "tokens", ("digest",)) is None
    assert DiskCache(tmp_path / "new", 2**20, ["other"]).get(CPU, "start", ("digest",)) is None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 4000, None)  # three of a little over a KiB
    for seconds, name in ((30, "a"), (20, "b"), (10, "c")):
        cache.put(KIB, name)
        age(cache, name, seconds)
    assert cache.get(CPU, "a")
    cache.put(KIB, "d")
    assert kept(cache, "a", "b", "c", "d") == ["a", "c", "d"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    cache.put({"x": torch.zeros(2000)}, "too large")
    assert kept(cache, "a", "c", "d", "too large") == ["a", "c", "d"]
    (tmp_path / "thesis.odt").write_bytes(bytes(4000))  # the user's own, and old
    os.utime(tmp_path / "thesis.odt", (0, 0))
    cache.put(KIB, "e")
    assert (tmp_path / "thesis.odt").exists() and kept(cache, "d", "e") == ["d", "e"]
    off = DiskCache(tmp_path, 0, None)
    off.put(KIB, "e")
    assert not kept(off, "a", "e")


def test_a_torn_file_is_made_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2**20, None)
    cache.put(KIB, "a")
    data = cache.path("a").read_bytes()
    for torn in (data[:-1], data[:5], b""):
        cache.path("a").write_bytes(torn)
        with pytest.warns(UserWarning, match=r"unreadable .*; made again"):
            assert cache.get(CPU, "a") is None
        assert not cache.path("a").exists()


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="encoded references are not kept"):
        DiskCache(tmp_path / "file" / "folder", 2**20, None).put(KIB, "a")


def test_a_folder_that_is_only_to_be_read_gives_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount that is read-only; whoever runs the tests may write anywhere."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    cache = DiskCache(tmp_path, 2**20, None)
    cache.put(KIB, "a")
    cache.put(KIB, "b")
    cache.path("b").write_bytes(b"torn")
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert kept(cache, "a") == ["a"]
    with pytest.warns(UserWarning, match="unreadable"):
        assert not kept(cache, "b")


WRITE = """
import sys, torch
from pathlib import Path
from easyref.cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 15_000, None)
for round in range(8):
    for name in range(15):
        found = cache.get(torch.device("cpu"), name)
        assert found is None or (found["x"] == name).all()
        cache.put({"x": torch.full((256,), float(name))}, name)
"""


def test_two_processes_share_it(tmp_path: Path) -> None:
    """Each writes, reads and deletes what the other one writes, reads and deletes."""
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", WRITE, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 16_500  # both may add the last one at once


def test_the_environment_says_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYREF_CACHE", str(tmp_path))
    monkeypatch.setenv("EASYREF_CACHE_GIB", "0.5")
    cache = DiskCache.of_user(None)
    assert (cache.folder, cache.limit) == (tmp_path, 2**29)
    monkeypatch.setenv("EASYREF_CACHE_GIB", "much")
    with pytest.raises(ValueError, match="EASYREF_CACHE_GIB='much': not a number; give GiB, 0 for no cache"):
        DiskCache.of_user(None)


def test_another_process_with_the_same_references_runs_the_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second EasyRef: for a known sample it runs nothing, for a new prompt the text; the same bits as without."""
    monkeypatch.setenv("EASYREF_CACHE", str(tmp_path))
    checkpoint = Path("models/pretrain")
    references = [[Image.new("RGB", (70, 50), "red"), Image.new("RGB", (64, 64), "blue")]]
    alone = EasyRef.from_pretrained(checkpoint)
    known, new = (alone.encode(references, [prompt], [[2.0, 0.5]]) for prompt in ("star", "cat face"))
    EasyRef.from_pretrained(checkpoint, cache=True).encode(references, ["star"], [[2.0, 0.5]])
    assert len(list(tmp_path.iterdir())) == 2
    second = EasyRef.from_pretrained(checkpoint, cache=True)
    monkeypatch.setattr(second.encoder, "prefix", lambda *a, **k: pytest.fail("the prefix over the images ran"))
    assert torch.equal(second.encode(references, ["cat face"], [[2.0, 0.5]]), new)
    monkeypatch.setattr(second.encoder, "aggregate", lambda *a, **k: pytest.fail("the last layer ran"))
    assert torch.equal(second.encode(references, ["star"], [[2.0, 0.5]]), known)
    third = EasyRef.from_pretrained(checkpoint, cache=True, dtype=torch.bfloat16)
    assert third.disk.path("a") != second.disk.path("a")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="made again"):
        assert torch.equal(EasyRef.from_pretrained(checkpoint, cache=True).encode(references, ["star"], [[2.0, 0.5]]), known)
