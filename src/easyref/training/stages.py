"""The three stages of EasyRef (method.md §4) as a table, and the one function that runs any of them.

Stages differ by data: what is trained, where a sample comes from, which checkpoint they start from.
Letters: B batch · L text tokens · T reference tokens · X cross-attention width · C,h,w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from easyref.config import Params, Stage
from easyref.data.captions import SHARED, caption
from easyref.data.dataset import TrainingImages
from easyref.model import weights
from easyref.model.reference import ImagePatches, ReferenceSample, null_image
from easyref.progress import use_threads
from easyref.records import read_table, sha256_file
from easyref.seeds import Order, numpy_rng
from easyref.training.curves import write_curves
from easyref.training.loss import diffusion_loss, encode_latents, encode_text
from easyref.training.models import Models, load_models
from easyref.training.trainer import Task, train

V = TypeVar("V")


@dataclass(frozen=True)
class Spec:
    trains: tuple[str, ...]  # names of ReferenceEncoder.parts() and Adapter.parts()
    sample: Literal["self", "group"]  # the target is its own reference | the others of its group are
    starts_from: str | None


ALIGNMENT = ("final_layer", "reference_tokens", "projector", "reference_kv")
STAGES = {
    "pretrain": Spec(ALIGNMENT, "self", None),
    "finetune_single": Spec((*ALIGNMENT, "mllm", "lora"), "self", "pretrain"),
    "finetune_multi": Spec((*ALIGNMENT, "mllm", "lora"), "group", "finetune_single"),
}
#: Parts that start from nothing or from a copy, and may learn faster (`new_part_rate`).
NEW_PARTS = ("reference_tokens", "projector", "reference_kv")


@dataclass(frozen=True)
class Sample:
    """One training or validation sample, as indices into the images: -1 stands for the null reference."""

    target: int
    references: tuple[int, ...]
    prompt: str


NULL = -1


class Sampler:
    """Image number → sample. All draws come from (seed, stage, image number)."""

    def __init__(self, images: TrainingImages, spec: Spec, p: Stage, *key: object) -> None:
        self.images, self.spec, self.p, self.key = images, spec, p, key
        self.order = Order(images.weights, *key)
        kinds = sorted({kind for kind, _ in images.groups})
        share = {k: 1 / (len(kinds) * sum(kind == k for kind, _ in images.groups)) for k in kinds}
        self.group_order = Order(np.array([share[kind] for kind, _ in images.groups]), *key, "groups")

    def __call__(self, number: int) -> Sample:
        rng, p = numpy_rng(*self.key, "sample", number), self.p
        if self.spec.sample == "group":
            kind, members = self.images.groups[self.group_order[number]]
            shuffled = rng.permutation(members).tolist()
            target, references = shuffled[0], shuffled[1 : 1 + p.max_references]
            if len(references) > 2 and rng.random() < p.truncate:
                references = references[: rng.integers(2, len(references))]
        else:
            target = self.order[number]
            kind, references = rng.choice(list(SHARED)), [target]
        hidden = {*SHARED[str(kind)], "colors"} if rng.random() < p.hide_labels else {"colors"}
        prompt = caption(self.images.labels[target], hide=hidden)
        dropped = rng.random()
        if dropped < p.drop_image + p.drop_both:
            references = [NULL]
        if p.drop_image <= dropped < p.drop_image + p.drop_both + p.drop_text:
            prompt = ""
        return Sample(target, tuple(references), prompt)


class Cache(dict[Hashable, Any]):
    """Remember results, at most `most` of them (the oldest go). Each result is computed alone, never in a batch, so a hit
    and a miss give the same bits and a resumed run does not depend on what had been cached."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def get_or(self, key: Hashable, make: Callable[[], V]) -> V:
        if key not in self:
            if len(self) >= self.most:
                del self[next(iter(self))]
            self[key] = make()
        return self[key]


class Inputs:
    """Cached encodings of images and prompts on the model's device: latents, text states, patches and vision tokens."""

    def __init__(self, models: Models, images: TrainingImages, frozen_prefix: bool) -> None:
        self.models, self.images, self.frozen_prefix = models, images, frozen_prefix
        height, width = images.pixels.shape[1:3]
        self.latents_NChw = encode_latents(models.vae, images.batch, len(images.sha256s), max(height, width), models.device)
        self.text: Cache = Cache(40_000)
        self.patches: Cache = Cache(20_000)
        self.vision: Cache = Cache(20_000)
        self.time_ids_6 = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=models.device)

    def text_states(self, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Text states [B, L, X] and SDXL's added conditions of the prompts."""

        def make(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                text, pooled = encode_text(self.models.text_encoders, [prompt])
            return text[0], pooled[0]

        found = [self.text.get_or(prompt, partial(make, prompt)) for prompt in prompts]
        text_BLX, pooled_BP = (torch.stack(list(x)) for x in zip(*found, strict=True))
        return text_BLX, {"text_embeds": pooled_BP, "time_ids": self.time_ids_6.expand(len(prompts), 6)}

    def reference_tokens(self, samples: list[Sample]) -> torch.Tensor:
        """tokens_BTX of the samples, with gradients to whatever is trained."""
        encoder, processor = self.models.encoder, self.models.processor
        inputs = [ReferenceSample([self.image_patches(i) for i in s.references], s.prompt) for s in samples]
        batch = processor.batch(inputs).to(self.models.device)
        if not self.frozen_prefix:
            return encoder(batch)
        with torch.no_grad():
            embeds = [self.image_embeds(item) for sample in samples for item in sample.references]
            prefix = encoder.prefix(batch, embeds)
        return encoder(prefix)

    def image_patches(self, item: int) -> ImagePatches:
        def make() -> ImagePatches:
            return self.models.processor.image(null_image() if item == NULL else self.images.store.image(self.images.sha256s[item]))

        return self.patches.get_or(item, make)

    def image_embeds(self, item: int) -> torch.Tensor:
        """Vision tokens [N, D] of one image by the frozen tower."""

        def make() -> torch.Tensor:
            patches = self.image_patches(item)
            return self.models.encoder.vision(patches.pixel_values.to(self.models.device), patches.grid_thw[None])[0]

        return self.vision.get_or(item, make)


def run_stage(params: Params, name: str, data: Path, models_folder: Path, out: Path, curves: Path, work: Path) -> None:
    """Run one stage of the table and write its checkpoint folder `out` and its training `curves`. A killed run goes on from its
    state in `work`; the state of a finished one is removed, so that the next call trains again."""
    spec, p = STAGES[name], getattr(params, name)
    print(use_threads(params.threads))
    models = load_models(params, models_folder, p.lora_rank or None, p.precision)
    if spec.starts_from:
        weights.load(models_folder / spec.starts_from, models.encoder, models.adapter, fresh_lora=True)
    trained, factors = _trainable(models, spec, p)
    print(f"{name}: trains {sum(t.numel() for t in trained.values()):,} parameters of {', '.join(spec.trains)}")
    images = TrainingImages(data)
    inputs = Inputs(models, images, frozen_prefix="mllm" not in spec.trains)
    sampler = Sampler(images, spec, p, params.seed, name)

    def loss(numbers: range) -> torch.Tensor:
        samples = [sampler(n) for n in numbers]
        return _loss(models, inputs, samples, params.seed, [f"{name}/{n}" for n in numbers], p.min_snr)

    start = sha256_file(models_folder / spec.starts_from / weights.WEIGHTS) if spec.starts_from else models.base_hash
    fingerprint = {"stage": name, "seed": params.seed, "images": images.content, "start": start, **_stage_values(params, name)}
    validate = Validation(params, models, data)
    task = Task(name, trained, loss, fingerprint, factors, validate)
    state = work / f"{name}.safetensors"
    result = train(task, p, state)
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(result[key])
    tensors = weights.tensors(models.encoder, models.adapter, with_mllm="mllm" in spec.trains)
    weights.save(out, tensors, models.checkpoint_config(params, p, "mllm" in spec.trains), torch.float32)
    write_curves(state.with_suffix(".jsonl"), curves)
    state.unlink()


def _stage_values(params: Params, name: str) -> dict[str, Any]:
    return {"params": getattr(params, name).model_dump(), "reference": params.reference.model_dump()}


def _trainable(models: Models, spec: Spec, p: Stage) -> tuple[dict[str, torch.nn.Parameter], dict[str, float]]:
    """Parameters of the stage by checkpoint name, with their learning-rate factors; everything else is frozen."""
    parts = {**models.encoder.parts(), **models.adapter.parts()}
    names = {t: n for n, t in models.named_parameters().items()}
    for tensors in parts.values():
        for tensor in tensors:
            tensor.requires_grad_(False)
    trained, factors = {}, {}
    for part in spec.trains:
        for tensor in parts[part]:
            tensor.requires_grad_(True)
            trained[names[tensor]] = tensor
            factors[names[tensor]] = p.new_part_rate if part in NEW_PARTS else 1.0
    return trained, factors


def _loss(models: Models, inputs: Inputs, samples: list[Sample], seed: int, numbers: list[str], min_snr: float | None) -> torch.Tensor:
    """Mean ε-error of the targets under their references and prompts (method.md §4)."""
    with models.autocast():
        text_BLX, added = inputs.text_states([s.prompt for s in samples])
        tokens_BTX = inputs.reference_tokens(samples)
        conditions = {**added, "image_embeds": [tokens_BTX[:, None]]}
        latents_BChw = inputs.latents_NChw[[s.target for s in samples]].to(models.device)
        return diffusion_loss(models.unet, models.scheduler, latents_BChw, text_BLX, conditions, seed, numbers, min_snr)


class Validation:
    """Loss on the held-out samples at fixed noise and timesteps, with the right references, those of the next sample of the
    same kind, and the null reference: the cheapest early signal that references are used (right < shuffled < none)."""

    def __init__(self, params: Params, models: Models, data: Path) -> None:
        self.params, self.models = params, models
        table = read_table(data / "split" / "samples.parquet").filter(split="held_out").sort("kind", "sample_id")
        rows = list(table.iter_rows(named=True))
        self.images = TrainingImages(data, sorted({s for r in rows for s in (r["target"], *r["references"])}))
        place = {s: i for i, s in enumerate(self.images.sha256s)}
        refs = [tuple(place[s] for s in r["references"]) for r in rows]
        targets = [place[r["target"]] for r in rows]
        conditions: dict[str, list[tuple[int, ...]]] = {
            "right": refs,
            "shuffled": _shifted(refs, [r["kind"] for r in rows]),
            "none": [(NULL,)] * len(rows),
        }
        self.samples = {
            name: [Sample(t, r, row["prompt"]) for t, r, row in zip(targets, chosen, rows, strict=True)]
            for name, chosen in conditions.items()
        }

        self.inputs = Inputs(models, self.images, frozen_prefix=False)  # once: neither latents nor patches change in training

    def __call__(self) -> dict[str, float]:
        result = {}
        for name, samples in self.samples.items():
            losses = []
            for start in range(0, len(samples), 32):
                part = samples[start : start + 32]
                numbers = [f"validation/{start + i}" for i in range(len(part))]
                with torch.no_grad():
                    losses.append(_loss(self.models, self.inputs, part, self.params.seed, numbers, None).item() * len(part))
            result[f"held_out_{name}"] = sum(losses) / len(samples)
        print(" · ".join(f"{k} {v:.5f}" for k, v in result.items()))
        return result


def _shifted(references: list[tuple[int, ...]], kinds: list[str]) -> list[tuple[int, ...]]:
    """References moved on by about half the samples within each kind."""
    out = list(references)
    for kind in set(kinds):
        places = [i for i, k in enumerate(kinds) if k == kind]
        for a, b in zip(places, np.roll(places, len(places) // 2), strict=True):
            out[a] = references[b]
    return out
