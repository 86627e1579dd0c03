"""An ablation trains what it says, keeps what is trained, and leaves the rest of the parameters as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from easyref import ablate
from easyref.cli import app
from easyref.config import Params, Restart, load_params, parse_params
from easyref.model.weights import WEIGHTS, read_config
from easyref.records import read_json, write_bytes
from tests.projects import small_data

NANO = Path("presets/nano.yaml")
RESTART = Restart(at=40000, learning_rate=0.001, cooldown_images=4000)


@pytest.mark.parametrize("preset", ["nano", "sdxl"])
@pytest.mark.parametrize("name", ["tokens", "layer", "attention", "stages", "drops"])
def test_variants_differ_in_what_they_say(name: str, preset: str) -> None:
    params = load_params(Path("presets") / f"{preset}.yaml")
    seen = []
    for keys, stages in ablate.variants(name, params).values():
        changed = ablate.change(params, keys)
        same = ablate.change(changed, {key: _value(params, key) for key in keys})
        assert same == params and set(stages) <= set(ablate.CHAIN)
        seen.append((changed.model_dump_json(), stages))
    assert len(set(seen)) == len(seen) >= 2


def _value(params: Params, key: str) -> object:
    section, field = key.split(".")
    return getattr(getattr(params, section), field)


def test_training_is_shorter_in_whole_batches() -> None:
    params = load_params(NANO)
    short = ablate.shortened(params, 0.05)
    for name in ("align", *ablate.CHAIN):
        before, after = getattr(params, name), getattr(short, name)
        assert after.images % after.batch == 0 and after.images == pytest.approx(0.05 * before.images, abs=after.batch)
    again = params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"restart": RESTART})})
    found = ablate.shortened(again, 0.05).pretrain.restart
    assert found and (found.at, found.cooldown_images, found.learning_rate) == (2000, 200, RESTART.learning_rate)
    assert short.evaluate == params.evaluate and ablate.shortened(params, 1.0) == params


def test_what_was_trained_on_other_data_or_base_models_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_params: Params, _stages: tuple[str, ...], _data: Path, _models: Path, folder: Path) -> None:
        raise InterruptedError(folder.name)

    monkeypatch.setattr(ablate, "train_chain", stop)
    monkeypatch.setattr(ablate, "seconds", lambda *_: 1.0)
    seen, params = [], load_params(NANO).model_copy(update={"threads": 1})
    files = ("data/images/images.parquet", "data/split/samples.parquet", "models/base/diffusion/unet.safetensors")
    for number, changed in enumerate(("", *files)):
        for name in files:
            write_bytes(tmp_path / name, b"made again" if name == changed else b"as it was")
        for _ in range(2):
            with pytest.raises(InterruptedError) as stopped:
                ablate.ablate(params, "layer", 0.5, 3, tmp_path / "data", tmp_path / "models", tmp_path, tmp_path / "work")
            seen.append(str(stopped.value))
        assert len(set(seen)) == number + 1, changed


@pytest.mark.parametrize("name", ["token", "aggregation"])
def test_an_unknown_ablation_names_the_known_ones(name: str) -> None:
    found = CliRunner().invoke(app, ["ablate", name])
    assert isinstance(found.exception, ValueError)
    assert "not one of tokens, layer, attention, stages, drops" in str(found.exception)


@pytest.mark.parametrize("name", ["layer", "attention"])
def test_a_table_has_the_papers_figures_where_it_has_any(name: str) -> None:
    gap = {"mean": 0.01, "low": -0.02, "high": 0.04}
    fidelity = {"right": 0.1, "samples": 48, "groups": 24, "right_minus_shuffled": gap, "right_minus_none": gap}
    names = list(ablate.variants(name, load_params(NANO)))
    entry = {"fidelity": fidelity, "held_out_loss": 0.45, "right_minus_base": {"fidelity": gap}}
    paper = ablate.PAPER.get(name)
    result = {"variants": dict.fromkeys(names, entry), "base": names[0], "share": 0.1, "images": 7616}
    table = ablate.table(result | {"paper_clip_i_clip_t_dino_i": paper}).splitlines()
    assert len({line.count("|") for line in table[: 2 + len(names)]}) == 1
    assert table[2].startswith(f"| {names[0]} | 0.4500 | 0.100 |  | +0.010 [-0.020, +0.040] |")
    assert ("paper" in table[0], "The paper" in table[-1]) == (bool(paper), bool(paper)) and "48 held-out samples in 24" in table[-1]


@pytest.mark.long
def test_an_ablation_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(NANO.read_text())
    values["threads"] = 1
    values["evaluate"] |= {"steps": 2, "bootstrap": 100}
    values["reference"]["num_tokens"] = 4
    for name in ("align", *ablate.CHAIN):
        values[name] |= {"batch": 4, "microbatch": 4, "save_images": 16} | (
            {"images": 16, "warmup_images": 0, "cooldown_images": 0, "ema_images": 0, "max_references": 1}
        )
    params = parse_params(values)
    small_data(tmp_path / "data", params, 12)
    arguments = (params, "layer", 0.5, 3, tmp_path / "data", Path("models"), tmp_path, tmp_path / "work")
    result = ablate.ablate(*arguments)
    assert list(result["variants"]) == ["-1", "-2", "-3"] and result["base"] == "-1"
    assert "3 variants at 0.5 of the training lengths" in capsys.readouterr().out
    for name, entry in result["variants"].items():
        f, gap = entry["fidelity"], entry["right_minus_base"]["fidelity"]
        assert gap["mean"] == pytest.approx(f["right"] - result["variants"]["-1"]["fidelity"]["right"])
        assert (gap["low"] == gap["high"] == 0) == (name == "-1")
    checkpoints = sorted((tmp_path / "work").glob(f"*/finetune_multi/{WEIGHTS}"))
    layers = {}
    for path in checkpoints:
        with safe_open(path, "pt") as file:
            prefix = [re.search(r"encoder\.mllm\.language_model\.layers\.(\d+)", name) for name in file.keys()]  # noqa: SIM118
        layers[read_config(path.parent).reference.layer] = len({found[1] for found in prefix if found})
    assert layers == {-1: 3, -2: 2, -3: 1}, "the prefix ends before the layer that the tokens join"
    assert read_json(tmp_path / "metrics" / "ablate" / "layer.json")["variants"].keys() == result["variants"].keys()
    assert Image.open(tmp_path / "reports" / "ablate" / "layer.png").width > 600
    page = (tmp_path / "reports" / "ablate" / "layer.md").read_text()
    assert "| -2: .831, .704, .616 |" in page and "3 held-out samples" in page and "![](layer.png)" in page
    assert ablate.ablate(*arguments) == result
    assert "trains" not in capsys.readouterr().out, "nothing is trained twice"
