"""Distances in features against closed forms, scipy and plain loops; intervals against plain resampling."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.distances import (
    NUM_RESAMPLES,
    FeatureMoments,
    frechet_distance,
    kernel_distance,
    mean_estimate,
    resamples,
)

SEEDS = st.integers(0, 2**32 - 1)


def drawn(count: int, num_features: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Correlated features (count, num_features) whose mean is far from 0 beside their spread."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_features, num_features, generator=generator)
    return torch.randn(count, num_features, generator=generator) @ mix + 5 + shift


def moments_with(mean: list[float], covariance: np.ndarray, count: int = 100) -> FeatureMoments:
    mean, covariance = torch.tensor(mean).double(), torch.from_numpy(covariance)
    return FeatureMoments(count, count * mean, (count - 1) * covariance + count * torch.outer(mean, mean))


@settings(deadline=None)
@given(seed=SEEDS)
def test_frechet_distance_of_gaussians_that_share_their_axes_is_the_closed_form(seed):
    random = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(random.normal(size=(4, 4)))
    means, deviations = random.normal(size=(2, 4)), random.uniform(0, 3, (2, 4))
    pair = [moments_with([*mean], axes * each**2 @ axes.T) for mean, each in zip(means, deviations, strict=True)]
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_frechet_distance_equals_the_matrix_root_of_scipy_and_is_symmetric(seed):
    pair = drawn(40, 6, seed), drawn(30, 6, seed + 1, shift=0.5)
    (mean, covariance), (other_mean, other) = (
        (each.double().mean(0).numpy(), np.cov(each.double().T)) for each in pair
    )
    root = scipy.linalg.sqrtm(covariance @ other).real
    expected = np.sum((mean - other_mean) ** 2) + np.trace(covariance + other - 2 * root)
    moments = [FeatureMoments.of(each) for each in pair]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(*moments[::-1]) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_the_same_pictures_is_0_even_where_features_repeat_each_other():
    features = drawn(20, 3)
    moments = FeatureMoments.of(torch.cat([features, features], dim=1))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)


def test_moments_of_parts_add_up_to_those_of_the_whole():
    features = drawn(30, 4)
    parts = FeatureMoments.of(features[:7]) + FeatureMoments.of(features[7:8]) + FeatureMoments.of(features[8:])
    torch.testing.assert_close(parts.mean, features.double().mean(0))
    torch.testing.assert_close(parts.covariance, features.double().T.cov())
    assert parts.count == 30


@pytest.mark.parametrize("counts", [(7, 50), (50, 7)])
def test_frechet_distance_of_fewer_than_twice_as_many_pictures_as_features_is_refused(counts):
    moments = [FeatureMoments.of(drawn(count, 4)) for count in counts]
    with pytest.raises(ValueError, match="7 pictures must be at least 2 x 4 features .* take kernel_distance"):
        frechet_distance(*moments)
    frechet_distance(*(FeatureMoments.of(drawn(8, 4, seed)) for seed in (0, 1)))


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(ValueError, match="4 and 3 features must be those of one network"):
        frechet_distance(FeatureMoments.of(drawn(9, 4)), FeatureMoments.of(drawn(9, 3)))


def plain_kernel_distance(features: torch.Tensor, references: torch.Tensor) -> float:
    """Mean over all pairs of different pictures, one by one."""

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3

    x, y = features.tolist(), references.tolist()
    pairs = list(itertools.permutations(range(len(x)), 2))
    terms = [kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs]
    return sum(terms) / len(pairs)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, count=st.integers(2, 9))
def test_kernel_distance_equals_the_plain_double_loop(seed, count):
    features, references = drawn(count, 3, seed), drawn(count, 3, seed + 1)
    expected = plain_kernel_distance(features, references)
    assert kernel_distance(features, references).mean == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_kernel_distance_is_unbiased_although_picture_and_reconstruction_depend_on_each_other(seed):
    pictures = drawn(4, 2, seed).double()
    reconstructions = pictures + 0.1 * drawn(4, 2, seed + 1)  # each near its own picture
    every_sample = itertools.product(range(4), repeat=3)  # all samples of three pairs, equally likely
    mean = np.mean([plain_kernel_distance(reconstructions[[*s]], pictures[[*s]]) for s in every_sample])

    def kernel(x, y):
        return ((x @ y.T / 2 + 1) ** 3).mean().item()  # of independent draws

    exact = (
        kernel(reconstructions, reconstructions) + kernel(pictures, pictures) - 2 * kernel(reconstructions, pictures)
    )
    assert mean == pytest.approx(exact, rel=1e-9, abs=1e-6)


def test_kernel_distance_of_the_same_pictures_is_0_and_grows_with_the_difference():
    pictures = drawn(50, 4)
    found = [kernel_distance(pictures + shift, pictures) for shift in (0.0, 0.1, 1.0)]
    assert (found[0].mean, found[0].low, found[0].high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert found[0].high < found[1].mean < found[2].mean
    assert all(each.low <= each.mean <= each.high for each in found[1:])


def test_the_interval_of_two_pictures_is_their_distance_itself():
    estimate = kernel_distance(drawn(2, 3), drawn(2, 3, seed=1))
    assert (estimate.low, estimate.high) == pytest.approx((estimate.mean, estimate.mean))


def test_the_interval_of_a_kernel_distance_is_that_of_resampled_pictures():
    features, references = drawn(6, 2), drawn(6, 2, seed=1)
    found = []
    for counts in torch.cat([*resamples(6, seed=3)]):
        chosen = [picture for picture, count in enumerate(counts.int().tolist()) for _ in range(count)]
        pairs = [(i, j) for i, j in itertools.product(chosen, repeat=2) if i != j]
        terms = [plain_kernel_distance(features[[*pair]], references[[*pair]]) for pair in set(pairs)]
        weights = [pairs.count(pair) for pair in set(pairs)]
        found.append(np.average(terms, weights=weights))
    estimate = kernel_distance(features, references, seed=3)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), rel=1e-6)


def test_the_interval_of_a_mean_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    samples = torch.from_numpy(random.exponential(size=(50, 60)))
    covered = [each.low <= 1 <= each.high for each in map(mean_estimate, samples)]
    assert 42 <= sum(covered) <= 50


def test_the_mean_and_its_seed():
    values = torch.arange(10.0)
    assert mean_estimate(values).mean == 4.5
    assert mean_estimate(values, seed=1) == mean_estimate(values, seed=1)
    assert mean_estimate(values, seed=1) != mean_estimate(values, seed=2)
    assert mean_estimate(values[:1]) == type(mean_estimate(values))(0.0, 0.0, 0.0)


def test_a_resample_has_as_many_pictures_as_there_are():
    counts = torch.cat([*resamples(7, seed=0)])
    assert counts.shape == (NUM_RESAMPLES, 7)
    assert sum(map(len, resamples(5000, seed=0))) == NUM_RESAMPLES  # which come in several parts
    assert (counts.sum(dim=1) == 7).all()
    torch.testing.assert_close(counts.mean(dim=0), torch.ones(7).double(), atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(4, 2, 2), r"features \(4, 2, 2\) of torch.float32 must be floats \(N, D\)"),
        (torch.zeros(0, 2), r"features \(0, 2\) of torch.float32 must be"),
        (torch.zeros(4, 2).long(), "of torch.int64 must be floats"),
        (torch.tensor([[0.0, 0.0], [1.0, math.nan]]), "the features of picture 1 hold NaN or infinity"),
        (torch.tensor([[math.inf, 0.0], [1.0, 0.0]]), "the features of picture 0 hold NaN or infinity"),
    ],
)
def test_what_are_no_features_is_refused(features, message):
    for measure in (FeatureMoments.of, lambda each: kernel_distance(torch.zeros(2, 2), each)):
        with pytest.raises(ValueError, match=message):
            measure(features)


@pytest.mark.parametrize(("count", "other"), [(3, 4), (1, 1)])
def test_kernel_distance_needs_pairs_of_pictures(count, other):
    with pytest.raises(ValueError, match=rf"features \({count}, 2\) and references \({other}, 2\) .* N at least 2"):
        kernel_distance(torch.zeros(count, 2), torch.zeros(other, 2))


@pytest.mark.parametrize("values", [torch.tensor([1.0, math.inf]), torch.zeros(0), torch.zeros(2, 2)])
def test_a_mean_of_what_has_none_is_refused(values):
    with pytest.raises(ValueError, match=r"must be \(N,\), one or more, all finite"):
        mean_estimate(values)
