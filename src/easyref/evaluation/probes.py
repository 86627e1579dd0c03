"""Evaluators: trained on real images of the training split only, and never used to train a generator.

LinearProbe   multinomial logistic regression on standardised shallow features: which style, which skin tone
ConceptProbe  retrieval: the nearest class centre of the real images drawn in the other styles
DualEncoder   image and caption in one 128-d space, symmetric contrastive loss (CLIP's form, arXiv 2103.00020,
              on frozen Lite0 and MiniLM features; it is not CLIP)

Each has an accuracy on real held-out images: how far to trust it. Saved as safetensors with a JSON header, no pickle.

Letters: N images · E feature width · K classes · B batch · Z shared width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from easyref.evaluation.metrics import unit
from easyref.records import write_bytes

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LinearProbe:
    """Class scores = ((features - mean) / scale) @ weight + bias; weight [E, K]."""

    classes: list[str]
    mean_E: Array
    scale_E: Array
    weight_EK: Array
    bias_K: Array

    def predict(self, features_NE: Array) -> Array:
        """[N] class names."""
        scores = (features_NE - self.mean_E) / self.scale_E @ self.weight_EK + self.bias_K
        return np.array(self.classes)[scores.argmax(1)]

    def tensors(self) -> dict[str, Array]:
        return {"mean": self.mean_E, "scale": self.scale_E, "weight": self.weight_EK, "bias": self.bias_K}


def fit_linear(features_NE: Array, labels: Sequence[str] | Array, strength: float = 0.1) -> LinearProbe:
    """`strength` is scikit-learn's C; 0.1 was best or equal on emoji for style and tone."""
    from sklearn.linear_model import LogisticRegression

    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"a probe needs two classes or more, the training split has {classes}; give it more images")
    mean, scale = features_NE.mean(0), features_NE.std(0) + 1e-6
    model = LogisticRegression(C=strength, max_iter=1000).fit((features_NE - mean) / scale, np.asarray(labels))
    weight, bias = model.coef_.T, model.intercept_
    if len(classes) == 2:  # scikit-learn keeps one column for two classes
        weight, bias = np.concatenate([-weight, weight], 1) / 2, np.concatenate([-bias, bias]) / 2
    return LinearProbe(classes, *(np.ascontiguousarray(a, np.float32) for a in (mean, scale, weight, bias)))


class ConceptProbe:
    """Which of the split's concepts does an image show? Class centres come from the real images of all styles but one:
    an image is judged with the centres that leave out its own (target) style, so the target itself is never in them.

    For kind subject the right centre is made of the very images that serve as references: read it with `copying`.
    """

    def __init__(self, features_NE: Array, concepts: Sequence[str] | Array, styles: Sequence[str] | Array, mean_E: Array) -> None:
        features, concept, style = unit(features_NE, mean_E), np.asarray(concepts), np.asarray(styles)
        self.mean_E = mean_E
        self.centres = {s: _centres(features[style != s], concept[style != s]) for s in sorted(set(styles))}

    def candidates(self, style: str) -> list[str]:
        return list(self.centres[style][0])

    def predict(self, features_NE: Array, styles: Sequence[str] | Array) -> Array:
        """[N] concept ids; `styles` are the target styles."""
        features = unit(features_NE, self.mean_E)
        names = [self.centres[s][0][(self.centres[s][1] @ f).argmax()] for f, s in zip(features, styles, strict=True)]
        return np.array(names)


def _centres(features_NE: Array, concepts: Array) -> tuple[Array, Array]:
    """Concept ids [K] and their unit centres [K, E]."""
    names, index = np.unique(concepts, return_inverse=True)
    if not len(names):
        raise ValueError("the concept probe needs concepts drawn in two styles; evaluate a split with more images")
    total = np.zeros((len(names), features_NE.shape[1]))
    np.add.at(total, index, features_NE)
    return names, total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class DualEncoder:
    """Image features and text embeddings -> one space of unit vectors, [N, Z] each."""

    image_mean_E: Array
    image_EZ: Array
    text_mean_E: Array
    text_EZ: Array

    def images(self, features_NE: Array) -> Array:
        return unit(unit(features_NE, self.image_mean_E) @ self.image_EZ, np.zeros(()))

    def texts(self, embeddings_NE: Array) -> Array:
        return unit(unit(embeddings_NE, self.text_mean_E) @ self.text_EZ, np.zeros(()))

    def alignment(self, features_NE: Array, embeddings_NE: Array) -> Array:
        """Cosine of image i and text i, [N]."""
        return (self.images(features_NE) * self.texts(embeddings_NE)).sum(1)

    def tensors(self) -> dict[str, Array]:
        names = "image_mean", "image", "text_mean", "text"
        return dict(zip(names, (self.image_mean_E, self.image_EZ, self.text_mean_E, self.text_EZ), strict=True))


def fit_dual(
    images_ME: Array, texts_NE: Array, rows_N: Array, *, seed: int = 0, width: int = 128, steps: int = 600,
    batch: int = 256, rate: float = 3e-3, decay: float = 0.1,
) -> DualEncoder:  # fmt: skip
    """Text i belongs to image `rows_N[i]`. Two linear maps; pairs with the same text are no negatives of each other."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)
    used = np.unique(rows_N)
    image_mean, text_mean = images_ME[used].mean(0), texts_NE.mean(0)
    x, t = (torch.from_numpy(unit(a, m)).float() for a, m in ((images_ME, image_mean), (texts_NE, text_mean)))
    of = torch.from_numpy(np.asarray(rows_N))
    same = torch.from_numpy(np.unique(texts_NE, axis=0, return_inverse=True)[1].reshape(-1))
    maps = [torch.randn(a.shape[1], width, generator=generator) / a.shape[1] ** 0.5 for a in (x, t)]
    for weight in maps:
        weight.requires_grad_()
    log_scale = torch.tensor(2.5, requires_grad=True)
    parameters: list[dict[str, Any]] = [{"params": maps}, {"params": [log_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        pairs = torch.randint(len(t), (batch,), generator=generator)
        image, text = F.normalize(x[of[pairs]] @ maps[0], dim=1), F.normalize(t[pairs] @ maps[1], dim=1)
        twins = same[pairs][:, None] == same[pairs][None]
        loss = contrastive_loss(image, text, log_scale.clamp(max=4.6).exp(), twins)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    arrays = (image_mean, maps[0].detach().numpy(), text_mean, maps[1].detach().numpy())
    return DualEncoder(*(np.ascontiguousarray(a, np.float32) for a in arrays))


def contrastive_loss(image_BZ: Any, text_BZ: Any, scale: Any, twins_BB: Any) -> Any:
    """Mean of image-to-text and text-to-image cross entropy; `twins` (pairs with the same text) are left out of the
    negatives."""
    import torch
    from torch.nn import functional as F

    own = torch.eye(len(image_BZ), dtype=torch.bool)
    logits = (scale * image_BZ @ text_BZ.T).masked_fill(twins_BB & ~own, -torch.inf)
    labels = torch.arange(len(image_BZ))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def retrieval(images_NZ: Array, texts_NZ: Array, labels: Sequence[str] | Array, top: int) -> float:
    """Share of images whose own label is among the `top` nearest of the labels' texts (R@top, chance top/K)."""
    names, first = np.unique(np.asarray(labels), return_index=True)
    own = np.searchsorted(names, np.asarray(labels))
    scores = images_NZ @ texts_NZ[first].T
    rank = (scores > scores[np.arange(len(own)), own][:, None]).sum(1)
    return float((rank < top).mean())


def roc_auc(features_NE: Array, labels: Sequence[str] | Array, styles: Sequence[str] | Array, mean_E: Array) -> float | None:
    """How well the centred cosine tells "same label, other style" from "other label, other style"; 0.5 = not at all.

    None where no label, or only one, is drawn in two styles.
    """
    from sklearn.metrics import roc_auc_score

    label, style, features = np.asarray(labels), np.asarray(styles), unit(features_NE, mean_E)
    i, j = np.triu_indices(len(label), 1)
    across = style[i] != style[j]
    same = (label[i] == label[j])[across]
    return float(roc_auc_score(same, (features @ features.T)[i, j][across])) if 0 < same.sum() < len(same) else None


def save_evaluators(path: str | Path, evaluators: dict[str, LinearProbe | DualEncoder], about: dict[str, Any]) -> None:
    """One safetensors file; the classes and `about` are JSON in its header."""
    from safetensors.numpy import save

    tensors = {f"{name}.{key}": value for name, e in evaluators.items() for key, value in e.tensors().items()}
    classes = {name: e.classes for name, e in evaluators.items() if isinstance(e, LinearProbe)}
    header = {"classes": json.dumps(classes), "about": json.dumps(about, sort_keys=True)}
    write_bytes(path, save(tensors, header))


def load_evaluators(path: str | Path) -> tuple[dict[str, LinearProbe | DualEncoder], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        header, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not {"classes", "about"} <= header.keys():
        raise ValueError(f"{path}: not a file of evaluators; delete it and run evaluate again")
    classes = json.loads(header["classes"])
    found: dict[str, LinearProbe | DualEncoder] = {}
    for name in sorted({key.split(".")[0] for key in tensors}):
        own = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if name in classes:
            found[name] = LinearProbe(classes[name], own["mean"], own["scale"], own["weight"], own["bias"])
        else:
            found[name] = DualEncoder(own["image_mean"], own["image"], own["text_mean"], own["text"])
    return found, json.loads(header["about"])
