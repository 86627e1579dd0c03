"""THE task of the flow: run one DVC stage as a child process, its output line by line in the flow run's log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from easyref.tracking import WATCHED, StageRun

CHILD = Path(__file__).with_name("child.py")
GRACE = 30  # seconds between SIGTERM and SIGKILL
EVERY = 10.0  # seconds between two updates of the progress artifact
_running: set[subprocess.Popen] = set()
_stopped: set[str] = set()  # flow runs that `stop_all` ended


class StageFailed(RuntimeError):
    """A stage ended with an exit code other than zero; the message has its last lines."""


class Locked(RuntimeError):
    """Another DVC process holds the stage's files: the one failure that passes by waiting."""


def _transient(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Locked)


#: Of a task that runs DVC.
DVC: dict[str, Any] = {
    "cache_policy": NO_CACHE, "persist_result": False,
    "retries": 3, "retry_delay_seconds": [5, 15, 45], "retry_condition_fn": _transient,
}  # fmt: skip


@task(name="stage", task_run_name="{stage}", **DVC)
def run_stage(stage: str, project: str, timeout_s: float | None = None) -> str:
    """Run `dvc repro --single-item STAGE`. Returns `ran`, `up to date` or `from the cache` (DVC has outputs of just these inputs).

    Raises:
        StageFailed: exit code, or `timeout_s` seconds passed; the message ends with the stage's last lines.
    """
    place, words = Path(project), [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    run = StageRun(place, stage, get_run_logger().warning, str(flow_run.id or "")) if stage in WATCHED else None

    def read(line: str) -> None:
        if run and line.startswith("Running stage"):
            run.begin()

    with run or nullcontext():
        lines = run_child(stage, words, place, timeout_s, read)
    said = "\n".join(lines)
    return "up to date" if "didn't change, skipping" in said else "from the cache" if "is cached - skipping run" in said else "ran"


def run_child(
    name: str, words: list[str], project: Path, timeout_s: float | None, read: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Run a program in `project` to its end, logging what it prints, and giving it to `read`. Its last 200 lines.

    The program ends when this process does, however that ends (`flows.child`).

    Raises:
        StageFailed, Locked: see there.
    """
    logger, last, progress = get_run_logger(), deque[str](maxlen=200), _Progress(name)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"  # a stage calls `easyref`: this one
    child = subprocess.Popen(
        [sys.executable, str(CHILD), *words], cwd=project, env=environment | {"PATH": path}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    _running.add(child)
    timer = threading.Timer(timeout_s, lambda: stop(child)) if timeout_s else None
    begin = time.monotonic()
    try:
        if flow_run.id in _stopped:  # asked after `add`: whoever stops the run in between finds the child
            raise StageFailed(f"{name}: not run, for its flow run was stopped")
        if timer:
            timer.start()
        assert child.stdout
        for raw in child.stdout:  # text mode takes the \r of progress bars for line ends
            if line := raw.rstrip():
                last.append(line)
                logger.info("%s", line)
                progress.read(line)
                read(line)
        code = child.wait()
    except BaseException:
        stop(child)
        raise
    finally:
        _running.discard(child)
        if timer:
            timer.cancel()
    if code:
        tail = "\n".join(list(last)[-15:])
        if any("Unable to acquire lock" in line or "it is being blocked by" in line for line in last):
            raise Locked(f"{name}: another DVC process works on it\n{tail}")
        late = timeout_s is not None and time.monotonic() - begin >= timeout_s
        raise StageFailed(f"{name}: {f'stopped after {timeout_s:g} s' if late else f'exit code {code}'}\n{tail}")
    progress.end()
    return list(last)


def stop(child: subprocess.Popen) -> None:
    """SIGTERM to the child and all it started; SIGKILL if that does not end it. A training keeps its state."""
    with suppress(ProcessLookupError):
        child.terminate()  # flows.child tells all of the group
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def stop_all() -> None:
    """Stop every stage that runs, and let none begin: the flow run was cancelled, or a stage of it failed."""
    _stopped.add(flow_run.id)
    for child in list(_running):
        stop(child)


class _Progress:
    """A progress artifact that follows the percentages of a progress bar; made at the first of them."""

    def __init__(self, name: str) -> None:
        self.key = f"progress-{name.replace('_', '-')}"
        self.artifact: Any = None
        self.shown, self.at = -1.0, 0.0

    def read(self, line: str) -> None:
        found = re.search(r"(\d{1,3})%\|", line)
        if found and time.monotonic() - self.at >= EVERY:
            self._show(float(found[1]))

    def end(self) -> None:
        if self.artifact is not None:
            self._show(100.0)

    def _show(self, percent: float) -> None:
        with suppress(Exception):  # a picture of progress is not worth a training
            if self.artifact is None:
                self.artifact = create_progress_artifact(progress=percent, key=self.key)
            elif percent != self.shown:
                update_progress_artifact(artifact_id=self.artifact, progress=percent)
            self.shown, self.at = percent, time.monotonic()
