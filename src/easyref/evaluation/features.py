"""Lite0's features of real images, each computed once: from the vectors of the stage `embed`, from our own file, else made.

Letters: N images · E feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from easyref.data.embed import read_space
from easyref.data.extractors import Lite0
from easyref.evaluation.generations import Load
from easyref.progress import track
from easyref.records import write_bytes

Array = np.ndarray[Any, np.dtype[Any]]
Known = dict[str, tuple[Array, Array]]  # sha256 -> deep [1280] and shallow [160], float16

BLOCK = 256  # images in memory at once
PROBED = 16  # images whose features are computed to see whether those of `embed` are Lite0's
ROUNDING = 2e-3  # of float16, twice


def real_features(shas: Sequence[str], load: Load, lite0: Lite0, kept: Path, embedded: Path) -> tuple[Array, Array]:
    """deep [N, 1280] and shallow [N, 160] of `shas`, float32. `kept`: our file, first to be asked, so that numbers stay what they were.
    `embedded`: the folder of the stage `embed`, which need not be there."""
    known = _read(kept, lite0)
    before = len(known)
    if any(sha not in known for sha in shas):
        known = _embedded(embedded, shas, load, lite0) | known
    missing = [sha for sha in shas if sha not in known]
    blocks = [missing[i : i + BLOCK] for i in range(0, len(missing), BLOCK)]
    for block in track(blocks, "features of the real images", len(blocks), f"blocks of {BLOCK} images") if blocks else ():
        deep, shallow = (part.astype(np.float16) for part in lite0.both([load(sha) for sha in block]))
        known |= zip(block, zip(deep, shallow, strict=True), strict=True)
    if len(known) > before:
        _write(kept, known, lite0)
    return np.stack([known[sha][0] for sha in shas]).astype(np.float32), np.stack([known[sha][1] for sha in shas]).astype(np.float32)


def _embedded(folder: Path, shas: Sequence[str], load: Load, lite0: Lite0) -> Known:
    """What `embed` has, if that is what `lite0` gives: some presets have another extractor there."""
    with TemporaryDirectory() as scratch:
        rows, deep = read_space(folder, "subject", "image", Path(scratch) / "deep.npy")
        names, shallow = read_space(folder, "style", "image", Path(scratch) / "shallow.npy")
        if rows["sha256"].to_list() != names["sha256"].to_list():
            return {}
        found = dict(zip(rows["sha256"], zip(np.array(deep), np.array(shallow), strict=True), strict=True))
    probed = [sha for sha in shas if sha in found][:PROBED]
    own = lite0.both([load(sha) for sha in probed])
    theirs = [np.array([found[sha][i] for sha in probed], np.float32) for i in (0, 1)]
    same = all(a.shape == b.shape and np.allclose(a, b, ROUNDING, ROUNDING) for a, b in zip(own, theirs, strict=True))
    if probed and not same:
        print(f"{folder}: not {lite0.name}'s vectors; features of the real images are computed")
    return found if probed and same else {}


def _about(lite0: Lite0) -> dict[str, str]:
    return {"extractor": f"{lite0.name} {lite0.size}"}


def _read(path: Path, lite0: Lite0) -> Known:
    from safetensors import safe_open

    if not path.exists():
        return {}
    with safe_open(path, "numpy") as file:
        if file.metadata() != _about(lite0):
            return {}
        names = [row.tobytes().hex() for row in file.get_tensor("sha256")]
        return dict(zip(names, zip(file.get_tensor("deep"), file.get_tensor("shallow"), strict=True), strict=True))


def _write(path: Path, known: Known, lite0: Lite0) -> None:
    from safetensors.numpy import save

    deep, shallow = (np.stack([pair[i] for pair in known.values()]) for i in (0, 1))
    names = np.frombuffer(bytes.fromhex("".join(known)), np.uint8).reshape(len(known), 32)
    write_bytes(path, save({"sha256": names, "deep": deep, "shallow": shallow}, _about(lite0)))
