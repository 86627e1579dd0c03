"""Warm start of the pretraining (ours, not in the paper; `align: null` leaves it out).

A fresh encoder's tokens mean nothing to the UNet, and the diffusion loss takes long to tell: its gradient is mostly noise. So the
tokens are first brought into a language that the UNet can read: T reference tokens regress onto the first T states that the text
encoders give for the whole caption of the target, colours included. No UNet and no noise take part, a fraction of the cost. With
K_ref and V_ref copied from the text's, references then act like a caption nobody had to write. The null reference takes the empty
caption. The pretraining itself goes on from there to what no caption says.

Letters: B batch · T reference tokens · X cross-attention width.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from torch import nn

from easyref.config import Params
from easyref.data.captions import caption
from easyref.seeds import numpy_rng
from easyref.training.inputs import NULL, Inputs, Sample, Sampler, Source
from easyref.training.trainer import Task, train

PARTS = ("reference_tokens", "final_layer", "projector")


def align(params: Params, inputs: Inputs, held_out: Inputs, state: Path) -> None:
    """Train `PARTS` of the encoder in place. `state` stays: with it the next call is done at once.

    The log beside it holds the share of the held-out captions' variance that the tokens explain, `held_out_explained`.
    """
    p, models = params.align, inputs.models
    assert p is not None
    trained, _ = models.trainable(PARTS)

    drawn = {source: Sampler(inputs.images, source, p, params.seed, "align", source) for source in get_args(Source)}

    def sample(number: int) -> Sample:
        group = numpy_rng(params.seed, "align", "source", number).random() < p.group_share
        return drawn["group" if group else "self"](number)

    def states(source: Inputs, items: list[int]) -> torch.Tensor:
        """What the tokens should become, [B, T, X]."""
        captions = ["" if i == NULL else caption(source.images.labels[i], hide=()) for i in items]
        return source.text_states(captions)[0][:, : params.reference.num_tokens].float()

    every = range(0, len(inputs.images.labels), max(1, len(inputs.images.labels) // 512))
    states_NTX = states(inputs, list(every))
    norm = models.encoder.projector[-1]
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():  # start at the text states' own place and width
        norm.bias.copy_(states_NTX.mean((0, 1)))
        norm.weight.copy_(states_NTX.std((0, 1)))
    variance = (states_NTX - states_NTX.mean(0)).square().mean()  # over images, at each token

    def loss(numbers: range) -> torch.Tensor:
        samples = [sample(n) for n in numbers]
        wanted_BTX = states(inputs, [NULL if s.references == (NULL,) else s.target for s in samples])
        with models.autocast():
            tokens_BTX = inputs.reference_tokens(samples)
        return (tokens_BTX.float() - wanted_BTX).square().mean() / variance

    def explained() -> dict[str, float]:
        items = list(range(min(128, len(held_out.images.labels))))
        with torch.no_grad(), models.autocast():
            tokens_NTX = held_out.reference_tokens([Sample(i, (i,), "") for i in items]).float()
        states_NTX = states(held_out, items)
        error = (tokens_NTX - states_NTX).square().mean()
        share = 1 - (error / (states_NTX - states_NTX.mean(0)).square().mean()).item()
        print(f"align: tokens explain {share:.3f} of the variance of held-out captions")
        return {"held_out_explained": share}

    fingerprint = {"stage": "align", "seed": params.seed, "images": inputs.images.content, "base": models.base_hash,
                   "params": p.model_dump(), "reference": params.reference.model_dump()}  # fmt: skip
    train(Task("align", trained, loss, fingerprint, validate=explained), p, state)
