"""The diffusion loss (method.md §4) and the encodings it needs, the same for base models and the three stages.

Letters: B batch · L text tokens · C latent channels · h,w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from easyref.seeds import torch_rng


def encode_batch(size: int) -> int:
    """How many images of `size` pixels a side the VAE encodes at once: about four megapixels, 64 images at most."""
    return max(1, min(64, 4 * 1024**2 // size**2))


@torch.no_grad()
def to_latents(vae: Any, x_B3HW: torch.Tensor) -> torch.Tensor:
    """Mean latents [B, C, h, w] of images in [-1, 1], scaled for diffusion; in the precision of the VAE where nothing casts."""
    return vae.encode(x_B3HW).latent_dist.mean * vae.config.scaling_factor


def encode_latents(
    vae: Any, pixels: Callable[[list[int]], torch.Tensor], count: int, size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Mean latents of images 0..count-1, scaled for diffusion: float32 [N, C, h, w] in main memory. `pixels(items)` gives
    [B, 3, H, W] of `size` pixels a side. Always the same batches, so that a resumed run gets the same bits."""
    parts, batch = [], encode_batch(size)
    for start in range(0, count, batch):
        x_B3HW = pixels(list(range(start, min(start + batch, count)))).to(device)
        parts.append(to_latents(vae, x_B3HW).cpu())
    return torch.cat(parts)


def encode_text(encoders: Sequence[tuple], captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text path (method.md §2): penultimate states of both encoders concatenated [B, L, X], pooled output of the
    second [B, P]. `encoders` is [(tokenizer, encoder_1), (tokenizer_2, encoder_2)]."""
    states, pooled = [], torch.empty(0)
    for tokenizer, encoder in encoders:
        ids = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids.to(encoder.device)
        out = encoder(ids, output_hidden_states=True)
        states.append(out.hidden_states[-2])
        pooled = out[0]
    return torch.cat(states, dim=-1), pooled


def noised(scheduler, latents_BChw: torch.Tensor, seed: int, numbers: Sequence[object], offset: float = 0.0):
    """Noise ε and timesteps t ~ U of the images at `numbers`; returns (x_t, t, ε). Both depend on the image number only.

    `offset`: ε gets a constant ~ N(0, offset²) in each channel, so that an image's mean is learned too.
    """
    noise, steps = [], []
    for number in numbers:
        rng = torch_rng(seed, "noise", number)
        steps.append(torch.randint(0, scheduler.config.num_train_timesteps, (1,), generator=rng))
        noise.append(torch.randn(latents_BChw.shape[1:], generator=rng))
        if offset:  # drawn last: the draws above are the same without it
            noise[-1] += offset * torch.randn(len(noise[-1]), 1, 1, generator=rng)
    noise_BChw, t_B = torch.stack(noise).to(latents_BChw), torch.cat(steps).to(latents_BChw.device)
    return scheduler.add_noise(latents_BChw, noise_BChw, t_B), t_B, noise_BChw


def denoised(scheduler, noisy_BChw: torch.Tensor, t_B: torch.Tensor, predicted_BChw: torch.Tensor) -> torch.Tensor:
    """The latents that a prediction, ε or v, amounts to."""
    alpha_B111 = scheduler.alphas_cumprod.to(t_B.device)[t_B].view(-1, 1, 1, 1)
    signal_B111, noise_B111 = alpha_B111.sqrt(), (1 - alpha_B111).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal_B111 * noisy_BChw - noise_B111 * predicted_BChw
    return (noisy_BChw - noise_B111 * predicted_BChw) / signal_B111


def diffusion_loss(
    unet: nn.Module, scheduler, latents_BChw: torch.Tensor, text_BLX: torch.Tensor, added: dict, seed: int,
    numbers: Sequence[object], min_snr: float | None = None, noise_offset: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Mean squared error on what the model predicts by its scheduler: ε (SDXL) or v (arXiv 2202.00512, the nano base). With
    `min_snr` = γ each image is weighted by min(SNR, γ)/SNR, under v by min(SNR, γ)/(SNR + 1) (arXiv 2303.09556, §3.4)."""
    noisy_BChw, t_B, noise_BChw = noised(scheduler, latents_BChw, seed, numbers, noise_offset)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target_BChw = scheduler.get_velocity(latents_BChw, noise_BChw, t_B) if velocity else noise_BChw
    predicted = unet(noisy_BChw, t_B, text_BLX, added_cond_kwargs=added).sample
    error_B = (predicted.float() - target_BChw.float()).square().mean((1, 2, 3))
    if min_snr is not None:
        alpha_B = scheduler.alphas_cumprod.to(t_B.device)[t_B]
        snr_B = alpha_B / (1 - alpha_B)
        error_B = error_B * snr_B.clamp(max=min_snr) / (snr_B + velocity)
    return error_B.mean()
