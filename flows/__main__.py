"""`python -m flows`: the flow without a server left behind, and without the baselines, which take as long as all the rest
(`easyref/full` has them). Asks DVC first, and imports nothing heavy for that.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import yaml

from easyref.evaluation.summary import summary
from flows import PROJECT, released

BASELINES = "mrbench"


def stages(project: Path) -> list[str]:
    """All of dvc.yaml but the baselines."""
    return [name for name in yaml.safe_load((project / "dvc.yaml").read_text())["stages"] if name != BASELINES]


def up_to_date(project: Path) -> bool:
    """Whether `dvc repro` of the stages would run nothing."""
    status = [sys.executable, "-m", "dvc", "status", "--json", *stages(project)]
    done = subprocess.run(status, cwd=project, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == "{}"


def main(project: Path = PROJECT) -> None:
    if up_to_date(project) and released(project):
        print("everything is up to date")
    else:
        from flows.pipeline import easyref

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # Prefect's server of this run ends at exit only
        try:
            easyref(stages(project), project=str(project))
        except Exception as error:  # Prefect has logged where
            raise SystemExit(f"easyref: {error}") from None
    print(summary(project))


if __name__ == "__main__":
    main()
