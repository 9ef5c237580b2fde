"""Measures of reconstructions and of codebooks: pure functions on tensors, no networks.

Shapes: B batch, C channels, H W image sides, K codebook_size.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels: side of the Gaussian window, and its deviation
SSIM_STABILIZERS = 0.01**2, 0.03**2  # of the luminance term and of the contrast term, at a data range of 1
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, C, H, W) twice, in [0, 1], to (B,) float64.

    Equal images give infinity. Raises ValueError where the shapes differ or a value lies outside [0, 1] or is NaN.
    """
    check_pair(images, references)
    squared_error = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    return -10 * squared_error.log10()


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, at most 1: (B, C, H, W) twice, in [0, 1], to (B,) float64.

    Wang et al. 2004 (IEEE TIP 13, 600-612), equation 13: 11 x 11 Gaussian window of deviation 1.5, population
    covariance, data range 1, windows that fit the image only, the mean over them and over the channels. Raises
    ValueError as `psnr` does, and for a side below 11.
    """
    check_pair(images, references)
    check_sides(images, SSIM_WINDOW, "ssim has windows of that side")
    luminance, contrast = similarity_maps(images.double(), references.double())
    return (luminance * contrast).mean(dim=(1, 2, 3))


def ms_ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity over five scales of each image: (B, C, H, W) twice, in [0, 1], to (B,) float64.

    Wang et al. 2003 (Asilomar, 1398-1402), equation 7: contrast at each scale and luminance at the last, weighted in
    the exponent; each scale is the mean of 2 x 2 pixels of the one before, an odd last row or column left out. A
    negative mean contrast counts as 0. Raises ValueError as `psnr` does, and for a side below 176.
    """
    check_pair(images, references)
    num_halvings = len(MS_SSIM_WEIGHTS) - 1
    check_sides(images, SSIM_WINDOW * 2**num_halvings, "ms_ssim halves it 4 times and has windows of 11; take ssim")
    images, references = images.double(), references.double()
    similarity = torch.ones(images.shape[:2], dtype=torch.float64, device=images.device)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        luminance, contrast = similarity_maps(images, references)
        term = contrast if scale < num_halvings else luminance * contrast
        similarity = similarity * term.mean(dim=(2, 3)).clamp(min=0) ** weight
        images, references = F.avg_pool2d(images, 2), F.avg_pool2d(references, 2)
    return similarity.mean(dim=1)


def similarity_maps(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure terms of SSIM (Wang et al. 2004, equation 13) at each window (B, C, H', W')."""
    moments = torch.stack([images, references, images * images, references * references, images * references])
    mean_x, mean_y, square_x, square_y, product = gaussian_mean(moments.flatten(0, 2)).view(
        *moments.shape[:3], moments.shape[3] - SSIM_WINDOW + 1, moments.shape[4] - SSIM_WINDOW + 1
    )
    first, second = SSIM_STABILIZERS
    luminance = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    return luminance, (2 * (product - mean_x * mean_y) + second) / (variances + second)


def gaussian_mean(planes: Tensor) -> Tensor:
    """Weighted mean of planes (N, H, W) under each whole window, (N, H - 10, W - 10)."""
    places = torch.arange(SSIM_WINDOW, dtype=planes.dtype, device=planes.device) - SSIM_WINDOW // 2
    weights = torch.softmax(-(places**2) / (2 * SSIM_SIGMA**2), dim=0)
    by_rows = F.conv2d(planes[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(by_rows, weights.view(1, 1, 1, -1))[:, 0]


def usage(counts: Tensor) -> float:
    """Share in [0, 1] of the codes with a count above zero, from counts (K,) of tokens per code.

    Raises ValueError where a count is negative or all are zero.
    """
    check_counts(counts)
    return (counts > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the token distribution in nats, 1 to K: the number of equally used codes worth the same.

    From counts (K,) of tokens per code; ValueError as in `usage`.
    """
    check_counts(counts)
    probabilities = counts.double() / counts.double().sum()
    return torch.special.entr(probabilities).sum().exp().item()


def bits_per_pixel(vocab_size: int, num_tokens: int, image_size: tuple[int, int]) -> float:
    """Bits of `num_tokens` tokens at a uniform code, log2(vocab_size) each, per pixel of an (H, W) image."""
    if min(vocab_size, num_tokens, *image_size) < 1:
        raise ValueError(
            f"vocab_size={vocab_size}, num_tokens={num_tokens}, image_size={image_size} must be at least 1"
        )
    return num_tokens * math.log2(vocab_size) / (image_size[0] * image_size[1])


def check_pair(images: Tensor, references: Tensor) -> None:
    """Raise a ValueError that names the value and the rule."""
    if images.shape != references.shape or images.ndim != 4:
        raise ValueError(
            f"shapes {tuple(images.shape)} and {tuple(references.shape)} must be the same (B, C, H, W); "
            f"a single picture is image[None]"
        )
    if images.numel() == 0:
        raise ValueError(f"images of shape {tuple(images.shape)} are empty; pass at least one picture")
    for name, batch in [("images", images), ("references", references)]:
        if not batch.is_floating_point():
            raise ValueError(f"{name} of {batch.dtype} must be floats in [0, 1]: divide uint8 by 255")
        low, high = batch.min().item(), batch.max().item()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise ValueError(f"{name} run from {low:g} to {high:g}; they must lie in [0, 1]: clamp or rescale them")


def check_sides(images: Tensor, smallest: int, reason: str) -> None:
    """Raise a ValueError where a side of (B, C, H, W) is too small."""
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} must have sides of {smallest}: {reason}")


def check_counts(counts: Tensor) -> None:
    """Raise a ValueError that names the value and the rule."""
    if counts.ndim != 1:
        raise ValueError(f"counts of shape {tuple(counts.shape)} must be (K,): torch.bincount(tokens.flatten())")
    if not (counts >= 0).all() or not counts.sum() > 0:
        raise ValueError("counts must not be negative and not all zero; count at least one token")
