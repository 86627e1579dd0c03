"""`make up` to `make down` as a user types them, on a small project: servers, a deployment run, the registry, what is left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from easyref.records import read_json, write_json
from flows import services

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project with stages that only write what a release needs, and a home of its own; services up."""
    place = tmp_path_factory.mktemp("project")
    for name in ("params.yaml", "prefect.yaml", "presets"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place / name)
    for name in ("flows", "data"):
        (place / name).symlink_to(ROOT / name)
    (place / "models").mkdir()
    (place / "models" / "base").symlink_to(ROOT / "models" / "base")
    write_json(place / "better.json", evaluation(0.2))
    Image.new("RGB", (8, 8)).save(place / "picture.png")
    stages = {
        "finetune_multi": {"cmd": f"cp -r {ROOT}/models/pretrain models/finetune_multi", "outs": ["models/finetune_multi"]},
        "evaluate": {
            "cmd": "mkdir -p metrics reports && cp better.json metrics/evaluate.json && cp picture.png reports/grid.png "
            "&& echo report > reports/evaluation.html",
            "deps": ["models/finetune_multi", "better.json"],
            "outs": ["metrics/evaluate.json", "reports/grid.png", "reports/evaluation.html"],
        },
    }
    (place / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (place / ".dvc").mkdir()
    (place / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        patch.setenv("PREFECT_HOME", str(home / ".prefect"))
        for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        services_do("up", place)
        try:
            yield place
        finally:
            services_do("down", place)


def evaluation(fidelity: float) -> dict:
    figures = {"right": fidelity, "shuffled": 0.0, "none": 0.0}
    figures |= {name: {"mean": fidelity, "low": 0.0, "high": 1.0} for name in ("right_minus_shuffled", "right_minus_none")}
    return {"held_out": {"fidelity": figures}, "held_in": {"fidelity": figures}}


def services_do(what: str, place: Path) -> None:
    program = f"from pathlib import Path; from flows import services; services.{what}(Path({str(place)!r}))"
    done = run([sys.executable, "-c", program], ROOT)
    assert done.returncode == 0, done.stderr


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def easyref(place: Path, *words: str) -> str:
    done = run([sys.executable, "-m", "easyref.cli", *words], place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_deployment_run_ends_with_a_champion_that_draws(place: Path, tmp_path: Path) -> None:
    """`prefect deployment run easyref/full --watch` from another folder; then everything the registry can do, over HTTP."""
    os.environ["MLFLOW_TRACKING_URI"] = f"http://{services.HOST}:{services.MLFLOW_PORT}"
    deployment = ["prefect", "deployment", "run", "easyref/full", "--watch", "--watch-timeout", "240"]
    done = run(deployment, tmp_path)
    assert done.returncode == 0 and "Completed" in done.stdout, done.stdout + done.stderr
    assert easyref(place, "pull", "models:/easyref@champion", str(tmp_path / "model")) == f"{tmp_path / 'model'}: version 1\n"
    flow_run = re.search(r"flow run  ([0-9a-f-]{36})", easyref(place, "trace", "models:/easyref@champion"))
    assert flow_run, "the version does not know its flow run"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    for model in ("models:/easyref@champion", str(tmp_path / "model")):
        out = str(tmp_path / "out")
        easyref(place, "generate", "--model", model, "--ref", str(tmp_path / "a.png"), "--steps", "2", "--out", out)
        assert Image.open(tmp_path / "out" / "0.png").size == (64, 64)
        shutil.rmtree(out)

    write_json(place / "better.json", evaluation(0.1))
    done = run(deployment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "easyref 2 (challenger)" in easyref(place, "trace", "models:/easyref@challenger")
    assert "easyref 1 (champion)" in easyref(place, "trace", "models:/easyref@champion")
    assert easyref(place, "promote", "2") == "champion: version 2, before: 1\n"
    assert easyref(place, "rollback") == "champion: version 1, before: 2\n"
    assert "version 3 is challenger: " in easyref(place, "release")


def test_a_failing_stage_fails_the_watched_run(place: Path, tmp_path: Path) -> None:
    (place / "better.json").unlink()
    done = run(["prefect", "deployment", "run", "easyref/evaluate", "--watch", "--watch-timeout", "240"], tmp_path)
    assert done.returncode == 1
    query = json.dumps({"sort": "START_TIME_DESC", "limit": 1}).encode()
    url = f"http://{services.HOST}:{services.PREFECT_PORT}/api/flow_runs/filter"
    with urllib.request.urlopen(urllib.request.Request(url, query, {"Content-Type": "application/json"})) as answer:
        (flow_run,) = json.loads(answer.read())
    assert "evaluate: exit code" in flow_run["state"]["message"] and "better.json" in flow_run["state"]["message"]


def test_down_stops_exactly_what_up_started(place: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = {pid: begin for pid, begin in read_json(place / services.STATE)["started"].values()}
    assert len(started) == 3 and all(services._alive(pid, begin) for pid, begin in started.items())
    services_do("down", place)
    assert not any(services._alive(pid, begin) for pid, begin in started.items())
    assert stranger.poll() is None
    stranger.send_signal(signal.SIGKILL)
    stranger.wait()
    for port in (services.PREFECT_PORT, services.MLFLOW_PORT):
        with socket.socket() as probe:
            assert probe.connect_ex((services.HOST, port)) != 0
