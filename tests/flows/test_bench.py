"""`python -m flows.bench`, at the shortest lengths."""

from pathlib import Path

import pytest

from easyref.records import read_json
from flows import bench


@pytest.mark.long
def test_bench_writes_what_a_stage_costs_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    for name, value in {"SHORT": 1, "LONG": 2, "TIMES": 1}.items():
        monkeypatch.setattr(bench, name, value)
    bench.main(tmp_path / "flow.json")
    made = read_json(tmp_path / "flow.json")
    took = {(run["how"], run["stages"]): run["seconds"][0] for run in made["runs"]}
    assert set(took) == {("dvc", 1), ("dvc", 2), ("flow", 1), ("flow", 2)} and min(took.values()) > 0
    cost = made["seconds_per_stage"]
    assert cost["flow"] == pytest.approx(took["flow", 2] - took["flow", 1])
    assert cost["overhead"] == pytest.approx(cost["flow"] - cost["dvc"])
    assert made["seconds_to_start"]["dvc"] == pytest.approx(took["dvc", 1] - cost["dvc"])
