"""The diffusion loss against its equations, written out for a model that predicts nothing."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from easyref.seeds import torch_rng
from easyref.training.base import noise_schedule
from easyref.training.loss import denoised, diffusion_loss, noised

LATENTS_BChw = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
NUMBERS = list(range(6))


def says(predicted: torch.Tensor, *_: Any, **__: Any) -> SimpleNamespace:
    return SimpleNamespace(sample=predicted)


def loss(scheduler: DDIMScheduler, min_snr: float | None, offset: float = 0.0, part: slice = slice(None)) -> float:
    model: Any = partial(says, torch.zeros_like(LATENTS_BChw[part]))
    return diffusion_loss(model, scheduler, LATENTS_BChw[part], torch.empty(0), {}, 0, NUMBERS[part], min_snr, offset).item()


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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_prediction_amounts_to_the_latents_that_diffusers_finds(prediction: str) -> None:
    schedule = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False)
    schedule.set_timesteps(1000)
    t_B = torch.tensor([0, 3, 100, 400, 700, 900])
    predicted = torch.randn(LATENTS_BChw.shape, generator=torch.Generator().manual_seed(2))
    found = denoised(schedule, LATENTS_BChw, t_B, predicted)
    wanted = [schedule.step(e, int(t), x).pred_original_sample for e, t, x in zip(predicted, t_B, LATENTS_BChw, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_without_signal_an_image_has_no_weight_under_min_snr_and_its_own_latents_as_target_under_v() -> None:
    """SNR = 0: min(0, γ)/(0 + 1) = 0; and v = -x0."""
    schedule = noise_schedule()
    steps = [torch.randint(0, 1000, (1,), generator=torch_rng(0, "noise", n)).item() for n in range(20_000)]
    last = steps.index(999)
    for min_snr, predicted in ((None, -LATENTS_BChw[:1]), (5.0, torch.ones_like(LATENTS_BChw[:1]))):
        model: Any = partial(says, predicted)
        assert diffusion_loss(model, schedule, LATENTS_BChw[:1], torch.empty(0), {}, 0, [last], min_snr).item() < 1e-9


def test_noise_offset_is_a_constant_of_each_channel_and_changes_no_other_draw() -> None:
    schedule = DDIMScheduler()
    numbers = list(range(4000))
    latents_BChw = torch.zeros(len(numbers), 4, 2, 2)
    _, plain_t, plain = noised(schedule, latents_BChw, 0, numbers)
    noisy, t, noise = noised(schedule, latents_BChw, 0, numbers, 0.1)
    assert torch.equal(t, plain_t)
    shift_BChw = noise - plain
    torch.testing.assert_close(shift_BChw, shift_BChw[..., :1, :1].expand_as(shift_BChw), atol=1e-6, rtol=0)
    shift_BC = shift_BChw[..., 0, 0].double()
    assert shift_BC.std(0) == pytest.approx([0.1] * 4, rel=0.04) and shift_BC.mean(0) == pytest.approx([0] * 4, abs=0.006)
    assert (torch.corrcoef(torch.cat([shift_BC, plain[:, :, 0, 0]], 1).T) - torch.eye(8)).abs().max() < 0.07
    signal = schedule.alphas_cumprod[t, None, None, None]
    torch.testing.assert_close(noisy, (1 - signal).sqrt() * noise)  # of ε as the loss asks for it
    whole = loss(schedule, None, 0.1)
    parts = [loss(schedule, None, 0.1, slice(i, i + 2)) for i in (0, 2, 4)]
    assert whole == pytest.approx(sum(parts) / 3, rel=1e-6) and whole != loss(schedule, None)


def test_the_nano_schedule_ends_without_signal_and_samples_from_there() -> None:
    schedule = noise_schedule()
    assert schedule.alphas_cumprod[-1] == 0
    schedule.set_timesteps(20)
    assert schedule.timesteps[0] == 999
