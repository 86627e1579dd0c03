"""A kill in a write or a removal leaves a folder whole or not at all, never in part; the next write clears what a killed one left."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest

from easyref.records import alone, atomic_folder, remove_folder
from tests.processes import exit_code, start

OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}


def work(verb: str, folder: Path, last: int) -> None:
    """Write or remove a folder of two files, killed before the `last`-th change of the file system."""
    changes = itertools.count(1)

    def counted(function):
        def call(*args, **options):
            if next(changes) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    os.fsync, os.unlink, os.rmdir = counted(os.fsync), counted(os.unlink), counted(os.rmdir)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    if verb == "write":
        with atomic_folder(folder) as temporary:
            for name, text in NEW.items():
                (temporary / name).write_text(text)
    else:
        remove_folder(folder)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize(("verb", "done"), [("write", NEW), ("remove", {})])
def test_killed_at_any_change(verb: str, done: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for last in itertools.count(1):
        if not folder.exists():
            folder.mkdir()
            for name, text in OLD.items():
                (folder / name).write_text(text)
        code = exit_code(start(work, verb, folder, last))
        assert content(folder) in ({}, OLD, NEW)
        if code == 0:
            break
    assert last > 4
    assert content(folder) == done
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] * bool(done)


def hold(folder: Path) -> None:
    with alone(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_one_run_at_a_time_in_a_folder_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    process = start(hold, tmp_path)
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another run is at work there"), alone(tmp_path):
        pass
    process.kill()
    assert exit_code(process) == -signal.SIGKILL
    with alone(tmp_path):
        pass
