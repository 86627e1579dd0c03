"""Build programs: a checkpoint → ONNX graphs that are verified against torch. `python -m export --help`."""

import sys
from collections.abc import Callable


def start(name: str, command: Callable[..., None]) -> None:
    """Run a typer command; a wrong input is one line on stderr and exit code 2."""
    import typer

    try:
        typer.run(command)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
