"""`easyref bench train`: images a second of our trainer and of the plain loop of the published recipe, side by side in one run.

The plain loop is method.md §4 and §8 read literally, on the same modules, samples and noise: in each step it decodes the images, runs
the VAE and both text encoders, the vision tower image by image, transformers' MLLM on a batch padded to its longest sample, and the
last layer on all L + T tokens; nothing is kept. Both train by AdamW, on microbatches of the same size, and come to the same losses.

A pass is one visit of so many samples. Rounds alternate, a pass of ours and one of the plain loop; in the first, nothing is kept yet.
Samples are drawn as the paper has it: a target is its own reference in the first two stages, no swaps, no mirrors. Times are CPU
time of the whole process, which other programs do not lengthen as they do wall time.

Letters: B batch · L context tokens · T reference tokens · D MLLM width · S = L + T.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from easyref.config import Params, Stage
from easyref.data.dataset import TrainingImages
from easyref.model.reference import PrefixStates, ReferenceEncoder, ReferenceInputs, attention_mask, extend_positions, null_image
from easyref.progress import machine, track, use_threads
from easyref.records import write_json
from easyref.training import stages
from easyref.training.inputs import NULL, Inputs
from easyref.training.loss import diffusion_loss, encode_text, to_latents
from easyref.training.trainer import Task, train

#: Samples at once on a GPU of the published training (method.md §4).
PUBLISHED = {"pretrain": 8, "finetune_single": 4, "finetune_multi": 1}


def bench_train(params: Params, data: Path, models_folder: Path, out: Path, images: int, passes: int) -> dict[str, Any]:
    """Measure and write `out`."""
    use_threads(1)
    found: dict[str, Any] = {}
    for name in track(stages.STAGES, "bench: train", len(stages.STAGES), "stages"):
        found[name] = compare(params, name, data, models_folder, images, passes)
    result = {**found, "images": images, "passes": passes, "threads": 1, "clock": "CPU time"}
    result |= machine("torch", "diffusers", "transformers")
    write_json(out, result)
    return result


def compare(params: Params, name: str, data: Path, models_folder: Path, count: int, passes: int) -> dict[str, Any]:
    """Images a second of the three ways over all passes, and of ours in the first and in the last one."""
    p = as_published(getattr(params, name), name, count)
    if count % p.batch:
        raise ValueError(f"--images {count}: no multiple of {name}.batch {p.batch}; give one")
    images = TrainingImages(data)
    images.weights[count:] = 0
    images.groups = images.groups[: max(1, count // 4)]
    ours, plain, small = (Way(params, p, name, models_folder, images) for _ in range(3))
    seconds: dict[str, list[float]] = {"ours": [], "plain_loop": [], "plain_loop_published_microbatch": []}
    with tempfile.TemporaryDirectory() as folder:
        for visit in range(passes):
            until = p.model_copy(update={"images": (visit + 1) * count})
            seconds["ours"].append(_clock(partial(train, ours.task(), until, Path(folder) / "state", allow=["images"])))
            numbers = range(visit * count, (visit + 1) * count)
            seconds["plain_loop"].append(_clock(partial(plain.loop, numbers, p.microbatch)))
            seconds["plain_loop_published_microbatch"].append(_clock(partial(small.loop, numbers, min(PUBLISHED[name], p.microbatch))))
    speed = {way: count * passes / sum(times) for way, times in seconds.items()}
    return {
        "speedup_over_plain_loop": round(speed["ours"] / speed["plain_loop"], 3),
        "speedup_over_published_microbatch": round(speed["ours"] / speed["plain_loop_published_microbatch"], 3),
        "speedup_of_the_first_pass": round(seconds["plain_loop"][0] / seconds["ours"][0], 3),
        "speedup_of_the_last_pass": round(seconds["plain_loop"][-1] / seconds["ours"][-1], 3),
        "images_per_s": {way: round(value, 2) for way, value in speed.items()},
        "microbatch": p.microbatch, "published_microbatch": PUBLISHED[name],
    }  # fmt: skip


def as_published(p: Stage, name: str, count: int) -> Stage:
    """Samples as the paper draws them, at a constant rate; the batch stays."""
    multi = name == "finetune_multi"
    return p.model_copy(
        update={
            "group_share": float(multi), "max_references": p.max_references if multi else 1, "swap_colours": 0.0, "mirror": 0.0,
            "hide_labels": 0.0, "warmup_images": 0, "cooldown_images": 0, "ema_images": 0, "save_images": count, "cache_prefix": True,
        }
    )  # fmt: skip


def _clock(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


class Way:
    """A stage as it starts, to be trained in one way or the other."""

    def __init__(self, params: Params, p: Stage, name: str, models_folder: Path, images: TrainingImages) -> None:
        trains = stages.parts(name, p)
        self.frozen = stages.frozen_prefix(trains)
        self.models, _ = stages.start_models(params, name, models_folder, None)
        self.trained, _ = self.models.trainable(trains)
        inputs = Inputs(self.models, images, self.frozen, cache_prefix=p.cache_prefix)
        self.stream = stages.stream(params.model_copy(update={name: p}), name, self.models, inputs)

    def task(self) -> Task:
        """For our trainer."""
        return self.stream.task(self.trained, {}, workers=0)

    def loop(self, numbers: range, microbatch: int) -> list[float]:
        """The plain loop; losses of its updates."""
        optimizer = torch.optim.AdamW(self.trained.values(), lr=self.stream.p.learning_rate, weight_decay=self.stream.p.weight_decay)
        losses = []
        for update in range(numbers.start, numbers.stop, self.stream.p.batch):
            total = 0.0
            for start in range(update, update + self.stream.p.batch, microbatch):
                loss = self.plain_loss(range(start, start + microbatch)) * (microbatch / self.stream.p.batch)
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return losses

    def plain_loss(self, numbers: Sequence[int]) -> Tensor:
        m, stream, samples = self.models, self.stream, [self.stream.sample(n) for n in numbers]
        prompts = [sample.prompt for sample in samples]
        targets = [self.image(sample.target) for sample in samples]
        x_B3HW = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in targets])
        latents_BChw = to_latents(m.vae, x_B3HW)
        with torch.no_grad():
            text_BLX, pooled_BP = encode_text(m.text_encoders, prompts)
        inputs = m.processor([[self.image(i) for i in sample.references] for sample in samples], prompts)
        with torch.set_grad_enabled(not self.frozen):
            patches = inputs.pixel_values.split(inputs.image_grid_thw.prod(-1).tolist())
            vision = [m.encoder.vision(p, grid[None])[0] for p, grid in zip(patches, inputs.image_grid_thw, strict=True)]
            prefix = padded_prefix(m.encoder, inputs, vision)
        tokens_BTX = whole_last_layer(m.encoder, prefix)
        height, width = x_B3HW.shape[2:]
        time_ids_B6 = torch.tensor([[height, width, 0, 0, height, width]] * len(samples), dtype=torch.float32)
        added = {"text_embeds": pooled_BP, "time_ids": time_ids_B6, "image_embeds": [tokens_BTX[:, None]]}
        keys = [f"{stream.name}/{n}" for n in numbers]
        return diffusion_loss(m.unet, m.scheduler, latents_BChw, text_BLX, added, stream.seed, keys, stream.p.min_snr)

    def image(self, item: int) -> Any:
        return null_image() if item == NULL else self.stream.inputs.image(item, 0)


def padded_prefix(encoder: ReferenceEncoder, inputs: ReferenceInputs, vision: Sequence[Tensor]) -> PrefixStates:
    """The prefix by transformers' own call, with a mask over the padding."""
    core: Any = encoder.mllm
    is_image_BL1 = (inputs.mm_token_type_ids_BL == 1)[..., None]
    embeds_BLD = core.language_model.embed_tokens(inputs.input_ids_BL).masked_scatter(is_image_BL1, torch.cat(list(vision)))
    positions_3BL, _ = core.get_rope_index(
        inputs.input_ids_BL, inputs.mm_token_type_ids_BL, image_grid_thw=inputs.image_grid_thw, attention_mask=inputs.mask_BL
    )
    lm = core.language_model
    states_BLD = lm(inputs_embeds=embeds_BLD, attention_mask=inputs.mask_BL, position_ids=positions_3BL, use_cache=False)
    return PrefixStates(states_BLD.last_hidden_state, inputs.mask_BL, positions_3BL)


def whole_last_layer(encoder: ReferenceEncoder, prefix: PrefixStates) -> Tensor:
    """tokens_BTX by transformers' own layer on all S tokens, of which the last T are used."""
    tokens_BTD = encoder.reference_tokens.expand(len(prefix.states_BLD), -1, -1)
    all_BSD = torch.cat([prefix.states_BLD, tokens_BTD], dim=1)
    context, count = prefix.mask_BL.shape[1], encoder.config.num_tokens
    mask_B1TS = attention_mask(prefix.mask_BL, count, encoder.config.final_layer_attention == "causal")
    mask_B1LS = F.pad(torch.ones(context, context, dtype=torch.bool).tril(), (0, count)).expand(len(all_BSD), 1, -1, -1)
    mask_B1SS = torch.cat([mask_B1LS, mask_B1TS], dim=2)
    cos_sin = encoder.rotary(all_BSD, extend_positions(prefix, count))
    out: Any = encoder.final_layer(all_BSD, attention_mask=mask_B1SS, position_embeddings=cos_sin)
    out_BSD = out[0] if isinstance(out, tuple) else out
    return encoder.projector(encoder.norm(out_BSD[:, -count:]))
