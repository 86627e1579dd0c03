"""The benchmark's methods are what they are called: the same images without references, and tokens that count."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from easyref.cli import app
from easyref.model.bench import step_methods
from easyref.records import read_json


@torch.no_grad()
def test_easyref_and_ip_adapter_draw_with_the_same_unet() -> None:
    torch.manual_seed(0)
    methods, parameters = step_methods()
    assert parameters > 20_000_000
    plain, ours, theirs = (methods[name]() for name in ("plain", "easyref", "diffusers_ip_adapter"))
    assert plain.shape == ours.shape == theirs.shape
    assert (ours - plain).abs().max() > 1e-3 and (theirs - plain).abs().max() > 1e-3


@pytest.mark.long
def test_bench_infer_writes_ratios(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "infer", "--rounds", "10", "--out", str(tmp_path / "infer.json")])
    assert done.exit_code == 0, done.output
    found = read_json(tmp_path / "infer.json")
    assert 0 < found["new_prompt_over_first_encode"] < 0.5 < found["adapter_over_plain"] < 2
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high
    assert found["median_ms"].keys() == {"plain", "easyref", "diffusers_ip_adapter", "first_encode", "new_prompt"}
