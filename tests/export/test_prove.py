"""The proof of a GPU machine, on one (`-m gpu`), and the same way on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from easyref.records import read_json
from easyref.runtime import NAMES
from easyref.trt import driver

WORDS = [sys.executable, "-m", "export.prove", "models/pretrain"]


@pytest.mark.gpu
@pytest.mark.skipif(driver() is not None, reason=f"{driver()}")
def test_a_gpu_machine(tmp_path: Path) -> None:
    done = subprocess.run([*WORDS, str(tmp_path), "--size", "64:64:128", "--text", "24"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "proof.json")
    assert set(found["largest_difference"]) == set(NAMES) and found["image_difference"] < 8


@pytest.mark.long
@pytest.mark.skipif(driver() is None, reason="a GPU is here")
def test_without_one_it_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run([*WORDS, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("prove: tensorrt: ")
    assert not list(tmp_path.iterdir())
