"""The paper's baseline: a LoRA of the plain base UNet tuned on the references of one sample, which then draws without references.

No EasyRef is in that UNet. The loss is that of every training here; the captions of the references leave out what they share, as the
sample's prompt does, so what they share goes into the LoRA (DreamBooth, arXiv 2208.12242, with LoRA, arXiv 2106.09685).
Samples are tuned side by side, each with its own LoRA, gradients and optimizer values: one UNet call serves all of them.

Letters: S samples · K images of each in a batch, which is ordered [K, S] · N positions · I,O widths of a projection · r rank
· R references · L text tokens · C latent channels · h,w latent size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from easyref.config import Evaluate, GroupLora
from easyref.data.dataset import centre
from easyref.model import lora
from easyref.seeds import torch_rng
from easyref.training.loss import diffusion_loss, encode_latents, encode_text


def group_lora(pipe: Any, p: GroupLora, drawing: Evaluate, seed: int) -> Any:
    """A `Generate` (evaluation/generations.py) that tunes anew for every request. `pipe`: the base pipeline, whose UNet it uses."""
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False)

    def draw(asked: list[dict[str, Any]]) -> list[Image.Image]:
        images = []
        for start in range(0, len(asked), p.together):
            part = asked[start : start + p.together]
            with tuned(pipe, [r["references"] for r in part], [r["captions"] for r in part], p, seed), torch.no_grad():
                images += pipe(
                    prompt=[r["prompt"] for r in part], num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                    generator=[torch.Generator().manual_seed(r["seed"]) for r in part],
                ).images  # fmt: skip
        return images

    return draw


@contextmanager
def tuned(
    pipe: Any, references: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]], p: GroupLora, seed: int
) -> Iterator[None]:
    """`pipe` draws each of S prompts under a LoRA trained on the references of that sample; afterwards without, bit for bit."""
    unet, side, counts = pipe.unet, pipe.unet.config.sample_size * pipe.vae_scale_factor, [len(images) for images in references]
    first = np.cumsum([0, *counts[:-1]])  # references of all samples, end to end
    pixels_R3HW = torch.stack([_pixels(image, side) for images in references for image in images])
    latents_RChw = encode_latents(pipe.vae, lambda items: pixels_R3HW[items].to(pipe.vae.dtype), sum(counts), side, unet.device)
    latents_RChw = latents_RChw.float().to(unet.device)
    encoders = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
    text_RLX, pooled_RP = encode_text(encoders, [caption for own in captions for caption in own])
    time_ids_6 = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=unet.device)
    with side_by_side(unet, len(references), p.rank, torch_rng(seed, "group_lora")) as weights:
        optimizer = torch.optim.AdamW(weights, lr=p.learning_rate, weight_decay=0.0, fused=True)
        for step in range(p.steps):
            turns = range(step * p.batch, (step + 1) * p.batch)
            chosen = [start + turn % count for turn in turns for start, count in zip(first, counts, strict=True)]
            added = {"text_embeds": pooled_RP[chosen], "time_ids": time_ids_6.expand(len(chosen), 6)}
            numbers = [f"group_lora/{turn}" for turn in turns for _ in counts]
            with torch.autocast(unet.device.type, torch.bfloat16, enabled=unet.dtype == torch.bfloat16):
                loss = diffusion_loss(unet, pipe.scheduler, latents_RChw[chosen], text_RLX[chosen], added, seed, numbers)
            (loss * len(counts)).backward()  # the sum over the samples of each one's mean
            clip(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield


@contextmanager
def side_by_side(unet: nn.Module, samples: int, rank: int, generator: torch.Generator) -> Iterator[list[nn.Parameter]]:
    """LoRAs of scale 1 on what `lora` wraps, one for each of `samples`, all from the same start: [S, I, r] and [S, r, O] by projection.
    Items of the UNet's batch are ordered [K, S]. peft keeps its adapters apart, one call after the other."""
    weights, hooks = list[nn.Parameter](), []
    for name, module in unet.named_modules():
        if re.fullmatch(lora.TARGETS, name):
            assert isinstance(module, nn.Linear), name
            bound = module.in_features**-0.5
            down_rI = torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator)
            down = nn.Parameter(down_rI.T.repeat(samples, 1, 1).to(module.weight.device))
            up = nn.Parameter(torch.zeros(samples, rank, module.out_features, device=module.weight.device))
            weights += [down, up]
            hooks.append(module.register_forward_hook(_adding(down, up)))
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _adding(down_SIr: Tensor, up_SrO: Tensor) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor], y_BNO: Tensor) -> Tensor:
        x_KSNI = inputs[0].unflatten(0, (-1, len(down_SIr))).to(down_SIr.dtype)
        return y_BNO + (x_KSNI @ down_SIr @ up_SrO).flatten(0, 1).to(y_BNO.dtype)

    return hook


def clip(weights: Sequence[nn.Parameter], most: float) -> None:
    """torch.nn.utils.clip_grad_norm_ for each sample by itself."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    norm_S = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
    factor_S11 = (most / (norm_S + 1e-6)).clamp(max=1.0)[:, None, None]
    for grad in grads:
        grad.mul_(factor_S11)


def _pixels(image: Image.Image, side: int) -> torch.Tensor:
    """[3, side, side] in [-1, 1]."""
    pixels_HW3 = np.asarray(centre(image.convert("RGB")).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1) / 127.5 - 1
