"""`python -m flows`: the flow without a server left behind. Asks DVC first, and imports nothing heavy for that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from easyref.evaluation.summary import summary
from flows import PROJECT


def up_to_date(project: Path) -> bool:
    """Whether `dvc repro` would run nothing."""
    status = [sys.executable, "-m", "dvc", "status", "--json"]
    done = subprocess.run(status, cwd=project, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == "{}"


def main() -> None:
    if up_to_date(PROJECT):
        print("everything is up to date")
    else:
        from flows.pipeline import easyref
        from flows.stages import Locked, StageFailed

        try:
            easyref()
        except (StageFailed, Locked) as error:
            raise SystemExit(f"easyref: {error}") from None
    print(summary(PROJECT))


if __name__ == "__main__":
    main()
