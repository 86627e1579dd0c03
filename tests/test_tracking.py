"""Runs of the stages on a real MLflow with SQLite: every row once, the machine, pictures, figures; a server that dies."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from easyref import tracking
from easyref.records import write_json
from easyref.tracking import StageRun

ROOT = Path(__file__).parents[1]
MEMORY = "system/system_memory_usage_percentage"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> Path:
    """The parameters and dvc.lock of this project, and a tracking store apart from its own."""
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".work").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(StageRun, "PERIOD", 0.05)
    return tmp_path


def wait(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)


def rows(count: int) -> str:
    return "".join(json.dumps({"seen": 16 * i, "loss": 1 / (i + 1), "learning_rate": 1e-3}) + "\n" for i in range(count))


def test_a_run_has_every_row_of_its_logs_and_a_dead_server_hurts_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    connect, alive = tracking.connect, [False]

    def flaky(place: Path):
        if not alive[0]:
            raise ConnectionError("the server is down")
        return connect(place)

    monkeypatch.setattr(tracking, "connect", flaky)
    log = project / ".work" / "pretrain.jsonl"
    (project / ".work" / "align.jsonl").write_text(rows(9))  # of a run before
    with StageRun(project, "pretrain", said.append, "flow 7") as run:
        run.begin()
        (project / ".work" / "pretrain.samples").mkdir()
        for seen in (0, 1600):
            Image.new("RGB", (8, 8)).save(project / ".work" / "pretrain.samples" / f"{seen:012}.png")
        log.write_text(rows(3))
        wait(lambda: bool(said))
        alive[0] = True
        log.write_text(rows(1500) + '{"seen": 1, "lo')  # torn: not sent
        wait(lambda: run.run_id is not None and MEMORY in connect(project).get_run(run.run_id).data.metrics)
    assert len(said) == 1 and re.match(r"tracking: ConnectionError: the server is down; pretrain goes on", said[0])
    client = connect(project)
    history = client.get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(16 * i, 1 / (i + 1)) for i in range(1500)]
    found = client.get_run(run.run_id)
    assert "align.loss" not in found.data.metrics
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["000000000000.png", "000000001600.png"]
    assert found.data.metrics[MEMORY] > 0
    assert found.data.params["pretrain.batch"] == "32" and found.info.status == "FINISHED"
    assert found.data.tags["preset"] == "nano" and found.data.tags["flow_run"] == "flow 7"
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    assert found.data.tags["input.models/base"] == next(o["md5"] for o in lock["base"]["outs"] if o["path"] == "models/base")


def test_several_trainings_of_a_stage_have_their_own_curves(project: Path) -> None:
    (project / ".work" / "base").mkdir()
    (project / "metrics" / "base").mkdir(parents=True)
    with StageRun(project, "base", pytest.fail) as run:
        run.begin()
        (project / ".work" / "base" / "vae-0123.jsonl").write_text(rows(2))
        (project / ".work" / "base" / "diffusion-4567.jsonl").write_text(rows(3))
        Image.new("RGB", (8, 8)).save(project / "metrics" / "base" / "text.png")
    client = tracking.connect(project)
    counts = {name: len(client.get_metric_history(run.run_id, f"{name}.loss")) for name in ("vae", "mllm", "diffusion")}
    assert counts == {"vae": 2, "mllm": 0, "diffusion": 3}
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["text.png"]


def test_an_evaluation_has_its_figures_and_pictures(project: Path) -> None:
    (project / "reports").mkdir()
    with StageRun(project, "evaluate", pytest.fail) as run:
        run.begin()
        write_json(project / "metrics" / "evaluate.json", {"held_out": {"fidelity": {"right": 0.25, "note": "text"}}})
        Image.new("RGB", (8, 8)).save(project / "reports" / "grid.png")
    client = tracking.connect(project)
    found = client.get_run(run.run_id).data
    assert {k: v for k, v in found.metrics.items() if not k.startswith("system/")} == {"held_out.fidelity.right": 0.25}
    assert sorted(file.path for file in client.list_artifacts(run.run_id)) == ["grid.png"]


def test_a_stage_that_fails_is_a_failed_run(project: Path) -> None:
    with pytest.raises(ZeroDivisionError), StageRun(project, "evaluate", pytest.fail) as run:
        run.begin()
        raise ZeroDivisionError
    assert tracking.connect(project).get_run(run.run_id).info.status == "FAILED"


def test_a_stage_that_did_not_run_has_no_run(project: Path) -> None:
    (project / ".work" / "pretrain.jsonl").write_text(rows(3))
    with StageRun(project, "pretrain", pytest.fail) as run:
        pass
    assert run.run_id is None


def test_no_server_and_no_project_are_told_and_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="MLFLOW_TRACKING_URI does not answer; start it"):
        tracking.connect(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(FileNotFoundError, match="no project with a registry; run in its folder"):
        tracking.connect(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_trained_stage_is_watched() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(tracking.WATCHED) == set(stages) - {"ingest", "embed", "group", "split", "report"}


def test_a_server_that_is_down_is_one_line_without_its_password(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9/")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match="MLFLOW_TRACKING_URI does not answer") as raised:
        tracking.connect(project)
    assert "secret" not in str(raised.value) and len(str(raised.value).splitlines()) == 1
