"""Warm start of the pretraining (ours, not in the paper; `align: null` leaves it out).

A fresh encoder's tokens mean nothing to the UNet, and the diffusion loss takes long to tell: its gradient is mostly noise. So the
tokens are first brought into a language that the UNet can read: T reference tokens regress onto the first T states that the text
encoders give for the whole caption of the target, colours included. No UNet and no noise take part, a fraction of the cost. With
K_ref and V_ref copied from the text's, references then act like a caption nobody had to write. The null reference takes the empty
caption. The pretraining itself goes on from there to what no caption says.

Letters: B batch · T reference tokens · X cross-attention width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from easyref.config import Params
from easyref.data.captions import caption
from easyref.data.dataset import SWAPS
from easyref.data.emoji import color_words
from easyref.training.ahead import ahead
from easyref.training.engine import Engine
from easyref.training.inputs import NULL, Inputs, Sample, Sampler
from easyref.training.trainer import Task, train

WHITE = 250  # of 255, in every channel: the background

PARTS = ("reference_tokens", "final_layer", "projector")


def seen_labels(source: Inputs, sample: Sample) -> dict[str, str]:
    """Labels of the target, its colours as the sample's view shows them."""
    labels = source.images.labels[sample.target]
    if sample.view % len(SWAPS) == 0:
        return labels
    image = source.image(sample.target, sample.view)
    image.putalpha(Image.fromarray(np.uint8(255) * (np.asarray(image).min(2) < WHITE)))
    return {**labels, "colors": " ".join(color_words(image))}


def align(
    params: Params, inputs: Inputs, held_out: Inputs, state: Path, engine: Engine | None = None, allow: Collection[str] = ()
) -> None:
    """Train `PARTS` of the encoder in place. `state` stays: with it the next call is done at once.

    The log beside it holds the share of the held-out captions' variance that the tokens explain, `held_out_explained`.
    """
    p, models = params.align, inputs.models
    assert p is not None
    trained, _ = models.trainable(PARTS)

    sampler = lru_cache(4 * p.batch)(Sampler(inputs.images, p, params.seed, "align"))

    def states(source: Inputs, samples: Iterable[Sample]) -> torch.Tensor:
        """What the tokens should become, [B, T, X]."""
        captions = ["" if s.references == (NULL,) else caption(seen_labels(source, s), hide=()) for s in samples]
        return source.text_states(captions)[0][:, : params.reference.num_tokens].float()

    every = range(0, len(inputs.images.labels), max(1, len(inputs.images.labels) // 512))
    states_NTX = states(inputs, (Sample(i, (i,), "") for i in every))
    norm = models.encoder.projector[-1]
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():  # start at the text states' own place and width
        norm.bias.copy_(states_NTX.mean((0, 1)))
        norm.weight.copy_(states_NTX.std((0, 1)))
    variance = (states_NTX - states_NTX.mean(0)).square().mean()  # over images, at each token

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        samples = [sampler(n) for n in numbers]
        wanted_BTX = states(inputs, samples)
        with models.autocast():
            tokens_BTX = inputs.reference_tokens(samples)
        return (tokens_BTX.float() - wanted_BTX).square().mean() / variance

    def explained() -> dict[str, float]:
        alone = [Sample(i, (i,), "") for i in range(min(128, len(held_out.images.labels)))]
        with torch.no_grad(), models.autocast():
            tokens_NTX = held_out.reference_tokens(alone).float()
        states_NTX = states(held_out, alone)
        error = (tokens_NTX - states_NTX).square().mean()
        share = 1 - (error / (states_NTX - states_NTX.mean(0)).square().mean()).item()
        return {"held_out_explained": share}

    depends = {"stage": "align", "seed": params.seed, "images": inputs.images.content, "base": models.base_hash,
               "reference": params.reference.model_dump(exclude_defaults=True)}  # fmt: skip
    read = partial(ahead, sample=sampler, load=inputs.load, workers=params.loading.workers)
    train(Task("align", [models.encoder], trained, loss, depends, validate=explained, ahead=read), p, state, engine, allow)
