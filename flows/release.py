"""After the stages: register the model, attach its ONNX graphs, compare it with the champion, give it its alias."""

from __future__ import annotations

import sys
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from easyref import registry
from easyref.records import write_json
from easyref.registry import Registered
from flows import RELEASED, contents
from flows.stages import run_child


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
def register(project: str) -> str:
    """A new version of the registered model `easyref`."""
    return registry.register(Path(project), str(flow_run.id or ""))


@task(name="export", cache_policy=NO_CACHE, persist_result=False)
def export(project: str, timeout_s: float | None) -> str:
    """The ONNX graphs of the model, verified against torch, in `out/onnx`; as they are if they are of this very model."""
    run_child("export", [sys.executable, "-m", "export", "models/finetune_multi", "out/onnx"], Path(project), timeout_s)
    return str(Path(project) / "out" / "onnx")


@task(name="attach", cache_policy=NO_CACHE, persist_result=False)
def attach(project: str, version: str, graphs: str) -> None:
    """Put the graphs beside the model in its version."""
    registry.attach(Path(project), version, Path(graphs))


@task(name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate(project: str, version: str) -> Registered:
    """Champion if it beats the champion by the thresholds in params.yaml, else challenger."""
    return registry.gate(Path(project), version)


def release_model(project: Path, timeout_s: float | None = None) -> Registered:
    """A version is of a model that could be exported, and the alias comes last: a champion always has its graphs."""
    graphs, made = export(str(project), timeout_s), contents(project)
    version = register(str(project))
    attach(str(project), version, graphs)
    registered = gate(str(project), version)
    write_json(project / RELEASED, made)
    return registered
