"""`python -m flows.services up|down`: Prefect's server and worker and MLflow's server, on loopback, with their files in the project.

`up` waits until all answer, deploys prefect.yaml and makes `easyref` the Prefect profile in force, so that
`prefect deployment run easyref/full --watch` works from any folder. `down` stops exactly what `up` started and puts the profile back.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from prefect.settings.profiles import load_profiles

from easyref.records import read_json, write_json
from flows import PROJECT

HOST, PREFECT_PORT, MLFLOW_PORT, WORKER_PORT = "127.0.0.1", 4200, 5000, 8080
POOL = PROFILE = "easyref"
WAIT = 180  # seconds for a service to answer
Started = dict[str, tuple[int, float]]  # by name: process and when it was started
STATE, LOGS = Path(".work/services.json"), Path(".work/services")


def environment(project: Path) -> dict[str, str]:
    """Of everything that is started: loopback addresses; databases and artifacts in the project unless the environment names others."""
    stores = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{project}/mlflow.db",
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{project}/.prefect/prefect.db",
    }
    fixed = {
        "EASYREF_PROJECT": str(project),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{MLFLOW_PORT}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_API_URL": f"http://{HOST}:{PREFECT_PORT}/api",
        "PREFECT_WORKER_WEBSERVER_HOST": HOST,
        "PREFECT_WORKER_WEBSERVER_PORT": str(WORKER_PORT),
        "PYTHONPATH": str(project),
    }
    if "MLFLOW_ARTIFACTS_DESTINATION" not in os.environ:  # plain paths: `easyref` finds the files without the server, too
        stores |= {"MLFLOW_DEFAULT_ARTIFACT_ROOT": f"{project}/mlruns", "MLFLOW_SERVE_ARTIFACTS": "false"}
    return stores | os.environ | fixed


def up(project: Path) -> None:
    if (project / STATE).exists():
        alive = {name: _alive(*process) for name, process in read_json(project / STATE)["started"].items()}
        if all(alive.values()):
            raise SystemExit("services: already up; `make down` stops them")
        if any(alive.values()):
            raise SystemExit(f"services: {', '.join(n for n, a in alive.items() if not a)} died; `make down`, then `make up`")
        down(project)  # the machine was restarted: the profile is still to be put back
    for name, port in (("Prefect", PREFECT_PORT), ("MLflow", MLFLOW_PORT), ("Prefect's worker", WORKER_PORT)):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                raise SystemExit(f"services: port {port} of {name} is taken; stop what listens there")
    for folder in (project / ".prefect", project / LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    env = environment(project)
    started: Started = {}
    previous = load_profiles().active_name or ""
    try:
        _start(project, "prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(PREFECT_PORT)], env, started, previous)
        mlflow = ["mlflow", "server", "--host", HOST, "--port", str(MLFLOW_PORT), "--workers", "1"]
        _start(project, "mlflow", mlflow, env, started, previous)
        _wait(project, "prefect", f"http://{HOST}:{PREFECT_PORT}/api/health", started)
        _call(project, env, "prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        _call(project, env, "prefect", "work-pool", "set-concurrency-limit", POOL, "1")  # two runs would fight over the folder
        _call(project, env, "prefect", "--no-prompt", "deploy", "--all")
        _end_lost_runs()
        worker = ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "local", "--with-healthcheck"]
        _start(project, "worker", worker, env, started, previous)
        _wait(project, "mlflow", f"http://{HOST}:{MLFLOW_PORT}/health", started)
        _wait(project, "worker", f"http://{HOST}:{WORKER_PORT}/health", started)
        _use_profile(project, env)
    except BaseException:
        down(project)
        raise
    print(f"Prefect http://{HOST}:{PREFECT_PORT} · MLflow http://{HOST}:{MLFLOW_PORT} · logs in {LOGS} · `make down` stops them")


def down(project: Path) -> None:
    """Stop what `up` started, the last one first."""
    if not (project / STATE).exists():
        print("services: not up")
        return
    state = read_json(project / STATE)
    for name, (pid, begin) in reversed(state["started"].items()):
        _stop(name, pid, begin)
    if state["profile"]:
        _call(project, environment(project), "prefect", "profile", "use", state["profile"], need=False)
    (project / STATE).unlink()


def _start(project: Path, name: str, words: list[str], env: dict[str, str], started: Started, profile: str) -> None:
    with open(project / LOGS / f"{name}.log", "ab") as log:
        child = subprocess.Popen(words, cwd=project, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    started[name] = (child.pid, psutil.Process(child.pid).create_time())
    write_json(project / STATE, {"started": started, "profile": profile})


def _wait(project: Path, name: str, url: str, started: Started) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < WAIT:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if not _alive(*started[name]):
            break
        time.sleep(0.5)
    raise SystemExit(f"services: {name} does not answer at {url}; see {project / LOGS / name}.log")


def _stop(name: str, pid: int, begin: float) -> None:
    """End the process group of `pid`, if that still is the process that was started at `begin`."""
    for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        if not _alive(pid, begin):
            return
        os.killpg(pid, sign)
        end = time.monotonic() + seconds
        while _alive(pid, begin) and time.monotonic() < end:
            time.sleep(0.2)
    if _alive(pid, begin):
        print(f"services: {name} (process {pid}) does not end")


def _alive(pid: int, begin: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == begin and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _call(project: Path, env: dict[str, str], *words: str, need: bool = True) -> str:
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if need and done.returncode:
        raise SystemExit(f"services: `{' '.join(words)}` failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.stdout


def _end_lost_runs() -> None:
    """Flow runs of the pool that were under way when their worker went: none is at work now, and they would hold its one place forever.
    `make run`, or what else runs on a shared database, goes on."""
    under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    lost = {"flow_runs": under_way, "work_pools": {"name": {"any_": [POOL]}}}
    for flow_run in _post("flow_runs/filter", lost):
        state = {"type": "CRASHED", "name": "Crashed", "message": "its worker was gone; run the deployment again, it goes on"}
        _post(f"flow_runs/{flow_run['id']}/set_state", {"state": state, "force": True})


def _post(path: str, query: dict[str, Any]) -> Any:
    url = f"http://{HOST}:{PREFECT_PORT}/api/{path}"
    request = urllib.request.Request(url, json.dumps(query).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def _use_profile(project: Path, env: dict[str, str]) -> None:
    bare = {name: value for name, value in env.items() if not name.startswith("PREFECT_") or name == "PREFECT_HOME"}
    _call(project, bare, "prefect", "profile", "create", PROFILE, need=False)  # it may be there from before
    _call(project, bare, "prefect", "profile", "use", PROFILE, need=False)
    _call(project, bare, "prefect", "config", "set", f"PREFECT_API_URL=http://{HOST}:{PREFECT_PORT}/api")


def main() -> None:
    if sys.argv[1:] not in (["up"], ["down"]):
        raise SystemExit("usage: python -m flows.services up|down")
    {"up": up, "down": down}[sys.argv[1]](PROJECT)


if __name__ == "__main__":
    main()
