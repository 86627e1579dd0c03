"""Where a model comes from: git revision, parameters, dvc.lock, images and licences, as one JSON that travels with it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from easyref.config import Params, load_params
from easyref.records import read_table, sha256_file, sha256_json

COUNTED = {"shards": "shard", "licences": "licence"}  # images by shard, by licence


def locked(project: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    path = project / "dvc.lock"
    return yaml.safe_load(path.read_text())["stages"] if path.exists() else {}


def lineage(project: Path, flow_run: str) -> dict[str, Any]:
    """Of the models in `project` as they are now, made by the Prefect run `flow_run` (empty: by hand). Hashes are those of dvc.lock:
    md5 of each stage's inputs and outputs."""
    path = project / "params.yaml"
    result: dict[str, Any] = {
        "git": {"revision": _git(project, "rev-parse", "HEAD"), "dirty": bool(_git(project, "status", "--porcelain"))},
        "params": {"sha256": sha256_file(path), "preset": load_params(path).preset},
        "stages": {n: {"inputs": _hashes(stage, "deps"), "outputs": _hashes(stage, "outs")} for n, stage in locked(project).items()},
        "flow_run": flow_run,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    images, groups = project / "data" / "images" / "images.parquet", project / "data" / "split" / "groups.parquet"
    if images.exists():
        table = read_table(images, ("shard", "licence"))
        result["images"] = {name: dict(sorted(Counter(table[column]).items())) for name, column in COUNTED.items()}
    if groups.exists():
        result["groups"] = dict(sorted(Counter(read_table(groups, ("split",))["split"]).items()))
    return result


def stage_inputs(project: Path, stage: str) -> dict[str, str]:
    """md5 of what a stage reads, by path: what dvc.lock says of the stages that made it."""
    made = {path: md5 for entry in locked(project).values() for path, md5 in _hashes(entry, "outs").items()}
    path = project / "dvc.yaml"
    needed = yaml.safe_load(path.read_text())["stages"].get(stage, {}).get("deps", []) if path.exists() else []
    return {path: made[path] for path in needed if path in made}


def evaluated_on(params: Params, stages: dict[str, Any]) -> str:
    """What two evaluations must share for their figures to be compared: samples, images, parameters of `evaluate`, seed. `stages`
    are those of a lineage."""
    inputs = stages.get("evaluate", {}).get("inputs", {})
    return sha256_json([inputs.get("data/images"), inputs.get("data/split"), params.evaluate.model_dump(), params.seed])


def _hashes(stage: dict[str, Any], kind: str) -> dict[str, str]:
    return {item["path"]: item["md5"] for item in stage.get(kind, []) if "md5" in item}


def _git(project: Path, *words: str) -> str:
    """What git says, or nothing outside a repository."""
    try:
        done = subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
