"""Pictures in the course of a training: held-out references, their real target, and what is drawn now, with the weights as they are.

Prompts, seeds and settings are always the same, so that the pictures of one training are a film. Nothing of the training changes.
Letters: T reference tokens · X cross-attention width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easyref.evaluation.grid import KIND, GridRow, draw_grid
from easyref.images import to_png
from easyref.records import remove_folder, write_bytes
from easyref.seeds import torch_rng
from easyref.training.engine import Engine
from easyref.training.inputs import NULL, Inputs, Sample
from easyref.training.trainer import Watcher

A_KIND, STEPS, GUIDANCE = 2, 20, 5.0  # samples of a kind


class Pictures(Watcher):
    """A PNG in `folder` every `every` images; 0: none. They stay until the next training begins.
    Of `samples`, pairs of kind and sample, the first `A_KIND` of each kind are drawn."""

    def __init__(self, folder: Path, every: int, inputs: Inputs, samples: Sequence[tuple[str, Sample]], seed: int) -> None:
        self.folder, self.every, self.inputs, self.seed = folder, every, inputs, seed
        self.chosen = [pair for kind in dict(samples) for pair in [p for p in samples if p[0] == kind][:A_KIND]]

    def pause(self, seen: int, engine: Engine) -> None:
        if not seen and engine.main and self.folder.exists():
            remove_folder(self.folder)
        if self.every and seen % self.every == 0:
            rows = engine.run(self.rows)
            if engine.main:
                write_bytes(self.folder / f"{seen:012}.png", to_png(draw_grid(rows, ("Drawn now",))))

    def rows(self) -> list[GridRow]:
        """By the pipeline of diffusers, with tokens as in training: keys and values are of modules that processes may share."""
        from diffusers import StableDiffusionXLPipeline

        models, rows = self.inputs.models, []
        (tokenizer, encoder), (tokenizer_2, encoder_2) = models.text_encoders
        pipe: Any = StableDiffusionXLPipeline(
            vae=models.vae, text_encoder=encoder, text_encoder_2=encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
            unet=models.unet, scheduler=type(models.scheduler).from_config(models.scheduler.config), add_watermarker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        for i, (kind, sample) in enumerate(self.chosen):
            with models.autocast():
                tokens_2TX = self.inputs.reference_tokens([Sample(sample.target, (NULL,), ""), sample])
                drawn = pipe(
                    sample.prompt, negative_prompt="", ip_adapter_image_embeds=[tokens_2TX[:, None]], num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE, generator=torch_rng(self.seed, "pictures", i),
                ).images  # fmt: skip
            target, *references = (self.inputs.image(item, 0) for item in (sample.target, *sample.references))
            rows.append(GridRow(KIND.get(kind, kind), sample.prompt, references, target, drawn))
        return rows
