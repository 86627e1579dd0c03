"""A schedule of noise in the place of the base's: zero terminal SNR by its paper, and drawings that fit the training."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler

from easyref.model.schedule import AS_BASE, Schedule

SDXL: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VELOCITY = Schedule(prediction="v_prediction", zero_terminal_snr=True)


def test_nothing_asked_is_the_scheduler_itself() -> None:
    scheduler = DDIMScheduler(**SDXL)
    assert AS_BASE.of(scheduler) is scheduler


def test_zero_terminal_snr_is_algorithm_1() -> None:
    """arXiv 2305.08891: sqrt(alpha_bar) shifted so that the last is zero, scaled so that the first stays."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2))
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    found = VELOCITY.of(DDIMScheduler(**SDXL))
    np.testing.assert_allclose(found.alphas_cumprod.numpy(), expected, rtol=2e-4, atol=1e-7)
    assert found.alphas_cumprod[-1] == 0 and found.config.timestep_spacing == "trailing"
    back = Schedule(prediction="epsilon", zero_terminal_snr=False).of(found)
    assert torch.equal(back.alphas_cumprod, DDIMScheduler(**SDXL).alphas_cumprod)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("schedule", [VELOCITY, Schedule(prediction="v_prediction"), Schedule(prediction="epsilon")])
def test_a_perfect_unet_trained_under_the_schedule_draws_the_image(kind: Any, schedule: Schedule) -> None:
    """It knows the image x0 and says what the schedule's training asks for, ε or v; drawing must end at x0."""
    scheduler, x0 = (
        schedule.of(kind(**{k: v for k, v in SDXL.items() if k != "clip_sample" or kind is DDIMScheduler})),
        torch.tensor(0.7),
    )
    scheduler.set_timesteps(20)
    x = torch.tensor(-0.4) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        signal = scheduler.alphas_cumprod[t.long()]
        noise = (seen - signal.sqrt() * x0) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * x0
        x = scheduler.step(velocity if schedule.prediction == "v_prediction" else noise, t, x).prev_sample
    final = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0))  # DDIM's last step stops at the first timestep
    assert abs(x - final.sqrt() * x0) < 0.03 + (1 - final).sqrt()


def test_what_does_not_go_together_is_one_line() -> None:
    with pytest.raises(ValueError, match="prediction epsilon does not go with zero terminal SNR: .* set prediction: v_prediction"):
        Schedule(zero_terminal_snr=True).of(DDIMScheduler(**SDXL))
    with pytest.raises(ValueError, match="LMSDiscreteScheduler has no rescale_betas_zero_snr, .* use DDIMScheduler"):
        VELOCITY.of(LMSDiscreteScheduler())


def test_a_stage_that_says_nothing_keeps_the_schedule_of_the_one_before() -> None:
    assert AS_BASE.over(VELOCITY) == VELOCITY
    assert Schedule(prediction="epsilon", zero_terminal_snr=False).over(VELOCITY) == Schedule(
        prediction="epsilon", zero_terminal_snr=False
    )
