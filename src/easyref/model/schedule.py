"""The noise schedule of a training that asked for another one than its base has (arXiv 2305.08891).

It stands in the checkpoint: what draws with it must start from the same noise, and read the UNet's output as it was trained.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Schedule(BaseModel):
    """What differs from a scheduler of diffusers; None: nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prediction: Literal["epsilon", "v_prediction"] | None = None
    zero_terminal_snr: bool | None = None

    def over(self, before: Schedule) -> Schedule:
        """What is not said here is as `before`."""
        return Schedule(**(before.model_dump() | self.model_dump(exclude_none=True)))

    def of(self, scheduler: Any) -> Any:
        """`scheduler` with this schedule; itself where nothing differs.

        Raises:
            ValueError: no signal without v-prediction, or a scheduler that has no such switch.
        """
        changes: dict[str, Any] = {}
        if self.prediction:
            changes["prediction_type"] = self.prediction
        if self.zero_terminal_snr is not None:
            changes["rescale_betas_zero_snr"] = self.zero_terminal_snr
        has = inspect.signature(type(scheduler).__init__).parameters  # its config may keep what another scheduler had
        if lacking := [key for key in changes if key not in has]:
            raise ValueError(f"{type(scheduler).__name__} has no {lacking[0]}, which the checkpoint needs; use DDIMScheduler")
        if self.zero_terminal_snr:
            changes["timestep_spacing"] = "trailing"  # drawing starts where there is no signal (§3.3)
        if not changes:
            return scheduler
        made = type(scheduler).from_config(scheduler.config, **changes)
        if made.config.get("rescale_betas_zero_snr") and made.config.prediction_type != "v_prediction":
            raise ValueError(
                f"prediction {made.config.prediction_type} does not go with zero terminal SNR: without signal, the noise "
                "says nothing of the image; set prediction: v_prediction, or zero_terminal_snr: false"
            )
        return made


AS_BASE = Schedule()
