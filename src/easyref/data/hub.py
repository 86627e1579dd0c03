"""The extractors of the stage `embed`: what comes inside (Lite0, MiniLM), models of the hub by transformers, faces by ONNX files.

Letters: N items · E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from easyref.config import Embed, Model, Score, Subjects
from easyref.data.embed import Box, Extractors
from easyref.data.extractors import Array, Lite0, MiniLM, Palette
from easyref.data.faces import Faces


def make_extractors(p: Embed) -> Extractors:
    lite0, palette = Lite0(), Palette()
    images = HubImages(p.images) if p.images else None

    def of_images(items: Sequence[Image.Image]) -> dict[str, Array]:
        deep, shallow = lite0.both(items)
        return {"subject": images(items) if images else deep, "style": shallow, "palette": palette(items)}

    texts = HubTexts(p.texts, p.batch) if p.texts else MiniLM(batch=p.batch)
    subjects = HubSubjects(p.subjects) if p.subjects else None
    return Extractors(of_images, texts, subjects, images or lite0, Faces(p.faces) if p.faces else None)


def _load(auto: str, model: Model) -> Any:
    """A part of `model` by transformers' auto class of that name, on the GPU if there is one."""
    import torch
    import transformers

    is_model = auto not in ("AutoImageProcessor", "AutoTokenizer")
    options = {"use_safetensors": True, "torch_dtype": torch.float32} if is_model else {}
    try:
        loaded = getattr(transformers, auto).from_pretrained(model.id, revision=model.revision or "main", **options)
    except OSError as error:
        raise ValueError(f"{model.id}: {auto} cannot load it ({str(error).splitlines()[0]}); check id, revision and network") from error
    return loaded.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu") if is_model else loaded


class HubImages:
    """Images → [N, E]: CLIP's projected image features, or the class token of a vision model (DINOv2)."""

    def __init__(self, model: Model) -> None:
        self.processor, self.model = _load("AutoImageProcessor", model), _load("AutoModel", model)

    def __call__(self, items: Sequence[Image.Image]) -> Array:
        import torch

        with torch.inference_mode():
            pixels = self.processor(images=list(items), return_tensors="pt")["pixel_values"].to(self.model.device)
            if hasattr(self.model, "vision_model"):
                return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output).cpu().numpy()
            return self.model(pixel_values=pixels).last_hidden_state[:, 0].cpu().numpy()


class HubTexts:
    """Texts → [N, E]: CLIP's projected text features."""

    def __init__(self, model: Model, batch: int) -> None:
        self.tokenizer, self.model, self.batch = _load("AutoTokenizer", model), _load("AutoModel", model), batch

    def __call__(self, items: Sequence[str]) -> Array:
        import torch

        found = []
        with torch.inference_mode():
            for start in range(0, len(items), self.batch):
                texts = list(items[start : start + self.batch])
                most = self.model.config.text_config.max_position_embeddings
                ids = self.tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt").to(self.model.device)
                out = self.model.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
                found.append(self.model.text_projection(out.pooler_output).cpu().numpy())
        return np.concatenate(found)


class HubSubjects:
    """Images → boxes of what a detector finds, best first (the paper has Co-DETR; any transformers detector will do)."""

    def __init__(self, p: Subjects) -> None:
        self.p = p
        self.processor, self.model = _load("AutoImageProcessor", p), _load("AutoModelForObjectDetection", p)

    def __call__(self, items: Sequence[Image.Image]) -> list[list[Box]]:
        import torch

        with torch.inference_mode():
            inputs = self.processor(images=list(items), return_tensors="pt").to(self.model.device)
            sizes = torch.tensor([image.size[::-1] for image in items])
            found = self.processor.post_process_object_detection(self.model(**inputs), self.p.min_score, sizes)
        return [self._boxes(f, image) for f, image in zip(found, items, strict=True)]

    def _boxes(self, found: dict[str, Any], image: Image.Image) -> list[Box]:
        boxes = []
        for score, corners in sorted(zip(found["scores"].tolist(), found["boxes"].tolist(), strict=True), reverse=True):
            left, top, right, bottom = (round(c) for c in corners)
            left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
            if (right - left) * (bottom - top) >= max(1.0, self.p.min_share * image.width * image.height) and right > left:
                boxes.append(Box(left, top, right, bottom, score))
        return boxes[: self.p.max_boxes]


class HubScores:
    """Images → how much of a label each has: its probability, or what a model with one label says."""

    def __init__(self, p: Score, key: str) -> None:
        self.processor, self.model = _load("AutoImageProcessor", p), _load("AutoModelForImageClassification", p)
        labels = {label: number for number, label in self.model.config.id2label.items()}
        if p.label not in labels:
            raise ValueError(f"{key}.label = {p.label!r}: {p.id} knows {', '.join(labels)}; name one of them")
        self.label, self.alone = labels[p.label], len(labels) == 1
        self.several = self.model.config.problem_type == "multi_label_classification"

    def __call__(self, items: Sequence[Image.Image]) -> list[float]:
        import torch

        with torch.inference_mode():
            pixels = self.processor(images=list(items), return_tensors="pt")["pixel_values"].to(self.model.device)
            logits_NK = self.model(pixel_values=pixels).logits.float()
            if not self.alone:
                logits_NK = logits_NK.sigmoid() if self.several else logits_NK.softmax(1)
            return logits_NK[:, self.label].tolist()
