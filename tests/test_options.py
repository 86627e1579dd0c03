"""Options of the stages, off by default, in stages that run: each by the command a user types, on the shipped base models."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from easyref import cli
from easyref.model import weights
from easyref.model.schedule import Schedule
from easyref.pipeline import EasyRef
from tests.processes import exit_code, start
from tests.projects import tiny_project


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"))


def easyref(place: Path, *words: str, **options: Any) -> None:
    """`easyref WORDS` in the folder `place`; `options` of the stage that is the first word."""
    os.chdir(place)
    values = yaml.safe_load(Path("params.yaml").read_text()) | {"align": None}
    values.get(words[0], {}).update(options)
    Path("with.yaml").write_text(yaml.safe_dump(values))
    sys.argv = ["easyref", *words, *(["--params", "with.yaml"] if words[0] in values else [])]
    cli.main()


def run(place: Path, *words: str, **options: Any) -> int:
    return exit_code(start(call, place, words, options))


def call(place: Path, words: tuple[str, ...], options: dict[str, Any]) -> None:
    easyref(place, *words, **options)


def test_a_schedule_is_in_the_checkpoint_and_in_what_draws_with_it_and_in_the_next_stage(place: Path) -> None:
    schedule = Schedule(prediction="epsilon", zero_terminal_snr=False)
    assert run(place, "pretrain", **schedule.model_dump()) == 0
    assert run(place, "finetune_single") == 0
    base = EasyRef.base_pipeline(place / "models" / "pretrain").scheduler.config
    assert base.prediction_type == "v_prediction" and base.rescale_betas_zero_snr
    for name in ("pretrain", "finetune_single"):
        assert weights.read_config(place / "models" / name).schedule == schedule
        easyref = EasyRef.from_pretrained(place / "models" / name)
        drawn = easyref.pipe.scheduler
        assert drawn.config.prediction_type == "epsilon" and drawn.alphas_cumprod[-1] > 0
        easyref.detach()
        assert easyref.pipe.scheduler.config == base


def test_a_schedule_that_the_base_cannot_have_is_one_line(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit, match="2"):
        easyref(place, "pretrain", prediction="epsilon")
    assert capsys.readouterr().err.splitlines()[-1].startswith("easyref: prediction epsilon does not go with zero terminal SNR")
