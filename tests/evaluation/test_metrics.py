"""Metrics against independent maths: known distributions, scipy's bootstrap, plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from easyref.evaluation import metrics
from easyref.evaluation.report import verdict


def test_the_interval_of_one_group_is_no_verdict() -> None:
    cases = (((0.1, 0.3), "aa", ""), ((0.1, 0.3), "ab", "better"), ((-0.1, -0.3), "ab", "worse"), ((-0.1, 0.3), "ab", ""))
    for values, groups, said in cases:
        assert verdict(metrics.bootstrap_mean(values, list(groups), resamples=200)) == said


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [metrics.bootstrap_mean(rng.normal(1.0, 2.0, 60), seed=i, resamples=1000) for i in range(400)]
    share = np.mean([i["low"] <= 1.0 <= i["high"] for i in intervals])
    assert 0.91 < share < 0.975


def test_cluster_bootstrap_covers_where_samples_of_a_group_are_alike() -> None:
    """30 groups of 6 nearly equal samples: ignoring the groups is far too sure."""
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(30), 6)
    covers = {"groups": 0, "samples": 0}
    for i in range(300):
        values = rng.normal(0, 1, 30)[groups] + rng.normal(0, 0.2, 180)
        for name, ids in (("groups", groups), ("samples", None)):
            interval = metrics.bootstrap_mean(values, ids, seed=i, resamples=500)
            covers[name] += interval["low"] <= 0 <= interval["high"]
    assert covers["groups"] / 300 > 0.88
    assert covers["samples"] / 300 < 0.7


def test_cluster_bootstrap_weighs_a_large_group_by_its_samples() -> None:
    values, groups = np.array([1.0] * 9 + [0.0]), ["a"] * 9 + ["b"]
    interval = metrics.bootstrap_mean(values, groups, resamples=2000)
    assert interval["mean"] == pytest.approx(0.9)
    assert (interval["low"], interval["high"]) == (0.0, 1.0)


def test_paired_difference_agrees_with_scipy() -> None:
    rng = np.random.default_rng(2)
    b = rng.gamma(2.0, 1.0, 80)
    a = b + rng.normal(0.2, 0.5, 80)
    ours = metrics.paired_difference(a, b, resamples=10_000)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile", n_resamples=10_000, rng=3
    ).confidence_interval
    assert ours["mean"] == pytest.approx((a - b).mean())
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert ours["high"] - ours["low"] < (metrics.bootstrap_mean(a)["high"] - metrics.bootstrap_mean(a)["low"]), (
        "pairing takes the spread of the samples out"
    )


def test_bootstrap_is_the_same_for_the_same_seed_and_for_any_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(size=50)
    first = metrics.bootstrap_mean(values, seed=7)
    assert first == metrics.bootstrap_mean(values, seed=7) != metrics.bootstrap_mean(values, seed=8)
    monkeypatch.setattr(metrics, "_BLOCK", 999)
    assert metrics.bootstrap_mean(values, seed=7) == pytest.approx(first)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0]]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        metrics.bootstrap_mean(values)


def test_wrong_lengths_are_one_clear_line() -> None:
    with pytest.raises(ValueError, match="one id a value"):
        metrics.bootstrap_mean([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="both conditions"):
        metrics.paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="targets"):
        metrics.fidelity(np.ones((1, 3)), np.ones((2, 3)), np.zeros(3))


def test_covered() -> None:
    assert metrics.covered(right=0.4, none=0.2, ceiling=0.6) == pytest.approx(0.5)
    assert metrics.covered(right=0.6, none=0.2, ceiling=0.6) == pytest.approx(1.0)
    assert metrics.covered(right=0.1, none=0.2, ceiling=0.6) == pytest.approx(-0.25)
    assert metrics.covered(right=0.9, none=0.5, ceiling=0.5) is None
    assert metrics.covered(right=0.9, none=0.5, ceiling=0.4) is None


def test_fidelity_is_the_cosine_after_centring() -> None:
    rng = np.random.default_rng(4)
    a, b, mean = rng.normal(size=(5, 7)), rng.normal(size=(5, 7)), rng.normal(size=7)
    by_hand = [
        sum((x - m) * (y - m) for x, y, m in zip(a[i], b[i], mean, strict=True))
        / math.sqrt(sum((x - m) ** 2 for x, m in zip(a[i], mean, strict=True)))
        / math.sqrt(sum((y - m) ** 2 for y, m in zip(b[i], mean, strict=True)))
        for i in range(5)
    ]
    assert metrics.fidelity(a, b, mean) == pytest.approx(by_hand, abs=1e-12)
    references = [np.stack([b[i], a[i]]) for i in range(5)]
    assert metrics.reference_fidelity(a, references, mean) == pytest.approx((np.array(by_hand) + 1) / 2)
    assert metrics.fidelity(mean[None], b[:1], mean) == pytest.approx([0.0])


def test_nearest_image_is_the_one_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(5)
    images, pool = (rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (4, 11))
    pool[7] = images[2]
    by_hand = [min((((x / 255.0) - (y / 255.0)) ** 2).mean() for y in pool) for x in images]
    found = metrics.nearest_mse(images, [pool[:5], pool[5:]])
    assert found == pytest.approx(by_hand, abs=1e-6)
    assert found[2] == pytest.approx(0, abs=1e-6)


def test_copying_catches_a_pasted_reference_and_a_pasted_training_image() -> None:
    rng = np.random.default_rng(6)
    targets, other, training = (rng.integers(0, 256, (4, 16, 16, 3), np.uint8) for _ in range(3))
    references = [rng.integers(0, 256, (3, 16, 16, 3), np.uint8) for _ in range(4)]
    made = np.stack([references[0][1], targets[1], training[2], other[3]])
    made[0] = np.clip(made[0].astype(int) + rng.integers(-20, 21, made[0].shape), 0, 255)  # a slightly noisy copy
    found = metrics.copying(made, references, targets, [training], threshold=0.01)
    assert found["copied_reference"] == 0.25
    assert found["copied_training"] == 0.25
    assert 0.25 <= found["nearer_to_reference"] <= 0.75
    honest = metrics.copying(targets, references, targets, [training], threshold=0.01)
    assert honest["copied_reference"] == honest["nearer_to_reference"] == honest["copied_training"] == 0


@pytest.mark.parametrize(("count", "width"), [(200, 12), (15, 40)])
def test_fid_is_the_frechet_distance_of_scipy(count: int, width: int) -> None:
    """With the root of the matrix product by scipy, for sets larger than the features are wide, and smaller."""
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(7)
    mix = rng.normal(size=(width, width))
    a, b = rng.normal(size=(count, width)), rng.normal(1, 2, size=(count + 9, width)) @ mix
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covariance_a @ covariance_b)
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root.real)
    assert metrics.fid(a, b) == pytest.approx(theirs, rel=1e-6)
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-6 * width)


def test_kid_is_the_unbiased_discrepancy_of_scikit_learns_kernel() -> None:
    from sklearn.metrics.pairwise import polynomial_kernel

    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(30, 6)), rng.normal(0.3, 1, size=(41, 6))
    kernel = [polynomial_kernel(x, y, degree=3, gamma=1 / 6, coef0=1) for x, y in ((a, a), (b, b), (a, b))]
    pairs = [[k[i, j] for i in range(len(k)) for j in range(len(k)) if i != j] for k in kernel[:2]]
    assert metrics.kid(a, b) == pytest.approx(np.mean(pairs[0]) + np.mean(pairs[1]) - 2 * kernel[2].mean())
    same = [metrics.kid(*rng.normal(size=(2, 40, 6))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**0.5, "unbiased: zero on average for equal distributions"


def test_diversity_is_one_minus_the_mean_cosine_of_pairs() -> None:
    rng = np.random.default_rng(9)
    features, mean = rng.normal(size=(4, 7)), rng.normal(size=7)
    cosines = [metrics.fidelity(features[i : i + 1], features[j : j + 1], mean)[0] for i in range(4) for j in range(i)]
    found = metrics.diversity([features, np.tile(features[:1], (3, 1))], mean)
    assert found == pytest.approx([1 - np.mean(cosines), 0])


def test_bootstrap_columns_are_the_bootstrap_of_each() -> None:
    values, groups = np.random.default_rng(10).normal(size=(40, 3)), np.arange(40) // 4
    found = metrics.bootstrap_means(values, groups, seed=5)
    for interval, column in zip(found, values.T, strict=True):
        assert interval == pytest.approx(metrics.bootstrap_mean(column, groups, seed=5))
