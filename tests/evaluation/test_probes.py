"""Evaluators find a planted signal, ignore what they must not see, and survive being saved."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from easyref.evaluation.probes import (
    ConceptProbe,
    DualEncoder,
    LinearProbe,
    contrastive_loss,
    fit_dual,
    fit_linear,
    load_evaluators,
    retrieval,
    roc_auc,
    save_evaluators,
)


def planted(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    x = rng.normal(size=(n, 20)).astype(np.float32)
    x[np.arange(n), label] += 3
    return x * 50 + 7, np.array([f"class {i}" for i in label])  # a scale and an offset that standardising takes out


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_probe_learns_a_planted_signal_as_scikit_learn_does(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = planted(600, classes, 0), planted(600, classes, 1)
    probe = fit_linear(x, y)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y)
    assert (probe.predict(x_test) == y_test).mean() > 0.9
    assert (probe.predict(x_test) == theirs.predict(x_test)).mean() > 0.995


def test_linear_probe_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="two classes"):
        fit_linear(np.ones((3, 2)), ["a"] * 3)


def test_concept_probe_never_uses_the_target_style() -> None:
    """In style A, which has most images, the drawings of the two concepts are swapped. Judged by the other styles,
    A's images look wrong; a probe that used A's own images would call them right."""
    rng = np.random.default_rng(2)
    centre = rng.normal(size=(2, 12))
    concept, style = np.tile(["cat", "dog"], 30), np.repeat(["A", "B", "C"], [40, 10, 10])
    swapped = (concept == "dog") ^ (style == "A")
    features = centre[swapped.astype(int)] + rng.normal(0, 0.05, (60, 12))
    probe = ConceptProbe(features, concept, style, np.zeros(12))
    in_a, in_b = style == "A", style == "B"
    assert (probe.predict(features[in_a], list(style[in_a])) != concept[in_a]).all()
    others = ConceptProbe(features[~in_a], concept[~in_a], style[~in_a], np.zeros(12))
    assert (others.predict(features[in_b], list(style[in_b])) == concept[in_b]).all()
    assert probe.candidates("A") == ["cat", "dog"]


def pairs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts that share ten hidden causes through fixed random maps."""
    causes = np.random.default_rng(seed).normal(size=(n, 10))
    maps = np.random.default_rng(99)
    return (causes @ maps.normal(size=(10, 60))).astype(np.float32), (causes @ maps.normal(size=(10, 40))).astype(np.float32)


def test_dual_encoder_learns_which_text_belongs_to_which_image() -> None:
    images, texts = pairs(1500, 0)
    dual = fit_dual(images, texts, np.arange(1500), steps=100, seed=3)
    new_images, new_texts = pairs(200, 1)
    names = [f"{i:03}" for i in range(200)]
    assert retrieval(dual.images(new_images), dual.texts(new_texts), names, 1) > 0.9
    assert dual.alignment(new_images, new_texts).mean() > dual.alignment(new_images, new_texts[::-1]).mean() + 0.5
    again = fit_dual(images, texts, np.arange(1500), steps=100, seed=3)
    assert np.array_equal(dual.image_EZ, again.image_EZ)


def test_dual_encoder_never_sees_images_without_a_training_text() -> None:
    images, texts = pairs(300, 0)
    clean = fit_dual(images, texts[:200], np.arange(200), steps=5)
    poisoned = images.copy()
    poisoned[200:] = 1e3
    other = fit_dual(poisoned, texts[:200], np.arange(200), steps=5)
    assert all(np.array_equal(clean.tensors()[name], other.tensors()[name]) for name in clean.tensors())


def test_equal_texts_are_no_negatives_of_each_other() -> None:
    """The loss by hand: pair 0 and pair 1 have the same text, so only pair 2 is a negative of theirs."""
    rng = np.random.default_rng(5)
    image, text, scale = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), 1.7
    text[1] = text[0]
    logits = scale * image @ text.T
    others = [[0, 2], [1, 2], [0, 1, 2]]
    rows = [math.log(sum(math.exp(logits[i, j]) for j in others[i])) - logits[i, i] for i in range(3)]
    columns = [math.log(sum(math.exp(logits[j, i]) for j in others[i])) - logits[i, i] for i in range(3)]
    twins = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    loss = contrastive_loss(torch.from_numpy(image), torch.from_numpy(text), scale, twins)
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 6)


def test_retrieval_counts_the_rank_of_the_own_label() -> None:
    images, texts = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.2]]), np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]])
    assert retrieval(images, texts, ["a", "b", "c"], 1) == pytest.approx(2 / 3)  # the last image is nearer to text "a"
    assert retrieval(images, texts, ["a", "b", "c"], 2) == 1.0


def test_auc_only_compares_across_styles() -> None:
    """Same concept is near across styles (AUC 1), although within a style different concepts are identical."""
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]])
    assert roc_auc(features, ["x", "y", "x", "y"], ["A", "A", "B", "B"], np.zeros(2)) == 1.0
    assert roc_auc(features, ["x", "y", "y", "x"], ["A", "A", "B", "B"], np.zeros(2)) == 0.0
    assert roc_auc(features, ["x", "y", "x", "y"], ["A"] * 4, np.zeros(2)) is None


def test_evaluators_survive_being_saved(tmp_path: Path) -> None:
    x, y = planted(100, 3, 0)
    images, texts = pairs(50, 0)
    probe, dual = fit_linear(x, y), fit_dual(images, texts, np.arange(50), steps=3)
    save_evaluators(tmp_path / "e.safetensors", {"style": probe, "dual": dual}, {"key": "k"})
    found, about = load_evaluators(tmp_path / "e.safetensors")
    assert about == {"key": "k"}
    assert isinstance(found["style"], LinearProbe) and isinstance(found["dual"], DualEncoder)
    assert (found["style"].predict(x) == probe.predict(x)).all()
    assert np.array_equal(found["dual"].alignment(images, texts), dual.alignment(images, texts))


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not a file of evaluators"):
        load_evaluators(tmp_path / "x.safetensors")


def test_auc_and_recall_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, top_k_accuracy_score

    rng = np.random.default_rng(11)
    features, label, style = rng.normal(size=(60, 8)), rng.integers(0, 6, 60), rng.integers(0, 3, 60)
    features += 0.7 * rng.normal(size=(6, 8))[label]
    mean = features.mean(0)
    centred = (features - mean) / np.linalg.norm(features - mean, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(60) for j in range(i) if style[i] != style[j]]
    theirs = roc_auc_score([label[i] == label[j] for i, j in pairs], [centred[i] @ centred[j] for i, j in pairs])
    assert roc_auc(features, label.astype(str), style.astype(str), mean) == pytest.approx(theirs)

    images, texts = rng.normal(size=(60, 8)), rng.normal(size=(6, 8))
    for top in (1, 3):
        theirs = top_k_accuracy_score(label, images @ texts.T, k=top, labels=range(6))
        assert retrieval(images, texts[label], label.astype(str), top) == pytest.approx(theirs)
