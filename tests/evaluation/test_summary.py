"""What a run ends with."""

from pathlib import Path

import pytest

from easyref.evaluation.summary import summary
from easyref.records import write_json


def figures(own: str, weights: str) -> dict:
    gap = {"mean": 0.2, "low": 0.1, "high": 0.3}
    methods = ("easyref", "average", "concatenation", "lora", "text_only", "shuffled", "copy", "ceiling")
    entry = {"right": 0.5, **dict.fromkeys(methods, 0.5), f"{own}_minus_shuffled": gap, f"{own}_minus_none": gap}
    return {"held_out": {"fidelity": entry}, "held_in": {"fidelity": None}, "settings": {"weights": weights}}


def test_other_methods_are_shown_beside_the_weights_they_were_drawn_with(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    write_json(tmp_path / "metrics" / "evaluate.json", figures("right", "new"))
    assert "| lora |" not in summary(tmp_path) and "reports/evaluation.html" not in summary(tmp_path)
    write_json(tmp_path / "metrics" / "mrbench.json", figures("easyref", "old"))
    assert "| lora |" not in summary(tmp_path) and "reports/evaluation.html" not in summary(tmp_path)
    write_json(tmp_path / "metrics" / "mrbench.json", figures("easyref", "new"))
    assert "| lora |" in summary(tmp_path) and "reports/evaluation.html" in summary(tmp_path)
    assert "over none +0.200 [+0.100, +0.300]" in summary(tmp_path)


def test_without_an_evaluation_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="evaluate.json: no such file; run the stage that writes it"):
        summary(tmp_path)
