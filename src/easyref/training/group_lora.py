"""The paper's baseline: a LoRA of the plain base UNet tuned on the references of one sample, which then draws without references.

No EasyRef is in that UNet. The loss is that of every training here; the captions of the references leave out what they share, as the
sample's prompt does, so what they share goes into the LoRA (DreamBooth, arXiv 2208.12242, with LoRA, arXiv 2106.09685).

Letters: B batch · C latent channels · h,w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

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
        for request in asked:
            with tuned(pipe, request["references"], request["captions"], p, seed):
                images += pipe(
                    prompt=request["prompt"], num_inference_steps=drawing.steps, guidance_scale=drawing.guidance,
                    generator=torch.Generator().manual_seed(request["seed"]),
                ).images  # fmt: skip
        return images

    return draw


@contextmanager
def tuned(pipe: Any, references: Sequence[Image.Image], captions: Sequence[str], p: GroupLora, seed: int) -> Any:
    """`pipe` with a LoRA trained on the references, merged; without it afterwards, bit for bit."""
    unet, side = pipe.unet, pipe.unet.config.sample_size * pipe.vae_scale_factor
    merged = None
    lora.add(unet, p.rank, float(p.rank), torch_rng(seed, "group_lora"))
    try:
        weights = [layer.weight.requires_grad_() for pair in lora.layers(unet).values() for layer in pair]
        optimizer = torch.optim.AdamW(weights, lr=p.learning_rate, weight_decay=0.0, fused=True)
        pixels_R3HW = torch.stack([_pixels(image, side) for image in references])
        latents_RChw = encode_latents(pipe.vae, lambda items: pixels_R3HW[items], len(references), side, unet.device).to(unet.device)
        encoders = [(pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)]
        text_RLX, pooled_RP = encode_text(encoders, list(captions))
        time_ids_6 = torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=unet.device)
        for step in range(p.steps):
            chosen = [(step * p.batch + i) % len(references) for i in range(p.batch)]
            added = {"text_embeds": pooled_RP[chosen], "time_ids": time_ids_6.expand(p.batch, 6)}
            numbers = [f"group_lora/{step * p.batch + i}" for i in range(p.batch)]
            loss = diffusion_loss(unet, pipe.scheduler, latents_RChw[chosen], text_RLX[chosen], added, seed, numbers)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        merged = lora.merge(unet)
        yield pipe
    finally:
        if merged is not None:
            lora.restore(unet, merged)
        else:
            lora.remove(unet)


def _pixels(image: Image.Image, side: int) -> torch.Tensor:
    """[3, side, side] in [-1, 1]."""
    pixels_HW3 = np.asarray(centre(image.convert("RGB")).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy(pixels_HW3).permute(2, 0, 1) / 127.5 - 1
