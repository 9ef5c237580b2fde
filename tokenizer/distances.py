"""Distances between sets of pictures in the features of a network, and intervals of means: pure functions on tensors.

Shapes: N pictures, D features of each, R resamples of a bootstrap.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

NUM_RESAMPLES = 1000  # R
IMAGES_PER_FEATURE = 2  # least of a Frechet distance; with fewer it says more of their number than of the pictures


@dataclass
class Estimate:
    """A mean, and the ends of its 95% interval: quantiles of a bootstrap of the pictures."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: Tensor, resampled: Tensor) -> Self:
        """From the mean () and that of each resample (R,)."""
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
        return cls(mean.item(), low, high)


def mean_estimate(values: Tensor, seed: int = 0) -> Estimate:
    """Mean of one value per picture (N,). Raises ValueError where one is infinite or NaN, or there is none."""
    if values.ndim != 1 or not len(values) or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)} must be (N,), one or more, all finite")
    values = values.double().cpu()
    resampled = torch.cat([counts @ values for counts in resamples(len(values), seed)]) / len(values)
    return Estimate.of(values.mean(), resampled)


def resamples(num_images: int, seed: int) -> Iterator[Tensor]:
    """How often each of N pictures is among N drawn with replacement, float64 (r, N), NUM_RESAMPLES rows in all."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, 2**20 // num_images)  # rows at a time, so that memory does not grow with their number
    for start in range(0, NUM_RESAMPLES, size):
        shape = (min(size, NUM_RESAMPLES - start), num_images)
        drawn = torch.randint(num_images, shape, generator=generator)
        yield torch.zeros(shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(shape, dtype=torch.float64))


@dataclass
class FeatureMoments:
    """What a Frechet distance needs of features, in float64; the sum of two is that of all their pictures."""

    count: int
    total: Tensor  # (D,)
    products: Tensor  # (D, D), sum of outer products

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features (N, D). Raises ValueError where they are none, or one is infinite or NaN."""
        check_features(features)
        values = features.double()
        return cls(len(values), values.sum(0), values.T @ values)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(moments: FeatureMoments, references: FeatureMoments) -> float:
    """Squared Frechet distance, at least 0, of the Gaussians with these moments; of Inception features it is the FID.

    Heusel et al. 2017, arXiv:1706.08500, equation 6. It is biased upwards, the more so the fewer pictures: raises
    ValueError where there are fewer than twice as many as features.
    """
    if len(moments.total) != len(references.total):
        raise ValueError(f"{len(moments.total)} and {len(references.total)} features must be those of one network")
    count, num_features = min(moments.count, references.count), len(moments.total)
    if count < IMAGES_PER_FEATURE * num_features:
        raise ValueError(
            f"{count} pictures must be at least {IMAGES_PER_FEATURE} x {num_features} features for a Frechet "
            f"distance; give more, or take kernel_distance, which is unbiased for any number"
        )
    values, vectors = torch.linalg.eigh(moments.covariance)
    root = vectors * values.clamp(min=0).sqrt()  # root @ root.T is the covariance
    # tr((A B)^(1/2)): the eigenvalues of A B = root root.T B are those of root.T B root, which is symmetric.
    common = torch.linalg.eigvalsh(root.T @ references.covariance @ root).clamp(min=0).sqrt().sum()
    squared = (moments.mean - references.mean).square().sum()
    spread = moments.covariance.trace() + references.covariance.trace()
    return max(0.0, (squared + spread - 2 * common).item())


def kernel_distance(features: Tensor, references: Tensor, seed: int = 0) -> Estimate:
    """Kernel distance (KID) of N >= 2 pictures to the N that they were made from, features (N, D) of both.

    Squared MMD of the cubic kernel of Binkowski et al. 2018, arXiv:1801.01401, section 4, by the estimator of Gretton
    et al. 2012 (JMLR 13, 723-773), lemma 6, equation 4: a mean over pairs of different pictures, so that it is unbiased
    although a picture and its reconstruction depend on each other, and may be negative. The interval resamples the
    pictures and leaves pairs of a picture with itself out. Memory grows as N x N. Raises ValueError where the shapes
    differ, N is 1, or a feature is infinite or NaN.
    """
    check_features(features)
    check_features(references)
    count = len(features)
    if features.shape != references.shape or count < 2:
        raise ValueError(
            f"features {tuple(features.shape)} and references {tuple(references.shape)} must be the same (N, D), "
            f"N at least 2: row i of both is the same picture"
        )
    terms = pair_terms(features.double(), references.double()).cpu()
    drawn = torch.cat([*resamples(count, seed)])  # (R, N)
    num_pairs = count**2 - drawn.square().sum(dim=1)
    resampled = ((drawn @ terms) * drawn).sum(dim=1) / num_pairs
    return Estimate.of(terms.sum() / (count * (count - 1)), resampled[num_pairs > 0])  # of few, one may fill a resample


def pair_terms(features: Tensor, references: Tensor) -> Tensor:
    """h of Gretton et al. 2012, lemma 6, of every pair of different pictures, (N, N); 0 on the diagonal."""
    # h((x, y), (x', y')) = k(x, x') + k(y, y') - k(x, y') - k(x', y)
    mixed = cubic_kernel(features, references)
    terms = cubic_kernel(features, features) + cubic_kernel(references, references) - mixed - mixed.T
    return terms.fill_diagonal_(0)


def cubic_kernel(left: Tensor, right: Tensor) -> Tensor:
    """(x . y / D + 1)^3 of every row (N, D) with every row (M, D), (N, M)."""
    return (left @ right.T / left.shape[1] + 1) ** 3


def check_features(features: Tensor) -> None:
    """Raise a ValueError that names the value and the rule."""
    if features.ndim != 2 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"features {tuple(features.shape)} of {features.dtype} must be floats (N, D), a row per picture"
        )
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        row = finite.logical_not().nonzero()[0].item()
        raise ValueError(f"the features of picture {row} hold NaN or infinity; check it, and the network's weights")
