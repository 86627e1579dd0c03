"""What holds for every test."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

os.environ["EASYREF_CACHE"] = tempfile.mkdtemp(prefix="easyref-test-")  # not the user's
atexit.register(shutil.rmtree, os.environ["EASYREF_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate keeps its precision for the whole process; each test begins without one."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
