"""Runs of the stages in MLflow: parameters, curves, pictures, system metrics, lineage. With registry.py the only importer of mlflow.

MLFLOW_TRACKING_URI names a server; without it everything goes to SQLite and a folder in the project. A stage never waits for the
tracking: another process reads the log that it writes anyway, and what a dead server did not take is sent when it is back.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyref.config import load_params
from easyref.lineage import lineage, stage_inputs
from easyref.records import read_json

MODEL = "easyref"  # the experiment, and the registered model


def connect(project: Path) -> Any:
    """An MlflowClient of the server in MLFLOW_TRACKING_URI, else of `project`/mlflow.db and `project`/mlruns.

    Raises:
        OSError: no server that answers, no project.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server and not (project / "params.yaml").exists():  # MLflow would make an empty database there
        raise FileNotFoundError(f"{project.resolve()}: no project with a registry; run in its folder, or set MLFLOW_TRACKING_URI")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = server or f"sqlite:///{project.resolve()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    try:
        experiment = client.get_experiment_by_name(MODEL)
    except MlflowException as error:
        why = str(error).splitlines()[0].replace(uri.rstrip("/"), "")  # which may hold a password
        fix = "start it (`make up`), or name another"
        raise ConnectionError(f"the MLflow server in MLFLOW_TRACKING_URI does not answer; {fix}: {why}") from error
    if experiment is None:
        place = (project.resolve() / "mlruns").as_uri() if uri.startswith("sqlite") else None
        client.create_experiment(MODEL, artifact_location=place)
    mlflow.set_experiment(MODEL)
    return client


@dataclass(frozen=True)
class Watched:
    """What a stage leaves: logs that grow while it runs (by prefix of their metrics; a glob), and files at its end (globs)."""

    logs: dict[str, str]
    files: tuple[str, ...] = ()
    figures: str | None = None


def trained(stage: str, **more: str) -> Watched:
    return Watched({"": f".work/{stage}.jsonl", **more}, (f".work/{stage}.samples/*.png",))


BASE_PARTS = ("vae", "mllm", "diffusion", "decoder")
WATCHED = {
    "base": Watched({f"{part}.": f".work/base/{part}-*.jsonl" for part in BASE_PARTS}, ("metrics/base/text.png",)),
    "pretrain": trained("pretrain", **{"align.": ".work/align.jsonl"}),
    "finetune_single": trained("finetune_single"),
    "finetune_multi": trained("finetune_multi"),
    "evaluate": Watched({}, ("reports/grid.png",), "metrics/evaluate.json"),
    "mrbench": Watched({}, ("reports/evaluation.html",), "metrics/mrbench.json"),
}


class StageRun:
    """The MLflow run of one of the stages in WATCHED.

    Use as a context manager around the stage, and call `begin` when it is known to run: one that is up to date has no run. From then
    on a thread sends every row of its logs (one JSON object a line, with `seen`) and the use of the machine; whatever fails is kept
    for the next try, the last one at the end. Nothing that goes wrong here reaches the stage: it is said through `say`.
    """

    PERIOD = 5.0  # seconds between two looks at the logs

    def __init__(self, project: Path, stage: str, say: Callable[[str], None], flow_run: str = "") -> None:
        self.project, self.stage, self.say, self.flow_run = project, stage, say, flow_run
        self.run_id: str | None = None
        self.sent: dict[str, int] = {}  # rows, by prefix
        self._client: Any = None
        self._monitor: Any = None
        self._begun, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"track {stage}", daemon=True)
        self._start_ns = 0
        self._silent = False

    def __enter__(self) -> StageRun:
        self._thread.start()
        return self

    def begin(self) -> None:
        self._start_ns = self._start_ns or time.time_ns()
        self._begun.set()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.set()
        self._begun.set()
        self._thread.join()
        if self._start_ns:
            self._try(lambda: self._finish("FAILED" if kind else "FINISHED"))

    def _follow(self) -> None:
        self._begun.wait()
        while not self._stop.wait(self.PERIOD):
            self._try(self._send)

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
            self._silent = False
        except Exception as error:
            if not self._silent:
                why = f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]
                self.say(f"tracking: {why}; {self.stage} goes on, its files have all")
            self._silent = True

    def _start(self) -> None:
        from mlflow.entities import Param, RunTag

        self._client = connect(self.project)
        experiment = self._client.get_experiment_by_name(MODEL).experiment_id
        facts, values = lineage(self.project, self.flow_run), load_params(self.project / "params.yaml")
        marks = tags(facts) | {f"input.{path}": md5 for path, md5 in stage_inputs(self.project, self.stage).items()}
        params = flat({self.stage: getattr(values, self.stage).model_dump(), "seed": values.seed, "preset": values.preset})
        run_id = self._client.create_run(experiment, run_name=self.stage, start_time=self._start_ns // 10**6).info.run_id
        self._client.log_batch(
            run_id, params=[Param(k, str(v)[:500]) for k, v in params.items()], tags=[RunTag(k, v) for k, v in marks.items()]
        )
        self.run_id = run_id

    def _send(self) -> None:
        if self.run_id is None:
            self._start()
        self._watch_machine()
        for prefix, rows in self._rows():
            done = min(self.sent.get(prefix, 0), len(rows))  # a resumed training cut its log: the rows come again, with the same values
            self._log([(prefix + k, v, row["seen"]) for row in rows[done:] for k, v in row.items() if k != "seen"])
            self.sent[prefix] = len(rows)

    def _rows(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """What the logs of this stage have so far; a log from before the stage began is another run's."""
        for prefix, pattern in WATCHED[self.stage].logs.items():
            found = [path for path in self.project.glob(pattern) if path.stat().st_mtime_ns >= self._start_ns]
            if found:
                lines = max(found, key=lambda path: path.stat().st_mtime_ns).read_text().splitlines()
                yield prefix, [json.loads(line) for line in lines if line.endswith("}")]

    def _watch_machine(self) -> None:
        """Processor, memory, disk, network, GPU as `system/…`, by MLflow's own monitor, which ends when the server fails."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._monitor is None or not self._monitor._process.is_alive():
            again = self._monitor is not None
            self._monitor = SystemMetricsMonitor(self.run_id, sampling_interval=max(1.0, self.PERIOD), resume_logging=again)
            self._monitor.start()

    def _finish(self, status: str) -> None:
        self._send()
        watched = WATCHED[self.stage]
        if status == "FINISHED":
            if watched.figures:
                self._log([(name, value, 0) for name, value in figures(read_json(self.project / watched.figures)).items()])
            for path in [path for pattern in watched.files for path in sorted(self.project.glob(pattern))]:
                self._client.log_artifact(self.run_id, str(path))
        self._monitor.finish()
        self._client.set_terminated(self.run_id, status)

    def _log(self, values: list[tuple[str, float, int]]) -> None:
        """Name, value and step of each; MLflow takes a thousand at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value, step in values]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])


def tags(facts: dict[str, Any]) -> dict[str, str]:
    """The tags of a run from its lineage."""
    return {
        "git.revision": facts["git"]["revision"] or "unknown",
        "git.dirty": str(facts["git"]["dirty"]).lower(),
        "params.sha256": facts["params"]["sha256"],
        "preset": facts["params"]["preset"],
        "flow_run": facts["flow_run"],
        "hardware": facts["hardware"],
    }


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under names that MLflow takes."""
    return {k.replace("[", ".").replace("]", ""): float(v) for k, v in flat(result).items() if isinstance(v, int | float)}
