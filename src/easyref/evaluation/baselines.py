"""What EasyRef is compared with: other ways to make tokens of several references, and a reference itself.

together       EasyRef: the MLLM reads all references at once
average        each reference read alone, the mean of their tokens (how IP-Adapter, arXiv 2308.06721, is given several images)
concatenation  each reference read alone, all their tokens side by side
copy           the first reference, as it is
The LoRA of a group, which trains, is in training/group_lora.py.

Letters: B batch · R references · T tokens of a reading · W packed keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from PIL import Image
from torch import Tensor

from easyref.config import Evaluate
from easyref.evaluation.generations import Generate
from easyref.evaluation.generations import Request as Asked
from easyref.pipeline import EasyRef, Request

#: Keys and values [R, 1, T, W] of single references → those of the sample [1, 1, T', W]. K_ref and V_ref are linear, without bias: the
#: mean of keys and values is that of the mean of the tokens.
JOIN: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda payload_R1TW: payload_R1TW.mean(0, keepdim=True),
    "concatenation": lambda payload_R1TW: payload_R1TW.flatten(0, 2)[None, None],
}


def together(easyref: EasyRef, p: Evaluate) -> Generate:
    def draw(asked: list[Asked]) -> list[Image.Image]:
        return easyref(_requests(asked), p.steps, p.guidance, p.scale)

    return draw


def joined(easyref: EasyRef, p: Evaluate, reading: str) -> Generate:
    """Each reference read alone, under the sample's prompt; their tokens joined by JOIN[reading]."""

    def draw(asked: list[Asked]) -> list[Image.Image]:
        requests = _requests(asked)
        tokens = [JOIN[reading](easyref.encode([[image] for image in r.references], [r.prompt] * len(r.references))) for r in requests]
        images: dict[int, Image.Image] = {}
        order = sorted(range(len(requests)), key=lambda i: tokens[i].shape[2])
        for _, same in groupby(order, key=lambda i: tokens[i].shape[2]):  # a batch has one number of tokens
            chosen = list(same)
            payload_B1TW = torch.cat([tokens[i] for i in chosen])
            images |= zip(chosen, easyref.draw([requests[i] for i in chosen], payload_B1TW, p.steps, p.guidance, p.scale), strict=True)
        return [images[i] for i in range(len(requests))]

    return draw


def copy(asked: list[Asked]) -> list[Image.Image]:
    return [request["references"][0] for request in asked]


def _requests(asked: list[Asked]) -> list[Request]:
    return [Request(a["prompt"], a["references"], a["seed"]) for a in asked]
