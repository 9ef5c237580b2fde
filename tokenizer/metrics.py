"""Measures of reconstructions and of codebooks: pure functions on tensors, no networks.

Shapes: B batch, C channels, H W image sides, K codebook_size.
"""

import math

import torch
from torch import Tensor


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, C, H, W) twice, in [0, 1], to (B,) float64.

    Equal images give infinity. Raises ValueError where the shapes differ or a value lies outside [0, 1] or is NaN.
    """
    check_pair(images, references)
    squared_error = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    return -10 * squared_error.log10()


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


def check_counts(counts: Tensor) -> None:
    """Raise a ValueError that names the value and the rule."""
    if counts.ndim != 1:
        raise ValueError(f"counts of shape {tuple(counts.shape)} must be (K,): torch.bincount(tokens.flatten())")
    if not (counts >= 0).all() or not counts.sum() > 0:
        raise ValueError("counts must not be negative and not all zero; count at least one token")
