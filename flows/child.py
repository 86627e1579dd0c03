"""`python flows/child.py PROGRAM ARGUMENT…`: run a program so that it, and all it started, is told to end when the parent is gone.

A flow run that is killed cannot stop its stage. Without this the stage would go on, unseen, beside the one that a new run starts.
"""

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # prctl(2), Linux: signal this process when its parent dies


def main() -> int:
    parent = os.getppid()
    child: subprocess.Popen | None = None

    def end(*_: object) -> None:
        """SIGTERM to all others of the group; this process waits for them."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        if child is None:
            sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            return 128 + signal.SIGTERM
    child = subprocess.Popen(sys.argv[1:])
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
