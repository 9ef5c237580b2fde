"""A ladder of Gaussian latents: each level is drawn given the one above, in the prior as in the posterior.

Ladder variational autoencoder: Sonderby et al. 2016, arXiv:1602.02282, section 2.
Shapes: B batch, D latent_dim, h w grid sides.
"""

import torch
from torch import Tensor, nn

from ..resampling import Growing, Halving, applied, halved
from ..rounding import by_parts
from .base import Posterior, check_latent_dim
from .normal import Level, Noise, as_moments, level_of, standard


class LadderPosterior(Posterior):
    """p(z) = N(z_top; 0, I) ... p(z_1 | z_2), q(z|x) = q(z_top | x) ... q(z_1 | z_2, x); the decoder takes z_1.

    z_1 has the grid of the encoder, each level above half the sides of the one below, rounded up, and all have D
    components. Bottom-up, networks of the encoder's features say for each level a mean and a variance by the image
    alone; top-down, a network of the level above says those of the prior p(z_i | z_i+1); q(z_i | z_i+1, x) is the
    product of the two, weighted by their precisions, and so never wider than the prior. With one draw of the levels
    above, the KL of a level is in closed form, and the sum over levels is the expectation that the ELBO has.

    Departures from the paper: grids and convolutions, with one residual block in each network, and no batch norm.
    """

    num_moments = 4  # mean and log-variance of the lowest level, and as many features for the levels above

    def __init__(
        self,
        latent_dim: int,
        num_levels: int = 2,  # from the decoder's grid upward, each at half the sides of the one below
        width: int = 64,  # channels within the networks between the levels
        beta: float = 1.0,  # weight of the KL; above 1 for fewer, more independent latents, below 1 for more detail
        warmup: float = 0.0,  # share of the run in which the weight rises from 0; against early collapse
        free_bits: float = 0.0,  # nats per channel and image that cost nothing; keeps every channel in use
        kl_target: float | None = None,  # nats per image at which the KL is held by a learned weight; null: none
    ):
        check_latent_dim(latent_dim)
        if num_levels < 2:
            raise ValueError(f"num_levels={num_levels} must be at least 2; one level is the posterior 'gaussian'")
        if width < 1:
            raise ValueError(f"width={width} must be at least 1 channel")
        super().__init__(num_levels * latent_dim, beta, warmup, free_bits, kl_target)
        self.latent_dim, self.num_levels = latent_dim, num_levels
        steps = range(num_levels - 1)
        # Of every level above the lowest its own moments, and of all but the topmost the features for the next.
        given = [2 * latent_dim if step == steps[-1] else 4 * latent_dim for step in steps]
        self.upward = nn.ModuleList(Halving(2 * latent_dim, width, number) for number in given)
        self.downward = nn.ModuleList(Growing(latent_dim, width, 2 * latent_dim) for _ in steps)

    def infer(self, encoded: Tensor, noise: Noise) -> list[Level]:
        moments, features = encoded.split(2 * self.latent_dim, dim=1)
        by_image = [as_moments(moments)]
        for upward in self.upward:
            moments, *rest = applied(upward, features).split(2 * self.latent_dim, dim=1)
            by_image.append(as_moments(moments))
            features = rest[0] if rest else None
        levels = [level_of(by_image[-1], standard(by_image[-1][0]), noise)]
        for downward, seen in zip(reversed(self.downward), reversed(by_image[:-1]), strict=True):
            prior = as_moments(applied(downward, levels[0].latents, seen[0].shape[2:]))
            levels.insert(0, level_of(product(seen, prior, self.training), prior, noise))
        return levels

    def draw(self, num_samples: int, grid_size: tuple[int, int], noise: Noise) -> Tensor:
        grids = [grid_size]
        for _ in self.upward:
            grids.append(halved(*grids[-1]))
        latents = noise(self.kl_weight.new_zeros(num_samples, self.latent_dim, *grids.pop()).float())
        for downward in reversed(self.downward):
            mean, log_variance = as_moments(applied(downward, latents, grids.pop()))
            latents = mean + (0.5 * log_variance).exp() * noise(mean)
        return latents


def product(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], training: bool) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the normalised product of two normal densities, each given by its own two."""
    return by_parts(multiplied, [torch.cat([*one, *other], dim=1)], training).chunk(2, dim=1)


def multiplied(numbers: Tensor) -> Tensor:
    """Both means and log-variances (B, 4 * D, h, w) to those of the product (B, 2 * D, h, w)."""
    mean, log_variance, other_mean, other_log_variance = numbers.chunk(4, dim=1)
    share = torch.sigmoid(other_log_variance - log_variance)  # of the first in the precision of both
    both = -torch.logaddexp(-log_variance, -other_log_variance)
    return torch.cat([share * mean + (1 - share) * other_mean, both], dim=1)
