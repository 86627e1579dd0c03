"""Where a model comes from: git revision, parameters, dvc.lock, images and licences, as one JSON that travels with it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from easyref.records import read_table, sha256_file, sha256_json


def lineage(project: Path) -> dict[str, Any]:
    """Of the models in `project` as they are now. Hashes are those of dvc.lock: md5 of each stage's inputs and outputs."""
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"] if (project / "dvc.lock").exists() else {}
    params = project / "params.yaml"
    result: dict[str, Any] = {
        "git": {"revision": _git(project, "rev-parse", "HEAD"), "dirty": bool(_git(project, "status", "--porcelain"))},
        "params": {"sha256": sha256_file(params), "preset": yaml.safe_load(params.read_text())["preset"]} if params.exists() else {},
        "stages": {name: {"inputs": _hashes(stage, "deps"), "outputs": _hashes(stage, "outs")} for name, stage in lock.items()},
        "flow_run": os.environ.get("PREFECT__FLOW_RUN_ID", ""),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    images, groups = project / "data" / "images" / "images.parquet", project / "data" / "split" / "groups.parquet"
    if images.exists():
        table = read_table(images, ("shard", "licence"))
        result["images"] = {
            "count": len(table),
            "shards": {name: sha256_file(images.parent / name) for name in sorted(table["shard"].unique())},
            "licences": dict(sorted(Counter(table["licence"]).items())),
        }
    if groups.exists():
        result["groups"] = dict(sorted(Counter(read_table(groups, ("split",))["split"]).items()))
    return result


def evaluated_on(params: dict[str, Any], lock: dict[str, Any]) -> str:
    """What two evaluations must share for their figures to be compared: samples, images, parameters of `evaluate`, seed."""
    inputs = lock.get("evaluate", {}).get("inputs", {})
    return sha256_json([inputs.get("data/images"), inputs.get("data/split"), params["evaluate"], params["seed"]])


def _hashes(stage: dict[str, Any], kind: str) -> dict[str, str]:
    return {item["path"]: item["md5"] for item in stage.get(kind, []) if "md5" in item}


def _git(project: Path, *words: str) -> str:
    """What git says, or nothing outside a repository."""
    try:
        done = subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
