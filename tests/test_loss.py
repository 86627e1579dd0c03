"""The diffusion loss against its equations, written out for a model that predicts nothing."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from easyref.training.base import noise_schedule
from easyref.training.loss import diffusion_loss, noised

LATENTS_BChw = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
NUMBERS = list(range(6))


def loss(scheduler: DDIMScheduler, min_snr: float | None) -> float:
    def nothing(noisy_BChw, *_args, **_more):
        return SimpleNamespace(sample=torch.zeros_like(noisy_BChw))

    return diffusion_loss(nothing, scheduler, LATENTS_BChw, torch.empty(0), {}, 0, NUMBERS, min_snr).item()  # type: ignore[arg-type]


@pytest.mark.parametrize("min_snr", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_its_equation(prediction: str, min_snr: float | None) -> None:
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)
    _, t_B, noise_BChw = noised(schedule, LATENTS_BChw, 0, NUMBERS)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    terms = []
    for t, x0, noise in zip(t_B, LATENTS_BChw.double(), noise_BChw.double(), strict=True):
        signal = torch.prod(1 - betas[: t + 1])
        snr = signal / (1 - signal)
        target = signal.sqrt() * noise - (1 - signal).sqrt() * x0 if prediction == "v_prediction" else noise
        divisor = snr if prediction == "epsilon" else snr + 1
        terms.append(target.square().mean() * (1.0 if min_snr is None else min(snr, min_snr) / divisor))
    assert loss(schedule, min_snr) == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_the_nano_schedule_ends_without_signal_and_samples_from_there() -> None:
    schedule = noise_schedule()
    assert schedule.alphas_cumprod[-1] == 0
    schedule.set_timesteps(20)
    assert schedule.timesteps[0] == 999
