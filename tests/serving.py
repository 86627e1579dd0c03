"""`easyref ui` and `easyref serve` as processes of their own, on a free port."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "models" / "pretrain"


@contextmanager
def running(verb: str, log: Path, *words: str, **environment: str) -> Iterator[str]:
    """Its address. It must end by itself on Ctrl-C."""
    command = [sys.executable, "-m", "easyref.cli", verb, "--model", str(CHECKPOINT), "--port", "0", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    with open(log, "wb") as err:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address.startswith("http://"), log.read_text()
        yield address
        process.send_signal(signal.SIGINT)
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert process.poll() is not None, "Ctrl-C did not end it"
    finally:
        process.kill()
        process.wait()
