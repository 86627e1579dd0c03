"""`easyref bench group`: how long learned grouping takes, in how much memory, and what it finds of groups that were planted.

Half of the vectors are members of planted groups of 2 to 12, the others belong to none. Groups come in topics, as pictures do, and
every second one has a sibling whose members are nearly as close as its own: cosine .72 inside a group, .43 between siblings,
.26 inside a topic. Each number of vectors runs in a process of its own, whose highest resident memory counts (mapped files included).
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from easyref.config import Likeness
from easyref.data.engine import run
from easyref.data.learned import learn_groups, pair_scores
from easyref.data.neighbours import Vectors
from easyref.progress import machine
from easyref.records import write_json

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 512
TOPIC = 2000  # vectors of a topic, about
LIKENESS = Likeness(threshold=0.55, near_duplicate=0.98, neighbours=16, min_members=2, max_members=16)


def plant(count: int, file: Path, seed: int = 0) -> tuple[Vectors, list[list[int]]]:
    """Unit vectors [count, WIDTH] in `file`, in random order, and the rows of each group."""
    rng = np.random.default_rng(seed)
    np.lib.format.open_memmap(file, "w+", np.float16, (count, WIDTH))
    place = rng.permutation(count)
    groups: list[list[int]] = []
    done = 0
    while done < count:
        topic = _unit(rng.standard_normal(WIDTH, np.float32))
        made: list[Array] = []
        room = min(TOPIC, count - done)
        filled, sibling = 0, None
        while filled < room // 2 - 12:
            size = int(rng.integers(2, 13))
            centre = _unit(0.6 * topic + 0.8 * _unit(rng.standard_normal(WIDTH, np.float32)))
            if sibling is not None:
                centre = _unit(0.6 * sibling + 0.8 * _unit(rng.standard_normal(WIDTH, np.float32)))
            sibling = centre if sibling is None else None
            noise = _unit(rng.standard_normal((size, WIDTH), np.float32))
            made.append(_unit(0.85 * centre + math.sqrt(1 - 0.85**2) * noise))
            groups.append(place[done + filled : done + filled + size].tolist())
            filled += size
        made.append(_unit(0.6 * topic + 0.8 * _unit(rng.standard_normal((room - filled, WIDTH), np.float32))))
        np.load(file, mmap_mode="r+")[place[done : done + room]] = np.concatenate(made)  # and let go: it counts as memory
        done += room
    return Vectors(file), groups


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def measure(count: int, workers: int, memory_gib: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        vectors, truth = plant(count, Path(temporary) / "vectors.npy")
        begin = time.monotonic()
        groups, _ = learn_groups(vectors, LIKENESS, Path(temporary), 0, memory_gib, partial(run, workers=workers, threads=True))
        seconds = time.monotonic() - begin
    scores = pair_scores([g.members for g in groups], truth)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"n": count, "seconds": round(seconds, 1), "peak_gib": round(peak, 2), "groups": len(groups), **scores}


def bench_group(counts: list[int], out: Path, workers: int, memory_gib: float) -> dict[str, Any]:
    """Measure each number of vectors and write `out`."""
    runs = []
    for count in counts:
        words = [sys.executable, "-m", "easyref.data.bench", str(count), str(workers), str(memory_gib)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError(f"bench group: {count} vectors ended with exit code {done.returncode}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{count} vectors: {runs[-1]['seconds']} s, {runs[-1]['peak_gib']} GiB, F1 {runs[-1]['f1']:.3f}", flush=True)
    least, most = runs[0], runs[-1]
    growth = math.log(most["seconds"] / least["seconds"]) / math.log(most["n"] / least["n"]) if most["n"] > least["n"] else None
    result = {
        "runs": runs, "exponent": growth, "width": WIDTH, "workers": workers, "memory_gib": memory_gib,
        **machine("numpy", "scipy", "faiss-cpu"),
    }  # fmt: skip
    write_json(out, result)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
