"""What a training step of the three stages reads: which images and prompt a sample is, and their encodings, which are kept.

Letters: B batch · L text tokens, and those of the MLLM · T reference tokens · D MLLM width · X cross-attention width · N merged image
tokens · P pooled text width · C,h,w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from easyref import images
from easyref.cache import made_here
from easyref.config import Loading, Samples
from easyref.data import dataset, frames
from easyref.data.captions import SHARED, caption, invented, is_caption
from easyref.data.dataset import SWAPS, TrainingImages, seen_as
from easyref.data.frames import Frame, Framing, Size, face_frame
from easyref.model import reference
from easyref.model.reference import ImagePatches, PrefixStates, ReferenceSample, null_image
from easyref.records import sha256_file, sha256_json
from easyref.seeds import Order, numpy_rng
from easyref.training import loss
from easyref.training.loss import encode_text, to_latents
from easyref.training.models import Models
from easyref.training.store import Disk, Encoding, Store


@dataclass(frozen=True)
class Sample:
    """One training or validation sample, as indices into the images: -1 stands for the null reference. Target and references are
    seen in the same `view` (data/dataset.py): what they have in common stays, and there are more of them."""

    target: int
    references: tuple[int, ...]
    prompt: str
    view: int = 0
    place: float = 0.5  # of the target's square along its longer side
    face: Seen | None = None  # the reference, where it is only the face of the target


@dataclass(frozen=True)
class Seen:
    """An image as a sample has it: its number, view, and the part of it, None: all."""

    item: int
    view: int = 0
    frame: Frame | None = None


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
        if p.group_share and not images.groups:
            fix = "make some by `easyref group` and `easyref split`, or set group_share to 0"
            raise ValueError(f"{key[-1]}.group_share {p.group_share}: the training images have no group; {fix}")
        if p.face_share and not images.faces:
            fix = "set embed.faces and run embed, group and split again, or set face_share to 0"
            raise ValueError(f"{key[-1]}.face_share {p.face_share}: no face is known in the training images; {fix}")

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
        prompt = caption(self._invented(number, labels), hide=hidden)
        dropped = rng.random()
        if dropped < p.drop_image + p.drop_both:
            references = [NULL]
        if p.drop_image <= dropped < p.drop_image + p.drop_both + p.drop_text:
            prompt = ""
        swapped = rng.random() < p.swap_colours and not labels["tone"]  # skin keeps its colour
        view = (rng.integers(1, len(SWAPS)) if swapped else 0) + (len(SWAPS) if rng.random() < p.mirror else 0)
        place = int(rng.integers(p.crops)) / (p.crops - 1) if p.crops > 1 else 0.5
        face = self._face(number, target, int(view)) if references == [target] and target in self.images.faces else None
        return Sample(target, tuple(references), prompt, int(view), place, face)

    def _invented(self, number: int, labels: Mapping[str, str]) -> Mapping[str, str]:
        """With a probability of `invent_words`: a subject nobody has heard of, of which only the references can tell. A caption is one
        whole and has no subject."""
        rng = numpy_rng(*self.key, "words", number)
        if rng.random() >= self.p.invent_words or is_caption(labels):
            return labels
        other = self.images.labels[rng.integers(len(self.images.labels))]
        return {**labels, "subject": invented(labels["subject"], other["subject"])}

    def _face(self, number: int, target: int, view: int) -> Seen | None:
        """With a probability of `face_share`: the square around the face, grown by 0 to 49 %, mirrored or not (method.md §4)."""
        rng, label = numpy_rng(*self.key, "face", number), self.images.labels[target]
        if rng.random() >= self.p.face_share:
            return None
        grow = int(rng.integers(50)) / 100
        view = int(view + len(SWAPS) * rng.integers(2)) % (2 * len(SWAPS))
        left, top, right, bottom = self.images.faces[target]
        if view >= len(SWAPS):  # frames are of the mirrored image
            left, right = label["width"] - right, label["width"] - left
        return Seen(target, view, face_frame((label["height"], label["width"]), (left, top, right, bottom), grow))


def microbatches(samples: Sequence[Sample], most: int, size: Callable[[Sample], Size], by_references: bool = True) -> list[list[int]]:
    """Places of the samples, in microbatches of at most `most`: targets of one have the same size, and (`by_references`) about as many
    references, so that padding is small. In a microbatch the order stays."""
    by_size: dict[Size, list[int]] = {}
    for place, sample in enumerate(samples):
        by_size.setdefault(size(sample), []).append(place)
    parts = []
    for places in by_size.values():
        alike = sorted(places, key=lambda i: len(samples[i].references)) if by_references else places
        parts += [sorted(alike[start : start + most]) for start in range(0, len(alike), most)]
    return parts


@dataclass
class Inputs:
    """Encodings of images and prompts on the models' device: latents, text states, vision tokens, prefix states. The last two only with
    `frozen_prefix`, prefix states of samples only if `cache_prefix`: each is then computed alone."""

    models: Models
    images: TrainingImages
    frozen_prefix: bool
    store: Store = field(default_factory=lambda: Store(2**30))
    framing: Framing = field(default_factory=Framing)
    cache_prefix: bool = False

    # -- what a sample sees: nothing here runs a model, any thread may call it --------------------------------------------

    def frame(self, sample: Sample) -> Frame:
        """The part of the image that is the target."""
        row = self.images.labels[sample.target]
        return self.framing((row["height"], row["width"]), sample.place)

    def size(self, sample: Sample) -> Size:
        return self.frame(sample).size

    def target(self, sample: Sample) -> Seen:
        frame = self.frame(sample)
        return Seen(sample.target, sample.view, frame if frame.size != frame.original else None)

    def references(self, sample: Sample) -> list[Seen]:
        """An image that is its own reference is cut like the target, or only its face is (method.md §4)."""
        if sample.face:
            return [sample.face]
        if sample.references == (sample.target,):
            return [self.target(sample)]
        return [Seen(item, sample.view) if item != NULL else Seen(NULL) for item in sample.references]

    def load(self, sample: Sample) -> None:
        """Into memory what the models will need: encodings from disk or, where there are none yet, images."""
        self.store.find("text", sample.prompt)
        target = self.target(sample)
        if not self.store.find("latents", *self._key(target)):
            self.store.get(partial(self._pixels, target), "pixels", *self._key(target))
        if self.frozen_prefix and self.cache_prefix and self.store.find("prefix", *self._prefix_key(sample)):
            return
        for seen in self.references(sample):
            if not (self.frozen_prefix and self.store.find("vision", *self._key(seen))):
                self.store.get(partial(self._patches, seen), "patches", *self._key(seen))

    def image(self, item: int, view: int) -> Image.Image:
        return seen_as(self.images.store.image(self.images.sha256s[item]), view)

    def _picture(self, seen: Seen) -> Image.Image:
        if seen.item == NULL:
            return null_image()
        image = self.image(seen.item, seen.view)
        return seen.frame.cut(image) if seen.frame else image

    def _key(self, seen: Seen) -> list[Any]:
        return [self.images.sha256s[seen.item] if seen.item != NULL else "null", seen.view, seen.frame and astuple(seen.frame)]

    def _prefix_key(self, sample: Sample) -> list[Any]:
        return [sample.prompt, *map(self._key, self.references(sample))]

    def _pixels(self, seen: Seen) -> Encoding:
        return {"pixels_3HW": torch.from_numpy(np.array(self._picture(seen))).permute(2, 0, 1).contiguous()}

    def _patches(self, seen: Seen) -> Encoding:
        return vars(self.models.processor.image(self._picture(seen)))

    # -- encodings --------------------------------------------------------------------------------------------------------

    def latents(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Mean latents of the targets, scaled for diffusion: [B, C, h, w]."""

        def make(seen: Seen) -> Encoding:
            x_3HW = self.store.take(partial(self._pixels, seen), "pixels", *self._key(seen))["pixels_3HW"]
            x_13HW = self._here(x_3HW)[None].float() / 127.5 - 1
            return {"latents_Chw": to_latents(self.models.vae, x_13HW)[0]}

        targets = [self.target(sample) for sample in samples]
        found = [self.store.get(partial(make, seen), "latents", *self._key(seen)) for seen in targets]
        return torch.stack([self._here(encoding["latents_Chw"]) for encoding in found])

    def time_ids(self, samples: Sequence[Sample]) -> torch.Tensor:
        """SDXL's sizes of the targets [B, 6]."""
        return torch.tensor([self.frame(s).time_ids for s in samples], dtype=torch.float32, device=self.models.device)

    def text_states(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states [B, L, X] and pooled states [B, P] of the prompts."""

        def make(prompt: str) -> Encoding:
            with torch.no_grad():
                text, pooled = encode_text(self.models.text_encoders, [prompt])
            return {"text_LX": text[0], "pooled_P": pooled[0]}

        found = [self.store.get(partial(make, prompt), "text", prompt) for prompt in prompts]
        text_BLX, pooled_BP = (torch.stack([self._here(encoding[part]) for encoding in found]) for part in ("text_LX", "pooled_P"))
        return text_BLX, pooled_BP

    def reference_tokens(self, samples: Sequence[Sample]) -> torch.Tensor:
        """tokens_BTX of the samples, with gradients to whatever is trained."""
        encoder, processor = self.models.encoder, self.models.processor
        if not self.frozen_prefix:
            inputs = [ReferenceSample([self.image_patches(seen) for seen in self.references(s)], s.prompt) for s in samples]
            return encoder(processor.batch(inputs).to(self.models.device))
        with torch.no_grad():
            prefix = _batch([self._kept_prefix(s) for s in samples]) if self.cache_prefix else self._prefix(samples)
        return encoder(prefix)

    def image_patches(self, seen: Seen) -> ImagePatches:
        found = self.store.get(partial(self._patches, seen), "patches", *self._key(seen))
        return ImagePatches(self._here(found["pixel_values"]), found["grid_thw"])

    def _vision(self, seen: Seen) -> Encoding:
        """Vision tokens [N, D] of one image by the frozen tower."""

        def make() -> Encoding:
            patches = self.store.take(partial(self._patches, seen), "patches", *self._key(seen))
            pixels, grid_13 = self._here(patches["pixel_values"]), self._here(patches["grid_thw"][None])
            return {"tokens_ND": self.models.encoder.vision(pixels, grid_13)[0], "grid_thw": patches["grid_thw"]}

        return self.store.get(make, "vision", *self._key(seen))

    def _prefix(self, samples: Sequence[Sample]) -> PrefixStates:
        found = [[self._vision(seen) for seen in self.references(s)] for s in samples]
        images = [[ImagePatches(torch.empty(0, 0), encoding["grid_thw"]) for encoding in encodings] for encodings in found]
        batch = self.models.processor.batch([ReferenceSample(i, s.prompt) for i, s in zip(images, samples, strict=True)])
        tokens = [self._here(encoding["tokens_ND"]) for encodings in found for encoding in encodings]
        return self.models.encoder.prefix(batch.to(self.models.device), tokens)

    def _kept_prefix(self, sample: Sample) -> PrefixStates:
        found = self.store.get(lambda: vars(self._prefix([sample])), "prefix", *self._prefix_key(sample))
        return PrefixStates(**{part: self._here(tensor) for part, tensor in found.items()})

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.models.device, non_blocking=True)


def open_store(loading: Loading, models: Models, how: list[Any], base: Path) -> Store:
    """The store of a stage; on disk, encodings of the `base` models (a folder). `how` the models compute."""
    disk = None
    if loading.disk_gib:
        code = [str(module.__file__) for module in (images, frames, dataset, loss, reference)]
        files = [sha256_file(path) for path in sorted(base.rglob("*")) if path.suffix in (".json", ".txt", ".model")]  # not weights
        about = sha256_json([models.base_hash, files, how, torch.__version__, made_here(models.device, *code)])
        disk = Disk(Path(loading.folder) / "encodings.sqlite", int(loading.disk_gib * 2**30), dict.fromkeys(("latents", "text"), about))
    return Store(int(loading.memory_gib * 2**30), disk, models.device)


def keep_frozen(store: Store, models: Models, mllm: str) -> None:
    """On disk, encodings of the MLLM too: from now on it does not train, and `mllm` is the hash of its weights."""
    if store.disk:
        about = sha256_json([store.disk.abouts["latents"], mllm, models.encoder.config.model_dump()])
        store.disk.abouts |= dict.fromkeys(("vision", "prefix"), about)


def _batch(prefixes: Sequence[PrefixStates]) -> PrefixStates:
    """Prefixes of one sample each, right-padded."""
    longest = max(prefix.mask_BL.shape[1] for prefix in prefixes)
    pads = [longest - prefix.mask_BL.shape[1] for prefix in prefixes]
    pairs = list(zip(prefixes, pads, strict=True))
    return PrefixStates(
        torch.cat([F.pad(prefix.states_BLD, (0, 0, 0, pad)) for prefix, pad in pairs]),
        torch.cat([F.pad(prefix.mask_BL, (0, pad)) for prefix, pad in pairs]),
        torch.cat([F.pad(prefix.positions_3BL, (0, pad)) for prefix, pad in pairs], dim=1),
    )
