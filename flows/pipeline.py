"""The flow `easyref`: the stages of dvc.yaml in the order of its graph, then the release of the model.

DVC says what is out of date, Prefect when and where it runs, MLflow what came out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.task_runners import ThreadPoolTaskRunner

from easyref import registry
from easyref.evaluation.summary import summary
from easyref.lineage import locked
from easyref.records import read_json
from flows import PROJECT, released
from flows.release import release_model
from flows.stages import DVC, StageFailed, run_child, run_stage, stop_all

SHIPPED = ("ingest", "base", "pretrain")  # made long ago, in the bundled remote


def order(project: Path, wanted: list[str] | None = None) -> dict[str, list[str]]:
    """Stages (None: all, or `wanted`) in an order that respects the DVC graph, each with those it must wait for.

    Raises:
        ValueError: a stage that dvc.yaml does not have.
    """
    import networkx
    from dvc.repo import Repo

    with Repo(str(project)) as repo:
        graph = repo.index.graph  # edge: stage → what it depends on
        names = {stage: stage.name for stage in graph}
        known = [names[stage] for stage in networkx.lexicographical_topological_sort(graph.reverse(), key=lambda s: s.name)]
        unknown = [name for name in wanted or [] if name not in known]
        if unknown:
            raise ValueError(f"stage {unknown[0]!r}: not in dvc.yaml; it has {', '.join(known)}")
        ancestors = {names[stage]: {names[other] for other in networkx.descendants(graph, stage)} for stage in graph}
    chosen = [name for name in known if wanted is None or name in wanted]
    return {name: [other for other in chosen if other in ancestors[name]] for name in chosen}


def absent(project: Path, plan: dict[str, list[str]]) -> list[str]:
    """What stages outside of `plan` made and those of it build on, as far as dvc.lock has it and the folder has not."""
    above = {other for name, needs in order(project).items() if name in plan for other in needs if other not in plan}
    outs = {name: [project / out["path"] for out in stage["outs"]] for name, stage in locked(project).items() if name in above}
    return [name for name, paths in outs.items() if not all(path.exists() for path in paths)]


@task(name="pull", **DVC)
def pull_shipped(project: str, stages: list[str]) -> None:
    """What dvc.lock has of `stages`. DVC then makes anew what does not fit the parameters in force."""
    known = locked(Path(project))
    for stage in filter(known.__contains__, stages):
        try:
            run_child("pull", [sys.executable, "-m", "dvc", "pull", stage], Path(project), None)
        except StageFailed as error:
            if "unsaved files" not in str(error):
                raise
            get_run_logger().warning("%s: what is there was made without DVC; nothing is pulled over it", stage)


@flow(name="easyref", task_runner=ThreadPoolTaskRunner(max_workers=2))  # type: ignore[arg-type]
def easyref(
    stages: list[str] | None = None, release: bool = True, preset: str | None = None, project: str | None = None,
    timeout_s: float | None = None,
) -> dict[str, str]:  # fmt: skip
    """Run `stages` of dvc.yaml (None: all), then register the model with its ONNX graphs and compare it with the champion. A model that
    came through this before is not registered again, unless no stages are asked for.

    Args:
        preset: put presets/PRESET.yaml in force first. None: params.yaml as it is.
        project: the project folder. None: the one this file is in.
        timeout_s: of each stage, and of the export; it is stopped then, and its state kept.
    """
    logger, place = get_run_logger(), Path(project) if project else PROJECT
    if preset:
        run_child("preset", [sys.executable, "-m", "easyref.cli", "preset", preset], place, None)
    plan = order(place, stages)
    futures: dict[str, PrefectFuture] = {}
    try:
        pull_shipped(str(place), [*(stage for stage in SHIPPED if stage in plan), *absent(place, plan)])
        for name, needs in plan.items():
            waits = [futures[other] for other in needs]
            futures[name] = run_stage.submit(name, str(place), timeout_s, wait_for=waits)  # type: ignore[call-overload]
        results = {name: future.result() for name, future in futures.items()}
    except BaseException:
        stop_all()
        raise
    links: dict[str, str] = {}
    if release and plan and released(place):  # else an unchanged model would be the next version, and replace itself as champion
        results["release"] = "made before, of this very model; the deployment easyref/release registers it again"
    elif release:
        registered = release_model(place, timeout_s)
        logger.info("version %s is %s: %s", registered.version, registered.alias, registered.reason)
        results["release"] = f"version {registered.version}, {registered.alias}: {registered.reason}"
        links = registry.links(place, registered.version)
    write_summary(place, results, links)
    return results


def write_summary(project: Path, results: dict[str, str], links: dict[str, str]) -> None:
    """What came out, as artifacts of the flow run: a page with links into MLflow, and the grid."""
    lines = ["| stage | |", "|---|---|", *(f"| {name} | {what} |" for name, what in results.items())]
    path = project / "metrics" / "evaluate.json"
    if path.exists() and results.keys() & {"evaluate", "release"}:  # else of a model from before
        held_out = read_json(path)["held_out"]
        lines += ["", "| held out | right | shuffled | none |", "|---|---|---|---|"]
        rows = {name: m for name, m in held_out.items() if isinstance(m, dict) and "right" in m}
        lines += [f"| {n} | {m['right']:.4f} | {m['shuffled']:.4f} | {m['none']:.4f} |" for n, m in rows.items()]
        lines += ["", *summary(project).splitlines()]
    lines += ["", *(f"[{name}]({url})" for name, url in links.items())]
    create_markdown_artifact("\n".join(lines), key="summary", description="What the flow made")
    if "grid" in links:
        create_image_artifact(links["grid"], key="grid", description="Held-out groups: references, target, what the model drew")
