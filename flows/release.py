"""After the stages: register the model, compare it with the champion, give it its alias."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from easyref import tracking
from easyref.tracking import Registered


@task(name="register", cache_policy=NO_CACHE, persist_result=False)
def register(project: str) -> str:
    """A new version of the registered model `easyref`."""
    return tracking.register(Path(project), str(flow_run.id or ""))


@task(name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate(project: str, version: str) -> Registered:
    """Champion if it beats the champion by the thresholds in params.yaml, else challenger."""
    return tracking.gate(Path(project), version)


def release_model(project: Path) -> Registered:
    return gate(str(project), register(str(project)))
