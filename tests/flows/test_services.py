"""`make up` to `make down` as a user types them, on a small project: servers, a deployment run, the registry, what is left behind."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from easyref.records import read_json, write_json
from flows import services
from tests.flows.serving import easyref, evaluation, make_project, run, services_do, serving

pytestmark = pytest.mark.long
COUNTER = ["prefect", "deployment", "run", "easyref/full", "--param", 'stages=["counter"]', "--param", "release=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("project")
    make_project(place)
    with serving(place, tmp_path_factory.mktemp("home")):
        yield place


def api(path: str, query: dict | None = None) -> Any:
    """What Prefect's server answers."""
    url = f"http://{services.HOST}:{services.PREFECT_PORT}/api/{path}"
    data = None if query is None else json.dumps(query).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
        return json.loads(answer.read())


def last_run() -> dict:
    (flow_run,) = api("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    return flow_run


def wait(ready: Callable[[], bool], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


def test_a_deployment_run_ends_with_a_champion_that_draws(place: Path, tmp_path: Path) -> None:
    """`prefect deployment run easyref/full --watch` from another folder; then everything the registry can do, over HTTP."""
    os.environ["MLFLOW_TRACKING_URI"] = f"http://{services.HOST}:{services.MLFLOW_PORT}"
    deployment = ["prefect", "deployment", "run", "easyref/full", "--watch", "--watch-timeout", "1500"]
    done = run(deployment, tmp_path)
    assert done.returncode == 0 and "Completed" in done.stdout, done.stdout + done.stderr
    assert easyref(place, "pull", "models:/easyref@champion", str(tmp_path / "model")) == f"{tmp_path / 'model'}: version 1\n"
    flow_run = re.search(r"flow run  ([0-9a-f-]{36})", easyref(place, "trace", "models:/easyref@champion"))
    assert flow_run, "the version does not know its flow run"
    assert {"manifest.json", "reference_kv.onnx", "unet.onnx", "vae_decoder.onnx"} <= {
        p.name for p in (tmp_path / "model" / "onnx").iterdir()
    }
    artifacts = api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run[1]]}}})
    (picture,) = [artifact["data"] for artifact in artifacts if artifact["type"] == "image"]
    with urllib.request.urlopen(picture) as answer:
        assert Image.open(io.BytesIO(answer.read())).size == (8, 8)
    (page,) = [artifact["data"] for artifact in artifacts if artifact["key"] == "summary"]
    assert (
        "| release | version 1, champion: " in page
        and "| fidelity | 0.2000 | 0.0000 | 0.0000 |" in page
        and "[easyref 1](http://" in page
    )
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    for model in ("models:/easyref@champion", str(tmp_path / "model")):
        out = str(tmp_path / "out")
        easyref(place, "generate", "--model", model, "--ref", str(tmp_path / "a.png"), "--steps", "2", "--out", out)
        assert Image.open(tmp_path / "out" / "0.png").size == (64, 64)
        shutil.rmtree(out)

    write_json(place / "better.json", evaluation(0.1))
    (place / "params.yaml").write_text((place / "presets" / "nano.yaml").read_text().replace("seed: 0", "seed: 1"))
    done = run([*deployment, "--param", "preset=nano"], tmp_path)
    assert (place / "params.yaml").read_text() == (place / "presets" / "nano.yaml").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "easyref 2 (challenger)" in easyref(place, "trace", "models:/easyref@challenger")
    assert "easyref 1 (champion)" in easyref(place, "trace", "models:/easyref@champion")
    assert easyref(place, "promote", "2") == "champion: version 2, before: 1\n"
    assert easyref(place, "rollback") == "champion: version 1, before: 2\n"
    assert "version 3 is challenger: " in easyref(place, "release")


def test_mlflow_serves_the_champion(place: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        port = probe.getsockname()[1]
    words = [
        "mlflow",
        "models",
        "serve",
        "-m",
        "models:/easyref@champion",
        "--env-manager",
        "local",
        "-h",
        services.HOST,
        "-p",
        str(port),
    ]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait(lambda: healthy(f"http://{services.HOST}:{port}/ping") or server.poll() is not None, 240)
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
        reference = base64.b64encode(buffer.getvalue()).decode()
        query = {"inputs": [{"references": [reference], "prompt": "farmer", "steps": 2, "seed": 3}]}
        request = urllib.request.Request(
            f"http://{services.HOST}:{port}/invocations", json.dumps(query).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            (made,) = json.loads(answer.read())["predictions"]
        assert Image.open(io.BytesIO(base64.b64decode(made["image"]))).size == (64, 64) and made["seed"] == 3
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_cancelled_run_and_a_killed_worker_lose_nothing(place: Path, tmp_path: Path) -> None:
    """The third run ends the training that the first two began, to the bits of one that nothing stopped."""
    state, log = place / ".work" / "counter.safetensors", place / ".work" / "counter.jsonl"

    def training() -> list[psutil.Process]:
        return [
            p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[-1] == "counter.py" and p.cwd() == str(place)
        ]

    def seen() -> int:
        return json.loads(log.read_text().splitlines()[-1])["seen"]

    (place / "slow").touch()
    (place / "counter").unlink(missing_ok=True)  # made by the first test
    assert run(COUNTER, tmp_path).returncode == 0
    wait(state.exists)
    assert run(["prefect", "flow-run", "cancel", last_run()["id"]], tmp_path).returncode == 0
    wait(lambda: last_run()["state"]["type"] == "CANCELLED" and not training())
    cancelled = seen()
    assert 10 <= cancelled < 120

    assert run(COUNTER, tmp_path).returncode == 0
    wait(lambda: seen() > cancelled)
    pid, _ = read_json(place / services.STATE)["started"]["worker"]
    spared = training()
    assert spared
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # ended with the one before it (a zombie counts as ended)
            if "flows/child.py" not in " ".join(process.cmdline()) and process not in spared:
                process.kill()
    wait(lambda: not training(), 30)  # the stage does not go on without its flow run
    killed = seen()
    assert cancelled < killed < 120

    (place / "slow").unlink()
    services_do("down", place)
    services_do("up", place)
    assert last_run()["state"]["type"] == "CRASHED"
    done = run([*COUNTER, "--watch", "--watch-timeout", "900"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    interrupted = (place / "counter").read_text()
    log.unlink()
    assert run([sys.executable, "counter.py"], place).returncode == 0
    assert (place / "counter").read_text() == interrupted


def test_a_failing_stage_fails_the_watched_run(place: Path, tmp_path: Path) -> None:
    (place / "better.json").unlink()
    done = run(["prefect", "deployment", "run", "easyref/evaluate", "--watch", "--watch-timeout", "900"], tmp_path)
    assert done.returncode == 1
    message = last_run()["state"]["message"]
    assert "evaluate: exit code" in message and "better.json" in message


def test_down_stops_exactly_what_up_started_and_keeps_what_it_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "easyref 1 (champion)" in easyref(place, "trace", "models:/easyref@champion")
    assert easyref(place, "pull", "models:/easyref@champion", str(tmp_path / "model")) == f"{tmp_path / 'model'}: version 1\n"
