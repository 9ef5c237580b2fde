"""Independent normal distributions: their KL and density in nats, elementwise; a level of latents; noise for draws.

Variational autoencoder: Kingma and Welling 2013, arXiv:1312.6114.
Shapes: B batch, D components of a latent, h w grid sides.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ranks import own_rank_and_number

LOG_VARIANCES = -30.0, 20.0  # beyond, the clamp keeps variances finite in float32

Noise = Callable[[Tensor], Tensor]  # standard normal noise of the shape, or one draw for all of its first axis


@dataclass
class Level:
    """One level of latents: what was drawn from q or is its mean, q itself and the p that it is charged against."""

    latents: Tensor  # (B, D, h, w) float32, as are all
    mean: Tensor  # of q
    log_variance: Tensor  # of q
    prior_mean: Tensor  # of p
    prior_log_variance: Tensor  # of p

    @property
    def kl(self) -> Tensor:
        """KL(q || p) in nats, (B, D, h, w)."""
        return gaussian_kl(self.mean, self.log_variance, self.prior_mean, self.prior_log_variance)


def level_of(moments: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor], noise: Noise) -> Level:
    """Mean and log-variance of q and of p to a level; the reparameterisation, section 2.4 of the paper."""
    mean, log_variance = moments
    return Level(mean + (0.5 * log_variance).exp() * noise(mean), mean, log_variance, *prior)


def standard(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of N(0, I)."""
    return torch.zeros_like(like), torch.zeros_like(like)


def as_moments(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """What a network gave, (B, 2 * D, h, w), as mean and log-variance float32, the latter within LOG_VARIANCES."""
    mean, log_variance = numbers.float().chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCES)


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor | None = None, prior_log_variance: Tensor | None = None
) -> Tensor:
    """KL of N(mean, variance) to N(prior_mean, prior_variance), or to N(0, 1), in nats, elementwise (appendix B)."""
    if prior_mean is None or prior_log_variance is None:
        prior_mean = prior_log_variance = torch.zeros_like(mean)
    difference = log_variance - prior_log_variance
    squares = (mean - prior_mean).square() * (-prior_log_variance).exp()
    return 0.5 * (squares + difference.exp() - 1 - difference)


def gaussian_log_density(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the density of N(mean, variance), in nats, elementwise."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (values - mean).square() * (-log_variance).exp())


def draw_noise(like: Tensor) -> Tensor:
    """Standard normal noise for this rank's part (B, ...) of a batch that all ranks share.

    Ranks start from one seed and draw in step: each draws the noise of all of them and keeps its own part, so that
    they have different noise, and together that of one rank with the whole batch.
    """
    rank, num_ranks = own_rank_and_number()
    noise = torch.randn(num_ranks * len(like), *like.shape[1:], device=like.device)
    return noise[rank * len(like) : (rank + 1) * len(like)]


def noise_of(generator: torch.Generator | None) -> Noise:
    """Noise of a generator of the CPU, or of the default one, on whatever device it is needed."""
    return lambda like: torch.randn(like.shape, generator=generator).to(like.device)
