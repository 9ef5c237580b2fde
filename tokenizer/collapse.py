"""How much a posterior q(z|x) tells of its image: pure functions by which posterior collapse is seen.

Shapes: N images, D latent_dim, h w grid sides; means and log-variances of independent normal distributions.
"""

import math

import torch
from torch import Tensor

from .posteriors.normal import gaussian_log_density

ACTIVE_VARIANCE = 0.01  # of a latent's posterior mean over the images (Burda et al. 2016, arXiv:1509.00519)


def kl_per_channel(kl: Tensor) -> Tensor:
    """KL in nats per image of each channel (D,), summed over its positions, from that of each latent (N, D, h, w)."""
    return kl.sum((2, 3)).mean(0)


def active_units(mean: Tensor) -> Tensor:
    """Which latents differ from image to image: means (N, ...) to bool (...); ValueError for fewer than two images."""
    if len(mean) < 2:
        raise ValueError(f"means of {len(mean)} images have no variance; pass those of at least 2")
    return mean.double().var(0) > ACTIVE_VARIANCE


def mutual_information(mean: Tensor, log_variance: Tensor, latents: Tensor) -> float:
    """Of image and latents under q, in nats: (N, ...) three times, one draw of the latents for each image.

    Hoffman and Johnson 2016 ("ELBO surgery"): I = E KL(q(z|x) || p) - KL(q(z) || p). Both are Monte Carlo estimates
    from the same draws, in which p drops out; q(z) is the mixture of the N posteriors (He et al. 2019,
    arXiv:1901.05534). So it is at most log(N), whatever the latents hold.
    """
    mean, log_variance, latents = (each.double().flatten(1) for each in (mean, log_variance, latents))  # (N, M)
    precision = (-log_variance).exp()
    # log q(z_i | x_n) for all pairs by matrix products, so that memory never grows as N x N x M: (N draws, N images)
    squares = latents.square() @ precision.T - 2 * latents @ (mean * precision).T + (mean.square() * precision).sum(1)
    pairs = -0.5 * (squares + log_variance.sum(1) + mean.shape[1] * math.log(2 * math.pi))
    own = gaussian_log_density(latents, mean, log_variance).sum(1)
    aggregate = torch.logsumexp(pairs, dim=1) - math.log(len(mean))
    return (own - aggregate).mean().item()
