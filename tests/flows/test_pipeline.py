"""The flow `easyref` on a small DVC project, under a real Prefect server: order, failure, up to date, cancel, timeout."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.repo import Repo
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness

from easyref.records import write_json
from flows import RELEASED, contents, released, services
from flows.__main__ import BASELINES, main, up_to_date
from flows.pipeline import easyref, order, pull_shipped, write_summary
from flows.stages import StageFailed, run_stage
from tests.flows.serving import evaluation

ROOT = Path(__file__).parents[2]
#: Waits until it is told to end, and notes that.
PATIENT = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path("told").write_text("SIGTERM")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path("started").touch()
time.sleep(120)
"""


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """first → second → third, and `other` beside them."""
    python = sys.executable
    (tmp_path / "patient.py").write_text(PATIENT)
    stages = {
        "third": {"cmd": "cat second > third && echo third >> ran", "deps": ["second"], "outs": ["third"]},
        "second": {"cmd": "cat first > second && echo second >> ran", "deps": ["first"], "outs": ["second"]},
        "first": {"cmd": "echo one > first && echo first >> ran", "outs": ["first"]},
        "other": {"cmd": "echo o > other && echo other >> ran", "outs": ["other"]},
        "patient": {"cmd": f"{python} patient.py", "outs": ["never"]},
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    return tmp_path


def edit(project: Path, stage: str, cmd: str) -> None:
    values = yaml.safe_load((project / "dvc.yaml").read_text())
    values["stages"][stage]["cmd"] = cmd
    (project / "dvc.yaml").write_text(yaml.safe_dump(values))


def test_order_is_the_one_of_the_dvc_graph() -> None:
    plan = order(ROOT)
    assert list(plan) == list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    with Repo(str(ROOT)) as repo:
        for stage, needed in repo.index.graph.edges:
            assert needed.name in plan[stage.name]
    assert order(ROOT, []) == {}
    assert order(ROOT, ["evaluate", "split"]) == {"split": [], "evaluate": ["split"]}  # through stages that are left out
    with pytest.raises(ValueError, match=r"stage 'pretain': not in dvc.yaml; it has .*pretrain"):
        order(ROOT, ["pretain"])


def test_stages_run_in_order_and_once(project: Path) -> None:
    wanted = ["third", "second", "first", "other"]
    assert easyref(wanted, release=False, project=str(project)) == dict.fromkeys(["first", "other", "second", "third"], "ran")
    ran = (project / "ran").read_text().split()
    assert sorted(ran) == sorted(wanted) and [s for s in ran if s != "other"] == ["first", "second", "third"]
    edit(project, "second", "echo two > second && echo second >> ran")
    again = easyref(wanted, release=False, project=str(project))
    assert again == {"first": "up to date", "other": "up to date", "second": "ran", "third": "ran"}
    assert (project / "third").read_text() == "two\n"
    edit(project, "second", "cat first > second && echo second >> ran")
    write_json(project / RELEASED, contents(project))
    cached = easyref(wanted, project=str(project))
    assert "registers it again" in cached.pop("release")  # every night's run would make the champion replace itself
    assert cached == {"first": "up to date", "other": "up to date", "second": "from the cache", "third": "from the cache"}


def test_what_was_made_without_dvc_is_made_anew_and_what_is_missing_pulled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shipped stage's output that dvc.lock does not know: `dvc pull` will not remove it."""
    monkeypatch.setattr("flows.pipeline.SHIPPED", ("first",))
    with chdir(project):
        Repo().reproduce(["first"])
    (project / "first").unlink()
    (project / "first").write_text("by hand\n")
    (project / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    remote = local\n['remote \"local\"']\n    url = ../remote\n"
    )
    assert easyref(["first"], release=False, project=str(project)) == {"first": "ran"}
    assert (project / "first").read_text() == "one\n"
    (project / "first").unlink()
    assert easyref(["second"], release=False, project=str(project)) == {"second": "ran"}  # what it reads is pulled, not made
    assert (project / "ran").read_text().split() == ["first", "first", "second"]


def test_a_failing_stage_fails_the_flow_with_its_last_lines(project: Path) -> None:
    edit(project, "second", "echo all is lost && exit 3")
    with pytest.raises(StageFailed, match=r"(?s)second: exit code \d+\n.*all is lost"):
        easyref(["first", "second", "third"], release=False, project=str(project))
    assert (project / "first").exists() and not (project / "third").exists()


def test_what_dvc_has_locked_is_tried_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process holds DVC's lock, for the pull, then the one on the stage's output, and ends while the flow waits."""
    monkeypatch.setattr("flows.pipeline.SHIPPED", ("other",))
    for task in (run_stage, pull_shipped):
        monkeypatch.setattr(task, "retry_delay_seconds", [1, 5, 5])
    with chdir(project):
        Repo().reproduce(["other"])
    (project / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    remote = r\n['remote \"r\"']\n    url = ../remote\n")
    hold = "from dvc.repo import Repo\nimport time\nwith Repo().lock:\n    open('held', 'w')\n    time.sleep(12)\ntime.sleep(12)"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=project)
    threading.Thread(target=other.wait).start()
    wait((project / "held").exists, 60)
    lock = {"write": {str(project / "first"): {"pid": other.pid, "cmd": "dvc repro first"}}}
    (project / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(lock))
    assert easyref(["first", "other"], release=False, project=str(project)) == {"first": "ran", "other": "up to date"}
    assert other.poll() is not None


def test_make_run_says_in_one_line_why_it_failed_and_registers_nothing_that_cannot_be_exported(project: Path) -> None:
    values = yaml.safe_load((project / "dvc.yaml").read_text())
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"other": values["stages"]["other"]}}))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match=r"^easyref: export: exit code 1\n(.*\n)?.*No module named export"):
            main(project)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (project / "other").exists() and not (project / "mlflow.db").exists()


def test_a_stage_that_takes_too_long_is_told_to_end(project: Path) -> None:
    with pytest.raises(StageFailed, match=r"patient: stopped after 8 s"):
        easyref(["patient"], release=False, project=str(project), timeout_s=8)
    assert (project / "told").read_text() == "SIGTERM"


def test_a_cancelled_flow_tells_its_stages_to_end_and_starts_no_other(project: Path) -> None:
    """As Prefect's worker cancels: SIGTERM to the process of the flow run. Two stages run, the third waits for a thread."""
    values = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    stages = {
        "asleep": {"cmd": "touch lying && exec sleep 120", "outs": ["never_either"]},
        "patient": values["patient"],
        "waiting": {"cmd": "touch waiting", "outs": ["waiting"]},
    }
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    program = f"from flows.pipeline import easyref; easyref(release=False, project={str(project)!r})"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": str(get_current_settings().api.url)}
    flow = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=env)
    wait(lambda: (project / "started").exists() and (project / "lying").exists(), 120)
    flow.send_signal(signal.SIGTERM)
    assert flow.wait(60) != 0
    assert (project / "told").read_text() == "SIGTERM"
    assert not (project / "waiting").exists()


def test_up_ends_the_lost_runs_of_its_own_pool_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database may be shared, and `make run` may be at work on the server that is up."""
    port = urllib.parse.urlparse(str(get_current_settings().api.url)).port
    monkeypatch.setattr(services, "PREFECT_PORT", port)
    post = services._post
    flow = post("flows/", {"name": "theirs"})["id"]
    post("work_pools/", {"name": services.POOL, "type": "process"})
    deployment = post("deployments/", {"name": "full", "flow_id": flow, "work_pool_name": services.POOL})["id"]
    ours, theirs = post(f"deployments/{deployment}/create_flow_run", {})["id"], post("flow_runs/", {"flow_id": flow})["id"]
    for run in (ours, theirs):
        post(f"flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    services._end_lost_runs()
    states = {run["id"]: run["state"]["type"] for run in post("flow_runs/filter", {"flows": {"id": {"any_": [flow]}}})}
    assert states == {ours: "CRASHED", theirs: "RUNNING"}


def test_the_page_of_a_run_has_no_figures_of_a_model_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "metrics" / "evaluate.json", evaluation(0.2))
    pages: list[str] = []
    monkeypatch.setattr("flows.pipeline.create_markdown_artifact", lambda text, **_: pages.append(text))
    write_summary(tmp_path, {"pretrain": "ran"}, {})
    write_summary(tmp_path, {"evaluate": "ran"}, {})
    assert "0.2000" not in pages[0] and "0.2000" in pages[1]


def test_make_clean_stops_the_services_before_it_forgets_them(tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    threading.Thread(target=server.wait).start()
    (tmp_path / "flows").symlink_to(ROOT / "flows")
    started = {"prefect": (server.pid, psutil.Process(server.pid).create_time())}
    write_json(tmp_path / services.STATE, {"started": started, "profile": ""})
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["make", "-f", str(ROOT / "Makefile"), "clean"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert server.poll() is not None and not (tmp_path / ".work").exists(), done.stdout


@pytest.mark.long
def test_make_run_that_is_stopped_leaves_nothing_running(project: Path, tmp_path: Path) -> None:
    """Neither the stage nor the server that Prefect starts for the one run."""
    values = yaml.safe_load((project / "dvc.yaml").read_text())
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"patient": values["stages"]["patient"]}}))
    program = f"from pathlib import Path; from flows.__main__ import main; main(Path({str(project)!r}))"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "home")}
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=env)
    wait((project / "started").exists, 120)
    started = psutil.Process(run.pid).children(recursive=True)
    assert any("uvicorn" in " ".join(process.cmdline()) for process in started)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) != 0
    assert (project / "told").read_text() == "SIGTERM"
    gone, alive = psutil.wait_procs(started, timeout=30)
    assert gone and not alive


def wait(ready: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def test_a_run_is_done_when_its_model_is_released(tmp_path: Path) -> None:
    weights, figures = tmp_path / "models" / "finetune_multi" / "easyref.safetensors", tmp_path / "metrics" / "evaluate.json"
    for path in (weights, figures):
        path.parent.mkdir(parents=True)
        path.write_text("old")
    assert not released(tmp_path)
    write_json(tmp_path / RELEASED, contents(tmp_path))
    assert released(tmp_path)
    figures.write_text("new")
    assert not released(tmp_path)
    write_json(tmp_path / RELEASED, contents(tmp_path))
    (tmp_path / "params.yaml").write_text("release: {min_gain: 0.1}")  # the comparison may end otherwise
    assert not released(tmp_path)


def test_dvc_says_what_is_up_to_date(project: Path) -> None:
    values = yaml.safe_load((project / "dvc.yaml").read_text())
    del values["stages"]["patient"]
    values["stages"][BASELINES] = {"cmd": "exit 1", "outs": ["never"]}  # left out
    (project / "dvc.yaml").write_text(yaml.safe_dump(values))
    assert not up_to_date(project)
    with chdir(project):
        Repo().reproduce(["third", "other"])
    assert up_to_date(project)
