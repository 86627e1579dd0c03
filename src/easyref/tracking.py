"""The only importer of mlflow: runs of the stages, the registered model `easyref`, its aliases, pulls and lineage.

A bundle is what a registered version holds: `checkpoint/` (config.json, easyref.safetensors), `base/` when the base models were
trained here, `evaluate.json`, `grid.png`, `lineage.json`, and `manifest.json` with the sha256 of all of them.

MLFLOW_TRACKING_URI names a server; without it everything goes to SQLite and a folder in the project. A training never waits for
the tracking: rows are read from the log that it writes anyway, and what a dead server did not take is said, not lost.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyref.config import Release, load_params
from easyref.lineage import evaluated_on, lineage
from easyref.records import atomic_folder, read_json, sha256_file, write_json

MODEL, CHAMPION, CHALLENGER = "easyref", "champion", "challenger"
MANIFEST = "manifest.json"
PYFUNC = Path(__file__).parent / "pyfunc.py"


class TrackingError(RuntimeError):
    """MLflow could not do what was asked; the message is one line with the fix."""


def connect(project: Path) -> Any:
    """An MlflowClient of the server in MLFLOW_TRACKING_URI, else of `project`/mlflow.db and `project`/mlruns."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project.resolve()}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(MODEL)
    if experiment is None:
        place = (project.resolve() / "mlruns").as_uri() if uri.startswith("sqlite") else None
        client.create_experiment(MODEL, artifact_location=place)
    mlflow.set_experiment(MODEL)
    return client


# -- runs of the stages ------------------------------------------------------------------------------------------------


class StageRun:
    """The MLflow run of a stage that is training: its parameters and lineage, and every row of its log as it is written.

    Use as a context manager around the training. A thread follows `log` (one JSON object a line, with `seen`); whatever fails is
    kept for the next try, the last one at the end. Nothing that goes wrong here reaches the training: it is said through `say`.
    """

    PERIOD = 5.0  # seconds between two looks at the log

    def __init__(self, project: Path, stage: str, log: Path, say: Callable[[str], None], flow_run: str = "") -> None:
        self.project, self.stage, self.log, self.say, self.flow_run = project, stage, log, say, flow_run
        self.run_id: str | None = None
        self.sent = 0  # rows
        self._client: Any = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"track {stage}", daemon=True)
        self._before = self._identity()
        self._silent = False

    def __enter__(self) -> StageRun:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._changed():
            self._try(self._send)
            self._try(lambda: self._finish("FAILED" if kind else "FINISHED"))

    def _follow(self) -> None:
        while not self._stop.wait(self.PERIOD):
            if self._changed():
                self._try(self._send)

    def _identity(self) -> tuple[int, int] | None:
        return (self.log.stat().st_mtime_ns, self.log.stat().st_size) if self.log.exists() else None

    def _changed(self) -> bool:
        """Whether the stage has written: one that DVC finds up to date has no run."""
        return self._identity() not in (None, self._before)

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
            self._silent = False
        except Exception as error:
            if not self._silent:
                why = f"{type(error).__name__}: {str(error)[:200]}".splitlines()[0]
                self.say(f"tracking: {why}; the training goes on, {self.log} has all")
            self._silent = True

    def _start(self) -> None:
        from mlflow.entities import Param, RunTag

        self._client = connect(self.project)
        experiment = self._client.get_experiment_by_name(MODEL).experiment_id
        self.run_id = self._client.create_run(experiment, run_name=self.stage).info.run_id
        facts, values = lineage(self.project, self.flow_run), load_params(self.project / "params.yaml")
        params = flat({self.stage: getattr(values, self.stage).model_dump(), "seed": values.seed, "preset": values.preset})
        self._client.log_batch(
            self.run_id, params=[Param(k, str(v)[:500]) for k, v in params.items()], tags=[RunTag(k, v) for k, v in tags(facts).items()]
        )

    def _send(self) -> None:
        from mlflow.entities import Metric

        if self.run_id is None:
            self._start()
        rows = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        self.sent = min(self.sent, len(rows))  # a resumed training cut its log: the rows come again with the same values
        now = int(time.time() * 1000)
        metrics = [Metric(k, v, now, row["seen"]) for row in rows[self.sent :] for k, v in row.items() if k != "seen"]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        self.sent = len(rows)

    def _finish(self, status: str) -> None:
        if self.run_id:
            self._client.set_terminated(self.run_id, status)


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


# -- the registered model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    version: str
    alias: str
    reason: str


def make_bundle(project: Path, folder: Path, flow_run: str = "") -> None:
    """Put the finetuned checkpoint of `project`, its base models and what is known of them into `folder`, with a manifest."""
    from easyref.model.weights import read_config

    checkpoint = project / "models" / "finetune_multi"
    shutil.copytree(checkpoint, folder / "checkpoint")
    if read_config(checkpoint).base_id.startswith("base/"):
        shutil.copytree(project / "models" / "base", folder / "base")
    shutil.copy(project / "metrics" / "evaluate.json", folder)
    shutil.copy(project / "reports" / "grid.png", folder)
    shutil.copy(project / "params.yaml", folder)
    write_json(folder / "lineage.json", lineage(project, flow_run))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): sha256_file(path) for path in files})


def check_bundle(folder: Path) -> None:
    """Compare a bundle with its manifest.

    Raises:
        ValueError: a file is missing, changed or not listed.
    """
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder}: no {MANIFEST}; it is not a bundle of easyref, pull it again")
    expected = read_json(folder / MANIFEST)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    for name in sorted(found | expected.keys()):
        if name not in found or name not in expected:
            raise ValueError(f"{folder / name}: {'missing' if name in expected else 'not in the manifest'}; pull the model again")
        if sha256_file(folder / name) != expected[name]:
            raise ValueError(f"{folder / name}: its hash is not the one in {MANIFEST}; pull the model again")


def register(project: Path, flow_run: str = "") -> str:
    """Register the finetuned model as a new version of `easyref`, with its evaluation and lineage. Returns the version.
    `flow_run`: id of the Prefect run that made it."""
    client = connect(project)
    import mlflow

    result = read_json(project / "metrics" / "evaluate.json")
    with tempfile.TemporaryDirectory() as temporary, mlflow.start_run(run_name="register") as run:
        bundle = Path(temporary) / "bundle"
        bundle.mkdir()
        make_bundle(project, bundle, flow_run)
        facts, params = read_json(bundle / "lineage.json"), load_params(project / "params.yaml")
        mlflow.set_tags(tags(facts) | {"evaluated_on": evaluated_on(params, facts["stages"])})
        mlflow.log_params({k: str(v)[:500] for k, v in flat(params.model_dump()).items()})
        mlflow.log_metrics(
            {k.replace("[", ".").replace("]", ""): float(v) for k, v in flat(result).items() if isinstance(v, int | float)}
        )
        mlflow.log_artifact(str(bundle / "grid.png"))
        mlflow.log_artifact(str(project / "reports" / "evaluation.html"))
        info = mlflow.pyfunc.log_model(
            name=MODEL, python_model=str(PYFUNC), artifacts={"bundle": str(bundle)}, pip_requirements=requirements(),
            registered_model_name=MODEL,
        )  # fmt: skip
    version = str(info.registered_model_version)
    client.set_model_version_tag(MODEL, version, "run", run.info.run_id)
    return version


def requirements() -> list[str]:
    """What a machine needs that serves the model: exact versions of what is installed here."""
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "pydantic", "pillow", "numpy", "mlflow")
    return [f"easyref=={version('easyref')}", *(f"{name}=={version(name).split('+')[0]}" for name in names)]


def decide(new: dict[str, Any], champion: dict[str, Any] | None, same_samples: bool, least: Release) -> tuple[bool, str]:
    """Whether a model may become champion, and why. `new` and `champion` are evaluations (metrics/evaluate.json)."""
    fidelity = new["held_out"]["fidelity"]["right"]
    if fidelity < least.min_fidelity:
        return False, f"held-out fidelity {fidelity:.4f} is under release.min_fidelity {least.min_fidelity}"
    if champion is None:
        return True, f"held-out fidelity {fidelity:.4f}; there is no champion yet"
    if not same_samples:
        return False, "the champion was evaluated on other samples; compare by eye, then `easyref promote`"
    gain = fidelity - champion["held_out"]["fidelity"]["right"]
    if gain < least.min_gain:
        return False, f"held-out fidelity {fidelity:.4f}, {gain:+.4f} over the champion, under release.min_gain {least.min_gain}"
    return True, f"held-out fidelity {fidelity:.4f}, {gain:+.4f} over the champion"


def gate(project: Path, version: str) -> Registered:
    """Compare a version with the champion and give it the alias `champion` or `challenger`."""
    client = connect(project)
    least = load_params(project / "params.yaml").release
    current = alias_version(client, CHAMPION)
    new, old = evaluation(version), evaluation(current) if current else None
    same = current is not None and samples_of(client, version) == samples_of(client, current)
    good, reason = decide(new, old, same, least)
    client.set_model_version_tag(MODEL, version, "gate", reason)
    if good:
        promote(project, version)
    else:
        client.set_registered_model_alias(MODEL, CHALLENGER, version)
    return Registered(version, CHAMPION if good else CHALLENGER, reason)


def evaluation(version: str) -> dict[str, Any]:
    with pulled(version, ["evaluate.json"]) as folder:
        return read_json(folder / "evaluate.json")


def samples_of(client: Any, version: str) -> str:
    run = client.get_run(client.get_model_version(MODEL, version).run_id)
    return str(run.data.tags.get("evaluated_on", ""))


def alias_version(client: Any, alias: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(MODEL, alias).version)
    except MlflowException:
        return None


def promote(project: Path, version: str) -> str | None:
    """Make a version the champion. Returns the one it replaces, which `rollback` goes back to."""
    client = connect(project)
    before = alias_version(client, CHAMPION)
    _existing(client, version)
    if before == version:
        return before
    if before:
        client.set_model_version_tag(MODEL, version, "replaced", before)
    client.set_registered_model_alias(MODEL, CHAMPION, version)
    if alias_version(client, CHALLENGER) == version:
        client.delete_registered_model_alias(MODEL, CHALLENGER)
    return before


def rollback(project: Path) -> tuple[str, str]:
    """Champion back to the version that the present one replaced. Returns (from, to)."""
    client = connect(project)
    current = alias_version(client, CHAMPION)
    if current is None:
        raise TrackingError(f"{MODEL} has no champion; promote a version with `easyref promote VERSION`")
    before = client.get_model_version(MODEL, current).tags.get("replaced")
    if not before:
        raise TrackingError(f"version {current} replaced no other; promote one with `easyref promote VERSION`")
    _existing(client, before)
    client.set_registered_model_alias(MODEL, CHAMPION, before)
    return current, str(before)


def _existing(client: Any, version: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(MODEL, version)
    except MlflowException as error:
        known = ", ".join(sorted((str(v.version) for v in client.search_model_versions(f"name='{MODEL}'")), key=int)) or "none"
        raise TrackingError(f"{MODEL} has no version {version}; there are: {known}") from error


def resolve(client: Any, uri: str) -> Any:
    """The model version of `models:/easyref@ALIAS` or `models:/easyref/VERSION`.

    Raises:
        TrackingError: not such an address, or nothing there.
    """
    rest = uri.removeprefix("models:/")
    name, mark, which = rest.partition("@") if "@" in rest else rest.partition("/")
    if not uri.startswith("models:/") or name != MODEL or not which:
        raise TrackingError(f"{uri}: not an address of the registry; give models:/{MODEL}@{CHAMPION} or models:/{MODEL}/VERSION")
    version = alias_version(client, which) if mark == "@" else which
    if version is None:
        raise TrackingError(f"{uri}: no version has the alias {which}; register one with `easyref release`")
    return _existing(client, version)


@contextmanager
def pulled(version: str, names: list[str] | None = None) -> Iterator[Path]:
    """The bundle of a version, or some of its files, in a temporary folder."""
    import mlflow

    with tempfile.TemporaryDirectory() as temporary:
        inside = [f"artifacts/bundle/{name}" for name in names] if names else ["artifacts/bundle"]
        for path in inside:
            mlflow.artifacts.download_artifacts(f"models:/{MODEL}/{version}/{path}", dst_path=temporary)
        found = next(path for path in Path(temporary).rglob("*") if path.name == (names[0] if names else MANIFEST))
        yield found.parent


def pull(project: Path, uri: str, folder: Path) -> str:
    """Fetch a registered model into `folder` and check every hash. Returns its version."""
    client = connect(project)
    version = resolve(client, uri)
    with pulled(version.version) as bundle:
        check_bundle(bundle)
        with atomic_folder(folder) as temporary:
            shutil.copytree(bundle, temporary, dirs_exist_ok=True)
    return str(version.version)


def cached(project: Path, uri: str) -> Path:
    """The pulled bundle of `uri` in the project's cache, checked each time it is used."""
    client = connect(project)
    version = resolve(client, uri)
    folder = project / ".cache" / "models" / f"{MODEL}-{version.version}-{version.run_id[:12]}"
    if not folder.exists():
        pull(project, f"models:/{MODEL}/{version.version}", folder)
    check_bundle(folder)
    return folder


def trace(project: Path, uri: str) -> str:
    """The chain from a version back to the images, as text."""
    client = connect(project)
    version = resolve(client, uri)
    run = client.get_run(version.run_id)
    with pulled(version.version, ["lineage.json"]) as folder:
        facts = read_json(folder / "lineage.json")
    aliases = ", ".join(version.aliases) or "no alias"
    git = facts["git"]
    lines = [
        f"version   {MODEL} {version.version} ({aliases}); gate: {version.tags.get('gate', 'not compared')}",
        f"run       {run.info.run_id}, on {facts['hardware']}",
        f"flow run  {facts['flow_run'] or 'none: registered by hand'}",
        f"git       {git['revision'] or 'no repository'}{' with changes' if git['dirty'] else ''}",
        f"params    {facts['params']['sha256'][:16]} (preset {facts['params']['preset']})",
    ]
    for name, stage in facts["stages"].items():
        inputs = ", ".join(f"{path} {md5[:8]}" for path, md5 in stage["inputs"].items())
        outputs = ", ".join(f"{path} {md5[:8]}" for path, md5 in stage["outputs"].items())
        lines.append(f"stage     {name}: {inputs or 'no input'} → {outputs}")
    lines.append("groups    " + (", ".join(f"{n} {split}" for split, n in facts.get("groups", {}).items()) or "none"))
    images = facts.get("images", {})
    lines += [f"shard     {name}: {n} images" for name, n in images.get("shards", {}).items()]
    lines += [f"licence   {licence}: {n} images" for licence, n in images.get("licences", {}).items()]
    return "\n".join(lines)
