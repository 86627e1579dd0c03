"""Orchestration: Prefect decides when and where, DVC what is out of date (`pipeline`), MLflow what came out (`release`)."""

import os
from pathlib import Path
from typing import Any

import yaml

from easyref.records import read_json, sha256_file

PROJECT = Path(__file__).parents[1]
RELEASED = ".work/released.json"  # of the last model that came through the release to its end

# Before prefect is imported: nothing is sent to anybody, and a busy machine may take its time to start the server of a single run.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
}.items():
    os.environ.setdefault(_name, _value)


def contents(project: Path) -> dict[str, Any]:
    """What a release is of, as it is now: hashes, and the thresholds of the comparison."""
    files = (project / "models" / "finetune_multi" / "easyref.safetensors", project / "metrics" / "evaluate.json")
    params = project / "params.yaml"
    thresholds = yaml.safe_load(params.read_text())["release"] if params.exists() else {}
    return {**{path.name: sha256_file(path) for path in files if path.exists()}, "release": thresholds}


def released(project: Path) -> bool:
    """Whether the model as it is has come through the release to its end."""
    return (project / RELEASED).exists() and read_json(project / RELEASED) == contents(project)
