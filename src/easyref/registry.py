"""The registered model `easyref` in MLflow: bundles, versions, gate, aliases, pulls, trace.

A bundle is what a registered version holds: `checkpoint/` (config.json, easyref.safetensors), `base/` when the base models were
trained here, `evaluate.json`, `grid.png`, `lineage.json`, and `manifest.json` with the sha256 of all of them. Exported graphs are
attached beside it, in `onnx/`, with a manifest of their own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from easyref.config import Release, load_params
from easyref.lineage import evaluated_on, lineage
from easyref.records import atomic_folder, changed_file, read_json, sha256_file, write_json
from easyref.tracking import MODEL, connect, figures, flat, tags

CHAMPION, CHALLENGER = "champion", "challenger"
MANIFEST, LINEAGE, ONNX = "manifest.json", "lineage.json", "onnx"
PYFUNC = Path(__file__).parent / "pyfunc.py"


class RegistryError(RuntimeError):
    """The registry could not do what was asked; the message is one line with the fix."""


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
    write_json(folder / LINEAGE, lineage(project, flow_run))
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
    if (folder / ONNX).exists():
        check_graphs(folder / ONNX)
        found = {name for name in found if not name.startswith(f"{ONNX}/")}
    for name in sorted(found | expected.keys()):
        if name not in found or name not in expected:
            raise ValueError(f"{folder / name}: {'missing' if name in expected else 'not in the manifest'}; pull the model again")
        if sha256_file(folder / name) != expected[name]:
            raise ValueError(f"{folder / name}: its hash is not the one in {MANIFEST}; pull the model again")


def register(project: Path, flow_run: str = "") -> str:
    """Register the finetuned model as a new version of `easyref`, with its evaluation and lineage. Returns the version.
    `flow_run`: id of the Prefect run that made it. ValueError if the evaluation is of other weights."""
    result = read_json(project / "metrics" / "evaluate.json")
    if result.get("settings", {}).get("checkpoint") not in (None, sha256_file(project / "models/finetune_multi/easyref.safetensors")):
        raise ValueError("metrics/evaluate.json is of other weights than models/finetune_multi; run `easyref evaluate` first")
    client = connect(project)
    import mlflow

    with tempfile.TemporaryDirectory() as temporary, mlflow.start_run(run_name="register") as run:
        bundle = Path(temporary) / "bundle"
        bundle.mkdir()
        make_bundle(project, bundle, flow_run)
        facts, params = read_json(bundle / LINEAGE), load_params(project / "params.yaml")
        mlflow.set_tags(tags(facts) | {"evaluated_on": evaluated_on(params, facts["stages"])})
        mlflow.log_params({k: str(v)[:500] for k, v in flat(params.model_dump()).items()})
        mlflow.log_metrics(figures(result))
        mlflow.log_artifact(str(bundle / "grid.png"))
        if compared := report_of(project, result):
            mlflow.log_artifact(str(compared))
        info = mlflow.pyfunc.log_model(
            name=MODEL, python_model=str(PYFUNC), artifacts={"bundle": str(bundle)}, pip_requirements=requirements(),
            registered_model_name=MODEL,
        )  # fmt: skip
    version = str(info.registered_model_version)
    client.set_model_version_tag(MODEL, version, "run", run.info.run_id)
    return version


def report_of(project: Path, result: dict[str, Any]) -> Path | None:
    """The report of all methods, if it is of the weights that `result` is of: `make run` leaves it out."""
    figures, page = project / "metrics" / "mrbench.json", project / "reports" / "evaluation.html"
    same = figures.exists() and read_json(figures)["settings"]["weights"] == result["settings"]["weights"]
    return page if same and page.exists() else None


def attach(project: Path, version: str, graphs: Path) -> None:
    """Put exported graphs beside the bundle of a version. Once done, done again does nothing.

    Raises:
        ValueError: `graphs` are not whole, or of another checkpoint than the version's.
    """
    client = connect(project)
    found = _existing(client, version)
    digest = check_graphs(graphs)
    with pulled(version, [MANIFEST]) as folder:
        bundled = read_json(folder / MANIFEST)
    theirs = {name.removeprefix("checkpoint/"): h for name, h in bundled.items() if name.startswith(("checkpoint/", "base/"))}
    exported = read_json(graphs / MANIFEST)["inputs"]["files"]  # CHECKPOINT/…, base/…
    ours = {name if name.startswith("base/") else name.split("/", 1)[1]: h for name, h in exported.items()}
    if ours != theirs:
        raise ValueError(f"{graphs}: exported from another checkpoint than version {version}; run `python -m export` again")
    if found.tags.get(ONNX) != digest:
        client.log_model_artifacts(found.source.removeprefix("models:/"), str(graphs), ONNX)
        client.set_model_version_tag(MODEL, version, ONNX, digest)


def check_graphs(folder: Path) -> str:
    """Compare exported graphs with their manifest; returns the manifest's sha256.

    Raises:
        ValueError: a file is missing or changed.
    """
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder}: no {MANIFEST}; export the graphs with `python -m export`")
    if name := changed_file(folder, read_json(folder / MANIFEST)["files"]):
        raise ValueError(f"{folder / name}: missing or not the one in {MANIFEST}; export or pull it again")
    return sha256_file(folder / MANIFEST)


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
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise  # a server that cannot answer has not said that there is none
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
        raise RegistryError(f"{MODEL} has no champion; promote a version with `easyref promote VERSION`")
    before = client.get_model_version(MODEL, current).tags.get("replaced")
    if not before:
        raise RegistryError(f"version {current} replaced no other; promote one with `easyref promote VERSION`")
    _existing(client, before)
    client.set_registered_model_alias(MODEL, CHAMPION, before)
    return current, str(before)


def _existing(client: Any, version: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(MODEL, version)
    except MlflowException as error:
        known = ", ".join(sorted((str(v.version) for v in client.search_model_versions(f"name='{MODEL}'")), key=int)) or "none"
        raise RegistryError(f"{MODEL} has no version {version}; there are: {known}") from error


def resolve(client: Any, uri: str) -> Any:
    """The model version of `models:/easyref@ALIAS` or `models:/easyref/VERSION`.

    Raises:
        RegistryError: not such an address, or nothing there.
    """
    rest = uri.removeprefix("models:/")
    name, mark, which = rest.partition("@") if "@" in rest else rest.partition("/")
    if not uri.startswith("models:/") or name != MODEL or not which:
        raise RegistryError(f"{uri}: not an address of the registry; give models:/{MODEL}@{CHAMPION} or models:/{MODEL}/VERSION")
    version = alias_version(client, which) if mark == "@" else which
    if version is None:
        raise RegistryError(f"{uri}: no version has the alias {which}; register one with `easyref release`")
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
    """Fetch a registered model, with its graphs in `onnx/` if it has any, into `folder` and check every hash. Returns its version.

    Raises:
        ValueError: `folder` has something else in it, or what came is not what was registered.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / LINEAGE).exists():
        raise ValueError(f"{folder}: holds something else than a pulled model, and would be replaced; name another folder")
    version = resolve(connect(project), uri)
    _fetch(version, folder)
    return str(version.version)


def _fetch(version: Any, folder: Path) -> None:
    import mlflow

    with pulled(version.version) as bundle, atomic_folder(folder) as temporary:
        check_bundle(bundle)
        shutil.copytree(bundle, temporary, dirs_exist_ok=True)
        if ONNX in version.tags:
            mlflow.artifacts.download_artifacts(f"models:/{MODEL}/{version.version}/{ONNX}", dst_path=str(temporary))
            if check_graphs(temporary / ONNX) != version.tags[ONNX]:
                raise ValueError(
                    f"{MODEL} {version.version}: the graphs' manifest is not the one that was attached; run `easyref release` again"
                )


def cached(project: Path, uri: str) -> Path:
    """The pulled bundle of `uri` in the project's cache, checked each time it is used; fetched again where it is torn or the version
    has other graphs now."""
    client = connect(project)
    version = resolve(client, uri)
    folder = project / ".cache" / "models" / f"{MODEL}-{version.version}-{version.run_id[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want the same just now
        if not _holds(folder, version):
            _fetch(version, folder)
    return folder


def _holds(folder: Path, version: Any) -> bool:
    try:
        check_bundle(folder)
    except ValueError:
        return False
    graphs = folder / ONNX / MANIFEST
    return (sha256_file(graphs) if graphs.exists() else None) == version.tags.get(ONNX)


def links(project: Path, version: str) -> dict[str, str]:
    """Pages of a version, its run and its grid on the MLflow server; nothing where there is no server."""
    parts = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/"))
    if not parts.scheme.startswith("http"):
        return {}
    uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # without a password
    run = connect(project).get_run(_existing(connect(project), version).run_id).info
    return {
        f"{MODEL} {version}": f"{uri}/#/models/{MODEL}/versions/{version}",
        "run": f"{uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}",
        "grid": f"{uri}/get-artifact?path=grid.png&run_uuid={run.run_id}",
    }


def trace(project: Path, uri: str) -> str:
    """The chain from a version back to the images, as text."""
    client = connect(project)
    version = resolve(client, uri)
    run = client.get_run(version.run_id)
    with pulled(version.version, [LINEAGE]) as folder:
        facts = read_json(folder / LINEAGE)
    aliases = ", ".join(version.aliases) or "no alias"
    git = facts["git"]
    graphs = f"sha256 {version.tags[ONNX][:16]}" if ONNX in version.tags else "none attached"
    lines = [
        f"version   {MODEL} {version.version} ({aliases}); gate: {version.tags.get('gate', 'not compared')}",
        f"run       {run.info.run_id}, on {facts['hardware']}",
        f"flow run  {facts['flow_run'] or 'none: registered by hand'}",
        f"git       {git['revision'] or 'no repository'}{' with changes' if git['dirty'] else ''}",
        f"params    {facts['params']['sha256'][:16]} (preset {facts['params']['preset']})",
    ]
    lines.append(f"onnx      {graphs}")
    for name, stage in facts["stages"].items():
        inputs = ", ".join(f"{path} {md5[:8]}" for path, md5 in stage["inputs"].items())
        outputs = ", ".join(f"{path} {md5[:8]}" for path, md5 in stage["outputs"].items())
        lines.append(f"stage     {name}: {inputs or 'no input'} → {outputs}")
    lines.append("groups    " + (", ".join(f"{n} {split}" for split, n in facts.get("groups", {}).items()) or "none"))
    images = facts.get("images", {})
    lines += [f"shard     {name}: {n} images" for name, n in images.get("shards", {}).items()]
    lines += [f"licence   {licence}: {n} images" for licence, n in images.get("licences", {}).items()]
    return "\n".join(lines)
