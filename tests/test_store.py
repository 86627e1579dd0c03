"""What encodings are kept in: the same bits for every later run of the same models and for no other, bounded, whole after kills."""

import multiprocessing
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from easyref.training.store import Disk, Store

MADE = {"a": torch.randn(3, 4).T, "b": torch.tensor([1, 2]), "c": torch.randn(5).bfloat16()}


def never() -> dict[str, torch.Tensor]:
    pytest.fail("made again")


def store(path: Path, about: str = "model", limit: int = 2**22, memory: int = 2**20) -> Store:
    return Store(memory, Disk(path / "encodings.sqlite", limit, {"latents": about}))


def test_a_later_run_finds_the_same_bits_under_the_same_model_and_key_only(tmp_path: Path) -> None:
    first = store(tmp_path / "new")
    first.get(lambda: MADE, "latents", "image", 3, (64, 96))
    first.get(lambda: MADE, "patches", "image")  # a kind that is not for the disk
    for memory in (2**20, 8):  # 8 bytes: nothing stays in memory
        later = store(tmp_path / "new", memory=memory)
        for _ in range(2):
            found = later.get(never, "latents", "image", 3, (64, 96))
            assert found.keys() == MADE.keys() and all(torch.equal(found[n], MADE[n]) for n in MADE)
        assert later.find("latents", "image", 3, (96, 64)) is None and later.find("patches", "image") is None
    assert store(tmp_path / "new", "other").find("latents", "image", 3, (64, 96)) is None


def test_memory_keeps_what_was_used_last(tmp_path: Path) -> None:
    kept = Store(3000)
    for name in "abc":
        kept.get(lambda: {"x": torch.zeros(250)}, "latents", name)  # 1000 bytes
    kept.get(never, "latents", "a")
    kept.get(lambda: {"x": torch.zeros(250)}, "latents", "d")
    assert [name for name in "abcd" if kept.find("latents", name)] == ["a", "c", "d"]
    kept.get(lambda: {"x": torch.zeros(2000)}, "latents", "too large")
    assert [name for name in ("a", "c", "d", "too large") if kept.find("latents", name)] == ["a", "c", "d"]
    assert kept.take(never, "latents", "a") and not kept.find("latents", "a")


def test_pinned_memory_counts_as_torch_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In powers of two (ATen/core/CachingHostAllocator.h): what is over the budget would not be there for anything else."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    kept = Store(2**14, device=torch.device("cuda"))
    for name in range(16):
        kept.get(lambda: {"x": torch.zeros(513), "of no size": torch.empty(0, 4)}, "text", name)  # 2,052 bytes take 4,096
    assert len(kept.kept) == 4


def test_a_full_disk_drops_other_models_and_then_keeps_nothing_more(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fill(about: str) -> list[int]:
        filled = store(tmp_path, about, memory=8)
        for name in range(64):
            filled.get(lambda name=name: {"x": torch.full((30_000,), float(name))}, "latents", name)
        return [name for name in range(64) if filled.find("latents", name)]

    first = fill("first")
    assert first == list(range(len(first))) and 25 < len(first) < 36  # of 120 kB, in 4 MiB
    assert capsys.readouterr().out.count("full; what else is encoded stays in memory only") == 1
    assert fill("second") == first and not store(tmp_path, "first").find("latents", 0)
    assert all((store(tmp_path, "second").find("latents", name) or {})["x"].eq(name).all() for name in first)
    assert (tmp_path / "encodings.sqlite").stat().st_size <= 2**22


def test_a_file_that_is_broken_or_cannot_be_there_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "encodings.sqlite").write_bytes(b"no database " * 1000)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "folder"):
        with pytest.warns(UserWarning, match=r"encodings\.sqlite: .*goes on without"):
            broken = store(path)
        assert broken.get(lambda: MADE, "latents", 1) and broken.get(never, "latents", 1)


def write(path: Path) -> None:
    """What two processes do at once: read and write the same rows, over and over in a new store."""
    for turn in range(1000):
        kept = Store(8, Disk(path, 2**24, {"latents": "model"}))
        for name in range(turn * 10, turn * 10 + 10):
            found = kept.get(lambda name=name: {"x": torch.full((999,), float(name))}, "latents", name)
            assert found["x"].eq(name).all()


def test_processes_share_the_file_and_may_be_killed(tmp_path: Path) -> None:
    path = tmp_path / "encodings.sqlite"
    both = [multiprocessing.get_context("fork").Process(target=write, args=(path,)) for _ in range(2)]
    for process in both:
        process.start()
    found: list[int] = []
    while len(found) < 200 and all(process.is_alive() for process in both):
        time.sleep(0.05)
        kept = Store(8, Disk(path, 2**24, {"latents": "model"}))
        found = [name for name in range(3000) if kept.find("latents", name)]
    for process in both:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    kept = Store(8, Disk(path, 2**24, {"latents": "model"}))
    assert all((kept.find("latents", name) or {})["x"].eq(name).all() for name in found)
    kept.get(lambda: MADE, "latents", "new")
    assert kept.find("latents", "new")


def test_threads_share_a_store(tmp_path: Path) -> None:
    shared = store(tmp_path, memory=20_000)

    def use(number: int) -> bool:
        name = number % 40
        found = shared.get(lambda: {"x": torch.full((999,), float(name))}, "latents", name)
        return bool(found["x"].eq(name).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(800)))
