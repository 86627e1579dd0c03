"""Orchestration: Prefect decides when and where, DVC what is out of date (`pipeline`), MLflow what came out (`release`)."""

import os
from pathlib import Path

PROJECT = Path(__file__).parents[1]

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
