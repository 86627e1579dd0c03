"""Warm start of the pretraining (ours, not in the paper; `align: null` leaves it out).

A fresh encoder's tokens mean nothing to the UNet, and the diffusion loss takes long to tell: its gradient is mostly noise. So the
tokens are first brought into a language that the UNet can read, and made to hold what it has to draw. No UNet and no noise take part.
- T reference tokens regress onto the first T states that the text encoders give for the whole caption of the target, colours included.
  With K_ref and V_ref copied from the text's, references then act like a caption nobody had to write. The null reference takes the
  empty caption.
- One linear map of each token regresses onto its share of the target's latents, a patch as the MLLM's image tokens are, as no caption
  says how a thing looks. This holds for images of concepts never seen, where the captions do not.
The MLLM learns with them: one that was trained on captions alone has forgotten what an image looks like. `pretrain` leaves it as it is.

Letters: B batch · T reference tokens · X cross-attention width · E latent values of a token · C,h,w latents.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from easyref.config import Params
from easyref.data.captions import caption
from easyref.data.dataset import SWAPS
from easyref.data.emoji import color_words
from easyref.data.frames import Framing
from easyref.training.ahead import ahead
from easyref.training.engine import Engine
from easyref.training.inputs import NULL, Inputs, Sample, Sampler
from easyref.training.trainer import Task, train

WHITE = 250  # of 255, in every channel: the background

PARTS = ("reference_tokens", "final_layer", "projector", "vision", "mllm")
STATES = 0.2  # weight of the text states beside the latents: captions are learned by heart, how to look is not
Wanted = tuple[torch.Tensor, torch.Tensor]  # states [B, T, X], latents [B, T, E]


class Readout(nn.Module):
    """tokens_BTX → latents [B, T, E]: one map for all tokens, and a mean for each."""

    def __init__(self, mean_TE: torch.Tensor, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, mean_TE.shape[1], bias=False)
        nn.init.zeros_(self.map.weight)
        self.mean = nn.Parameter(mean_TE.clone())

    def forward(self, tokens_BTX: torch.Tensor) -> torch.Tensor:
        return self.map(tokens_BTX) + self.mean


def dealt(latents_BChw: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The latents in T parts [B, T, E] of a grid as square as T allows, row by row; zeros fill up what the grid does not divide."""
    rows = max(n for n in range(1, math.isqrt(num_tokens) + 1) if num_tokens % n == 0)
    columns = num_tokens // rows
    filled_BChw = F.pad(latents_BChw, (0, -latents_BChw.shape[3] % columns, 0, -latents_BChw.shape[2] % rows))
    parts_BCrhcw = filled_BChw.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return parts_BCrhcw.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


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
    """Train `PARTS` of the encoder in place. `state` stays: with it the next call trains nothing.

    The log beside it holds which share of the variance of held-out captions the tokens explain, `held_out_explained`, and of the
    latents of their images, `held_out_latents`.
    """
    p, models, num_tokens = params.align, inputs.models, params.reference.num_tokens
    assert p is not None
    # Squares, of which every one has as many latents.
    inputs, held_out = (replace(some, frozen_prefix=False, framing=Framing()) for some in (inputs, held_out))
    sampler = lru_cache(4 * p.batch)(Sampler(inputs.images, p, params.seed, "align"))

    def wanted(source: Inputs, samples: Sequence[Sample]) -> Wanted:
        """What the tokens should become [B, T, X], and what they should hold [B, T, E]."""
        captions = ["" if s.references == (NULL,) else caption(seen_labels(source, s), hide=()) for s in samples]
        return source.text_states(captions)[0][:, :num_tokens].float(), dealt(source.latents(samples).float(), num_tokens)

    every = range(0, len(inputs.images.labels), max(1, len(inputs.images.labels) // 512))
    states_NTX, latents_NTE = wanted(inputs, [Sample(i, (i,), "") for i in every])
    readout = Readout(latents_NTE.mean(0), states_NTX.shape[-1]).to(models.device)
    norm = models.encoder.projector[-1]
    assert isinstance(norm, nn.LayerNorm)
    with torch.no_grad():  # start at the text states' own place and width
        norm.bias.copy_(states_NTX.mean((0, 1)))
        norm.weight.copy_(states_NTX.std((0, 1)))

    def errors(source: Inputs, samples: Sequence[Sample], targets: Wanted) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared errors of states and of latents, [B] each."""
        with models.autocast():
            tokens_BTX = source.reference_tokens(samples)
            found_BTE = readout(tokens_BTX)
        states_B, latents_B = (
            (found.float() - want).square().mean((1, 2)) for found, want in zip((tokens_BTX, found_BTE), targets, strict=True)
        )
        return states_B, latents_B

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        samples = [sampler(n) for n in numbers]
        states_B, latents_B = errors(inputs, samples, wanted(inputs, samples))
        shown_B = torch.tensor([s.references != (NULL,) for s in samples], device=latents_B.device)
        return (STATES * states_B / _variance(states_NTX) + latents_B * shown_B / _variance(latents_NTE)).mean()

    def explained() -> dict[str, float]:
        alone = [Sample(i, (i,), "") for i in range(min(128, len(held_out.images.labels)))]
        targets = wanted(held_out, alone)
        with torch.no_grad():
            parts = zip(errors(held_out, alone, targets), targets, strict=True)
            states, latents = (1 - (error_B.mean() / _variance(values_NTE)).item() for error_B, values_NTE in parts)
        return {"held_out_explained": states, "held_out_latents": latents}

    trained, _ = models.trainable(PARTS)
    trained |= {f"readout.{name}": parameter for name, parameter in readout.named_parameters()}
    depends = {"stage": "align", "seed": params.seed, "images": inputs.images.content, "base": models.base_hash,
               "reference": params.reference.model_dump(exclude_defaults=True)}  # fmt: skip
    read = partial(ahead, sample=sampler, load=inputs.load, workers=params.loading.workers)
    modules = [models.encoder, readout]
    train(Task("align", modules, trained, loss, depends, validate=explained, ahead=read), p, state, engine, allow)


def _variance(values_NTE: torch.Tensor) -> torch.Tensor:
    """Over images, at each token."""
    return (values_NTE - values_NTE.mean(0)).square().mean()
