"""Metrics of generated images: pure functions on arrays, no model and no file.

Fidelity is the cosine of centred features, in the place where the paper has CLIP-I and DINO-I (method.md §5). Centring
matters: raw ImageNet features of any two emoji already have a cosine near 0.9.
FID (arXiv 1706.08500) and KID (arXiv 1801.01401) are taken of any features. They are a few lines here: the libraries that have them
want images and Inception's features, or torchvision.
Intervals are 95 % percentile bootstraps (Efron 1979) over groups, because samples of one group share their images
(cluster bootstrap: Cameron, Gelbach, Miller 2008).

Letters: N samples · E feature width · R references · M training images · G groups · h,w pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Interval = dict[str, float]  # mean, low, high

_BLOCK = 4_000_000  # numbers held at once by the bootstrap and the image distances


def unit(features_NE: Array, mean_E: Array) -> Array:
    """Centred on the training mean and L2-normalised, [N, E]; a feature equal to the mean gives zeros."""
    centred = np.asarray(features_NE, np.float64) - mean_E
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12)


def fidelity(generated_NE: Array, target_NE: Array, mean_E: Array) -> Array:
    """Cosine of centred features between each generated image and its target, [N] in -1..1."""
    if np.shape(generated_NE) != np.shape(target_NE):
        raise ValueError(f"fidelity: {np.shape(generated_NE)} generated against {np.shape(target_NE)} targets")
    return (unit(generated_NE, mean_E) * unit(target_NE, mean_E)).sum(1)


def reference_fidelity(generated_NE: Array, references: Sequence[Array], mean_E: Array) -> Array:
    """The same against the references: the mean over the [R, E] references of each sample, [N]."""
    if len(generated_NE) != len(references):
        raise ValueError(f"reference_fidelity: {len(generated_NE)} images, but references of {len(references)} samples")
    generated = unit(generated_NE, mean_E)
    return np.array([(unit(r, mean_E) @ g).mean() for g, r in zip(generated, references, strict=True)])


def bootstrap_means(
    values_NK: Array, groups: Sequence[Any] | Array | None = None, *, seed: int = 0, resamples: int = 10_000
) -> list[Interval]:
    """Mean of each column and its 95 % percentile bootstrap interval, all from the same draws; with group ids, of whole groups."""
    x = np.asarray(values_NK, np.float64)
    if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
        raise ValueError(f"bootstrap: needs rows of finite numbers, got {x.shape}; leave out undefined samples")
    if groups is not None and len(groups) != len(x):
        raise ValueError(f"bootstrap: {len(x)} values but {len(groups)} group ids; give one id a value")
    cluster_N = np.arange(len(x)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count_G = np.bincount(cluster_N)
    sum_GK = np.stack([np.bincount(cluster_N, weights=column) for column in x.T], 1)
    rng = np.random.default_rng(seed)
    means, block = [], max(1, _BLOCK // len(count_G))
    for done in range(0, resamples, block):
        drawn = rng.multinomial(len(count_G), np.full(len(count_G), 1 / len(count_G)), size=min(block, resamples - done))
        means.append((drawn @ sum_GK) / (drawn @ count_G)[:, None])
    bounds = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return [{"mean": float(m), "low": float(low), "high": float(high)} for m, low, high in zip(x.mean(0), *bounds, strict=True)]


def bootstrap_mean(
    values: Sequence[float] | Array,
    groups: Sequence[Any] | Array | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """`bootstrap_means` of one list."""
    return bootstrap_means(np.asarray(values, np.float64)[..., None], groups, seed=seed, resamples=resamples)[0]


def paired_difference(
    a: Sequence[float] | Array,
    b: Sequence[float] | Array,
    groups: Sequence[Any] | Array | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """Mean of a - b, sample by sample, with its interval: above zero where `low` is above zero."""
    if np.shape(a) != np.shape(b):
        raise ValueError(f"paired_difference: {np.shape(a)} against {np.shape(b)}; give both conditions of each sample")
    return bootstrap_mean(np.asarray(a, np.float64) - np.asarray(b, np.float64), groups, seed=seed, resamples=resamples)


def fid(a_NE: Array, b_ME: Array) -> float:
    """Fréchet distance of the normal distributions with the means and covariances of two sets of features.

    tr (S_a S_b)^½ is the sum of the singular values of A Bᵀ, where S_a = AᵀA: no root of an E × E matrix, which a set smaller than E
    makes singular. Such a set makes FID far too large: compare only sets of one size.
    """
    mean_a, mean_b = a_NE.mean(0, dtype=np.float64), b_ME.mean(0, dtype=np.float64)
    a, b = (np.asarray(x, np.float64) - x.mean(0, dtype=np.float64) for x in (a_NE, b_ME))
    a, b = a / math.sqrt(len(a) - 1), b / math.sqrt(len(b) - 1)
    return float(((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


def kid(a_NE: Array, b_ME: Array) -> float:
    """Squared maximum mean discrepancy under the kernel (x·y / E + 1)³, unbiased: around 0 for two samples of one distribution, at any
    number of images."""
    a, b = np.asarray(a_NE, np.float64), np.asarray(b_ME, np.float64)

    def kernel(x: Array, y: Array) -> Array:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Array) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def diversity(features: Sequence[Array], mean_E: Array) -> Array:
    """How different the images of one sample under several seeds are: 1 - mean cosine of centred features over pairs, [N].
    `features`: [seeds, E] of each sample."""
    cosines = [unit(f, mean_E) @ unit(f, mean_E).T for f in features]
    return np.array([1 - c[np.triu_indices(len(c), 1)].mean() for c in cosines])


def covered(right: float, none: float, ceiling: float) -> float | None:
    """(right - none) / (ceiling - none): 0 = references add nothing, 1 = as good as a real image of the group.

    None where real images do not score above text-only images: then there is no distance to cover.
    """
    room = ceiling - none
    return (right - none) / room if math.isfinite(room) and room > 1e-9 else None


def pixel_mse(a: Array, b: Array) -> Array:
    """Mean squared error of uint8 images [..., h, w, 3] on the scale 0..1, broadcast over leading axes."""
    difference = a.astype(np.float32) / 255 - b.astype(np.float32) / 255
    return (difference**2).mean((-3, -2, -1))


def nearest_mse(images_Nhw3: Array, pool: Iterable[Array]) -> Array:
    """Pixel MSE of each image to the nearest image of `pool`, which comes in uint8 blocks [m, h, w, 3]; [N]."""
    flat = images_Nhw3.reshape(len(images_Nhw3), -1).astype(np.float32) / 255
    nearest = np.full(len(flat), np.inf)
    for block in pool:
        other = block.reshape(len(block), -1).astype(np.float32) / 255
        squares = (flat**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * flat @ other.T
        nearest = np.minimum(nearest, squares.min(1).clip(0) / flat.shape[1])
    return nearest


def copying(
    generated_Nhw3: Array,
    references: Sequence[Array],
    targets_Nhw3: Array,
    training: Iterable[Array],
    threshold: float,
) -> dict[str, float]:
    """How many generated images are copies. All arrays uint8 at one size (nano: 64 px); distances are `pixel_mse`.

    copied_reference         fraction whose nearest reference of its own sample is closer than `threshold`
    nearer_to_reference      fraction whose nearest reference is closer than the target is. With R references one of
                             them is often closer by chance: compare the conditions, do not read it alone
    copied_training          fraction whose nearest training image is closer than `threshold`
    nearest_training         median distance to the nearest training image
    Run it on the real targets as well: siblings among the styles make a part of real images "copies" too.
    """
    if not len(generated_Nhw3) == len(references) == len(targets_Nhw3):
        counts = len(generated_Nhw3), len(references), len(targets_Nhw3)
        raise ValueError(f"copying: {counts} generated images, reference lists and targets; give one of each a sample")
    to_reference = np.array([pixel_mse(g[None], r).min() for g, r in zip(generated_Nhw3, references, strict=True)])
    to_training = nearest_mse(generated_Nhw3, training)
    return {
        "copied_reference": float((to_reference < threshold).mean()),
        "nearer_to_reference": float((to_reference < pixel_mse(generated_Nhw3, targets_Nhw3)).mean()),
        "copied_training": float((to_training < threshold).mean()),
        "nearest_training": float(np.median(to_training)),
    }
