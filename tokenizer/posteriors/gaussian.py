"""One level of latents: independent normal distributions, against N(0, I).

Variational autoencoder: Kingma and Welling 2013, arXiv:1312.6114.
Shapes: B batch, D latent_dim, h w grid sides.
"""

from torch import Tensor

from .base import Posterior, check_latent_dim
from .normal import Level, Noise, as_moments, level_of, standard


class GaussianPosterior(Posterior):
    """The encoder gives mean and log-variance of each component; the prior is N(0, I)."""

    num_moments = 2

    def __init__(
        self,
        latent_dim: int,
        beta: float = 1.0,  # weight of the KL; above 1 for fewer, more independent latents, below 1 for more detail
        warmup: float = 0.0,  # share of the run in which the weight rises from 0; against early collapse
        free_bits: float = 0.0,  # nats per channel and image that cost nothing; keeps every channel in use
        kl_target: float | None = None,  # nats per image at which the KL is held by a learned weight; null: none
    ):
        check_latent_dim(latent_dim)
        super().__init__(latent_dim, beta, warmup, free_bits, kl_target)
        self.latent_dim = latent_dim

    def infer(self, encoded: Tensor, noise: Noise) -> list[Level]:
        moments = as_moments(encoded)
        return [level_of(moments, standard(moments[0]), noise)]

    def draw(self, num_samples: int, grid_size: tuple[int, int], noise: Noise) -> Tensor:
        return noise(self.kl_weight.new_zeros(num_samples, self.latent_dim, *grid_size).float())
