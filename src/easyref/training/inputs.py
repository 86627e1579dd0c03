"""What a training step of the three stages reads: which images and prompt a sample is, and their cached encodings.

Letters: B batch · L text tokens · T reference tokens · D MLLM width · X cross-attention width · N merged image tokens · P pooled
text width · C,h,w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from easyref.config import Samples
from easyref.data.captions import SHARED, caption
from easyref.data.dataset import SWAPS, TrainingImages, centre, seen_as
from easyref.model.reference import ImagePatches, ReferenceSample, null_image
from easyref.seeds import Order, numpy_rng
from easyref.training.loss import encode_text, to_latents
from easyref.training.models import Models

V = TypeVar("V")


@dataclass(frozen=True)
class Sample:
    """One training or validation sample, as indices into the images: -1 stands for the null reference. Target and references are
    seen in the same `view` (data/dataset.py): what they have in common stays, and there are more of them."""

    target: int
    references: tuple[int, ...]
    prompt: str
    view: int = 0


NULL = -1


class Sampler:
    """Image number → sample: the target is its own reference, or the references are the others of its group. All draws come from
    (key, image number)."""

    def __init__(self, images: TrainingImages, p: Samples, *key: object) -> None:
        self.images, self.p, self.key = images, p, key
        self.order = Order(images.weights, *key)
        kinds = sorted({kind for kind, _ in images.groups})
        share = {k: 1 / (len(kinds) * sum(kind == k for kind, _ in images.groups)) for k in kinds}
        self.group_order = Order(np.array([share[kind] for kind, _ in images.groups]), *key, "groups")

    def __call__(self, number: int) -> Sample:
        rng, p = numpy_rng(*self.key, "sample", number), self.p
        if rng.random() < p.group_share:
            kind, members = self.images.groups[self.group_order[number]]
            shuffled = rng.permutation(members).tolist()
            target, references = shuffled[0], shuffled[1 : 1 + p.max_references]
            if len(references) > 2 and rng.random() < p.truncate:
                references = references[: rng.integers(2, len(references))]
        else:
            target = self.order[number]
            kind, references = rng.choice(list(SHARED)), [target]
        labels = self.images.labels[target]
        hidden = {*SHARED.get(str(kind), ()), "colors"} if rng.random() < p.hide_labels else {"colors"}
        prompt = caption(labels, hide=hidden)
        dropped = rng.random()
        if dropped < p.drop_image + p.drop_both:
            references = [NULL]
        if p.drop_image <= dropped < p.drop_image + p.drop_both + p.drop_text:
            prompt = ""
        swapped = rng.random() < p.swap_colours and not labels["tone"]  # skin keeps its colour
        view = (rng.integers(1, len(SWAPS)) if swapped else 0) + (len(SWAPS) if rng.random() < p.mirror else 0)
        return Sample(target, tuple(references), prompt, int(view))


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
        width, height = centre(self.image(0, 0)).size
        self.latent: Cache = Cache(40_000)
        self.text: Cache = Cache(40_000)
        self.patches: Cache = Cache(20_000)
        self.vision: Cache = Cache(20_000)
        self.time_ids_6 = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=models.device)

    def latents(self, samples: list[Sample]) -> torch.Tensor:
        """Mean latents of the targets, scaled for diffusion: [B, C, h, w]."""

        def make(item: int, view: int) -> torch.Tensor:
            image = centre(self.image(item, view))
            x_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
            return to_latents(self.models.vae, x_3HW[None].to(self.models.device))[0]

        return torch.stack([self.latent.get_or((s.target, s.view), partial(make, s.target, s.view)) for s in samples])

    def image(self, item: int, view: int) -> Image.Image:
        return seen_as(self.images.store.image(self.images.sha256s[item]), view)

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
        inputs = [ReferenceSample([self.image_patches(i, s.view) for i in s.references], s.prompt) for s in samples]
        batch = processor.batch(inputs).to(self.models.device)
        if not self.frozen_prefix:
            return encoder(batch)
        with torch.no_grad():
            embeds = [self.image_embeds(item, sample.view) for sample in samples for item in sample.references]
            prefix = encoder.prefix(batch, embeds)
        return encoder(prefix)

    def image_patches(self, item: int, view: int) -> ImagePatches:
        def make() -> ImagePatches:
            return self.models.processor.image(null_image() if item == NULL else self.image(item, view))

        return self.patches.get_or((item, view), make)

    def image_embeds(self, item: int, view: int) -> torch.Tensor:
        """Vision tokens [N, D] of one image by the frozen tower."""

        def make() -> torch.Tensor:
            patches = self.image_patches(item, view)
            return self.models.encoder.vision(patches.pixel_values.to(self.models.device), patches.grid_thw[None])[0]

        return self.vision.get_or((item, view), make)
