"""What a training leaves when its loss or gradient is not a number: the images of the update at fault, to look at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from easyref.records import atomic_path, write_json

#: Number of an image → facts, and tensors by name.
Describe = Callable[[int], tuple[dict[str, Any], dict[str, Tensor]]]
Loss = Callable[[Sequence[int]], Tensor]


def save_broken(
    path: Path, seen: int, parts: Sequence[tuple[Sequence[int], float]], loss: Loss | None, describe: Describe | None
) -> str:
    """Write `path`, JSON with a row for each image of the microbatches whose loss is not finite, and what they were made of beside it.

    If all `parts` have a finite loss it is the gradient, and all images count. `loss` of a single image, where it can be asked. Returns
    what is wrong, in words.
    """
    broken = [(numbers, value) for numbers, value in parts if not math.isfinite(value)]
    numbers = [n for part, _ in broken or parts for n in part]
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number in numbers:
        fact, made = describe(number) if describe else ({}, {})
        rows.append({"number": number, **fact})
        tensors |= made
        if loss:
            with torch.no_grad():
                rows[-1]["loss"] = loss([number]).item()
    wrong = [row["number"] for row in rows if not math.isfinite(row.get("loss", 0.0))]
    what = "loss is not finite" if broken else "gradient is not finite"
    values = [{k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()} for row in rows]
    write_json(path, {"update_at": seen, "what": what, "images": values})
    if tensors:
        with atomic_path(path.with_suffix(".safetensors")) as file:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
    return f"{what} in the update at image {seen}, from images {_few(wrong or numbers)}, which are in {path}"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")
