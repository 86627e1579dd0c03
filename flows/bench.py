"""`python -m flows.bench`: what the flow costs over plain `dvc repro`, written to benchmarks/flow.json.

Chains of stages that do next to nothing are run by both in turn, at two lengths: the difference between the lengths
is the cost of a stage, the rest the cost of a start (for the flow: Prefect's server of that one run).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from easyref.progress import machine, track
from easyref.records import write_json
from flows import PROJECT

SHORT, LONG, TIMES = 2, 6, 2


def make(folder: Path, stages: int) -> None:
    """A DVC project whose stages each copy the output of the one before."""
    chain = {"s0": {"cmd": "echo 0 > s0", "outs": ["s0"]}}
    chain |= {f"s{i}": {"cmd": f"cp s{i - 1} s{i}", "deps": [f"s{i - 1}"], "outs": [f"s{i}"]} for i in range(1, stages)}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": chain}))
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")


def seconds(how: str, stages: int) -> float:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, stages)
        program = f"from flows.pipeline import easyref; easyref(release=False, project={str(folder)!r})"
        words = {"dvc": ["-m", "dvc", "repro"], "flow": ["-c", program]}[how]
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        begin = time.monotonic()
        subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
        return time.monotonic() - begin


def main(out: Path = PROJECT / "benchmarks" / "flow.json") -> None:
    cases = [(how, stages) for stages in (SHORT, LONG) for how in ("dvc", "flow")]
    took: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for case in track(cases * TIMES, "bench: flow", len(cases) * TIMES, "runs"):
        took[case].append(seconds(*case))
    middle = {case: statistics.median(values) for case, values in took.items()}
    stage = {how: (middle[how, LONG] - middle[how, SHORT]) / (LONG - SHORT) for how in ("dvc", "flow")}
    result = {
        "seconds_per_stage": {**stage, "overhead": stage["flow"] - stage["dvc"]},
        "seconds_to_start": {how: middle[how, SHORT] - SHORT * stage[how] for how in ("dvc", "flow")},
        "runs": [{"how": how, "stages": stages, "seconds": values} for (how, stages), values in took.items()],
        **machine("prefect", "dvc"),
    }
    write_json(out, result)
    print(f"a stage costs {stage['dvc']:.2f} s under dvc repro, {stage['flow']:.2f} s in the flow; see {out}")


if __name__ == "__main__":
    main()
