"""Measures against plain computations and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.metrics import structural_similarity

from tokenizer.metrics import bits_per_pixel, ms_ssim, perplexity, psnr, ssim, usage

UNIT = st.floats(0, 1, width=32)
COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)


@given(
    images=arrays(np.float32, (2, 2, 3, 4), elements=UNIT), references=arrays(np.float32, (2, 2, 3, 4), elements=UNIT)
)
def test_psnr_of_each_image_equals_the_plain_computation(images, references):
    scores = psnr(torch.from_numpy(images), torch.from_numpy(references))
    assert scores.dtype == torch.float64
    for score, image, reference in zip(scores.tolist(), images, references, strict=True):
        error = np.mean((image.astype(np.float64) - reference) ** 2)
        expected = math.inf if error == 0 else 10 * math.log10(1 / error)
        assert score == pytest.approx(expected, rel=1e-9)


def test_psnr_of_an_error_of_a_tenth_everywhere_is_20_decibels():
    references = torch.full((3, 3, 8, 8), 0.5, dtype=torch.float64)
    torch.testing.assert_close(psnr(references + 0.1, references), torch.full((3,), 20.0, dtype=torch.float64))


def test_psnr_of_equal_images_is_infinite_and_of_the_opposite_0():
    black = torch.zeros(1, 3, 4, 4)
    assert psnr(black, black).tolist() == [math.inf]
    assert psnr(black, 1 - black).tolist() == [0.0]


def noisy_pair(size, seed=0, noise=0.2):
    """A smooth picture, and itself with noise, (2, 3, *size) each."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (smooth + noise * torch.randn(smooth.shape, generator=generator)).clamp(0, 1), smooth


@pytest.mark.parametrize("size", [(11, 11), (32, 32), (47, 20)])
def test_ssim_equals_scikit_image_at_the_settings_of_the_paper(size):
    images, references = noisy_pair(size)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [
        structural_similarity(x.double().numpy(), y.double().numpy(), channel_axis=0, **settings)
        for x, y in zip(images, references, strict=True)
    ]
    scores = ssim(images, references)
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx(expected, abs=1e-9)


def plain_terms(x, y):
    """Mean contrast and mean similarity of two planes, window by window."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    window /= window.sum()
    contrasts, similarities = [], []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = x[row : row + 11, column : column + 11], y[row : row + 11, column : column + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            variance_a, variance_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            contrast = (2 * covariance + 0.0009) / (variance_a + variance_b + 0.0009)
            contrasts.append(contrast)
            similarities.append(contrast * (2 * mean_a * mean_b + 0.0001) / (mean_a**2 + mean_b**2 + 0.0001))
    return np.mean(contrasts), np.mean(similarities)


def test_ms_ssim_equals_a_plain_computation():
    images, references = noisy_pair((180, 177))
    x, y = images[0, :1].double().numpy()[0], references[0, :1].double().numpy()[0]
    expected = 1.0
    for scale, weight in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):
        contrast, similarity = plain_terms(x, y)
        expected *= (similarity if scale == 4 else contrast) ** weight
        x, y = (
            plane[: plane.shape[0] // 2 * 2, : plane.shape[1] // 2 * 2]
            .reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2)
            .mean((1, 3))
            for plane in (x, y)
        )
    assert ms_ssim(images[:1, :1], references[:1, :1]).item() == pytest.approx(expected, rel=1e-9)


def test_ms_ssim_is_the_mean_over_channels_and_a_negative_contrast_counts_as_0():
    images, references = noisy_pair((176, 176))
    single = [ms_ssim(images[:, [channel]], references[:, [channel]]) for channel in range(3)]
    torch.testing.assert_close(ms_ssim(images, references), torch.stack(single).mean(0))
    assert ms_ssim(1 - images, images).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_similarity_is_1_for_equal_images_symmetric_and_falls_with_noise(measure):
    little, smooth = noisy_pair((176, 180), noise=0.05)
    much, _ = noisy_pair((176, 180), noise=0.3)
    torch.testing.assert_close(measure(smooth, smooth), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(measure(little, smooth), measure(smooth, little))
    assert (measure(much, smooth) < measure(little, smooth)).all()


@pytest.mark.parametrize(("measure", "smallest"), [(ssim, 11), (ms_ssim, 176)])
def test_similarity_refuses_pictures_smaller_than_its_windows(measure, smallest):
    small = torch.zeros(1, 3, smallest - 1, smallest)
    with pytest.raises(ValueError, match=f"{smallest - 1} x {smallest} must have sides of {smallest}: "):
        measure(small, small)


@pytest.mark.parametrize("measure", [psnr, ssim, ms_ssim])
@pytest.mark.parametrize(
    ("images", "references", "message"),
    [
        (
            torch.zeros(1, 3, 4, 4),
            torch.zeros(2, 3, 4, 4),
            r"shapes \(1, 3, 4, 4\) and \(2, 3, 4, 4\) must be the same",
        ),
        (torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), r"a single picture is image\[None\]"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), r"shape \(0, 3, 4, 4\) are empty"),
        (torch.full((1, 3, 4, 4), 255.0), torch.zeros(1, 3, 4, 4), r"images run from 255 to 255; .* \[0, 1\]: clamp"),
        (torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), -0.1), r"references run from -0.1 to -0.1; .* \[0, 1\]"),
        (torch.full((1, 3, 4, 4), math.nan), torch.zeros(1, 3, 4, 4), "images run from nan to nan"),
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4).byte(), "references of torch.uint8 .* divide uint8 by 255"),
    ],
)
def test_each_measure_refuses_what_is_no_pair_of_images(measure, images, references, message):
    with pytest.raises(ValueError, match=message):
        measure(images, references)


@settings(deadline=None)
@given(counts=COUNTS)
def test_usage_is_the_share_of_codes_seen(counts):
    assert usage(torch.tensor(counts)) == pytest.approx(sum(count > 0 for count in counts) / len(counts))


@settings(deadline=None)
@given(counts=COUNTS)
def test_perplexity_equals_the_plain_computation_and_lies_between_1_and_the_codes_seen(counts):
    shares = [count / sum(counts) for count in counts if count]
    found = perplexity(torch.tensor(counts))
    assert found == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert 1 <= found <= len(shares) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_of_equally_used_codes_perplexity_is_their_number_and_of_one_code_1(dtype):
    assert perplexity(torch.full((1024,), 7, dtype=dtype)) == pytest.approx(1024)
    one_code = torch.zeros(1024, dtype=dtype)
    one_code[17] = 10**6
    assert perplexity(one_code) == 1
    assert usage(one_code) == 1 / 1024


def test_counts_beyond_float32_are_not_rounded():
    counts = torch.tensor([2**25 + 1, 1.0, 1.0], dtype=torch.float64)
    assert perplexity(counts.long()) == perplexity(counts)


@pytest.mark.parametrize("measure", [usage, perplexity])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.zeros(8), "count at least one token"),
        (torch.zeros(0), "count at least one token"),
        (torch.tensor([3, -1]), "must not be negative"),
        (torch.tensor([1.0, math.nan]), "must not be negative"),
        (torch.ones(2, 4, 4), r"counts of shape \(2, 4, 4\) must be \(K,\): torch.bincount"),
    ],
)
def test_what_are_no_counts_is_refused(measure, counts, message):
    with pytest.raises(ValueError, match=message):
        measure(counts)


def test_bits_per_pixel_of_a_1024_code_grid_at_a_quarter_of_the_sides():
    assert bits_per_pixel(1024, 8 * 16, (32, 64)) == 10 / 16


@pytest.mark.parametrize("wrong", [(0, 4, (8, 8)), (16, 0, (8, 8)), (16, 4, (0, 8))])
def test_bits_per_pixel_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        bits_per_pixel(*wrong)
