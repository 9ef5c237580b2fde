"""Training losses on images in [0, 1]: named, already weighted scalars.

Shapes: B batch, C channels, H W sides.
"""

import math

import torch
from torch import Tensor, nn

from .features import PerceptualDistance
from .settings import LossSettings

FIRST_SIGMA = 0.1  # before anything is learned; about 20 dB
HALF_STEP = 0.5 / 255  # half of the distance between two values of a pixel


class Deviation(nn.Module):
    """One standard deviation for all pixels, on the [0, 1] scale, learned or fixed.

    Learned by its logarithm, as in sigma-VAE (Rybkin et al. 2021, arXiv:2006.13202, section 3).
    """

    def __init__(self, fixed: float | None = None):
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(math.log(fixed or FIRST_SIGMA)), requires_grad=fixed is None)

    def forward(self) -> Tensor:
        return self.log_sigma.exp()


class ReconstructionLoss(nn.Module):
    """How far reconstructions are from their images: in pixels, and in the features of a network where asked for.

    `deviation` is that of `reconstruction=gaussian`, as the training program has wrapped it.
    """

    def __init__(self, settings: LossSettings, deviation: nn.Module | None = None):
        super().__init__()
        self.settings = settings
        gaussian = settings.reconstruction == "gaussian"
        self.deviation = (deviation or Deviation(settings.sigma)) if gaussian else None
        self.perceptual = PerceptualDistance(settings.perceptual) if settings.perceptual else None

    def forward(self, reconstructions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Weighted means over (B, C, H, W) reconstructions, in float32, by the name of the term."""
        settings, reconstructions = self.settings, reconstructions.float()
        losses = {settings.reconstruction: settings.reconstruction_weight * self.pixels(reconstructions, images)}
        if self.perceptual is not None:
            distances = self.perceptual(reconstructions, images)
            losses["perceptual"] = settings.perceptual_weight * distances.mean()
        return losses

    def pixels(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """The mean over pixels and channels, before its weight."""
        if self.deviation is not None:
            return gaussian_nats(images, reconstructions, self.deviation()).mean()
        error = reconstructions - images
        return error.abs().mean() if self.settings.reconstruction == "l1" else error.square().mean()

    @torch.no_grad()
    def nats(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """-log p of each image (B,), as a mean over its pixels and channels; 0 where the loss is no likelihood."""
        if self.deviation is None:
            return torch.zeros(len(images))
        sigma = self.deviation().to(images.device)
        return gaussian_nats(images, reconstructions.float(), sigma).mean(dim=(1, 2, 3))


def gaussian_nats(images: Tensor, means: Tensor, sigma: Tensor) -> Tensor:
    """-log of the probability of 8-bit pixels under N(mean, sigma^2), in nats: (B, C, H, W) twice, to the same.

    Ho et al. 2020, arXiv:2006.11239, equation 13: the mass between the halfway points to the two neighbouring values,
    from -infinity for 0 and to infinity for 1. Images are multiples of 1/255, means and sigma on the same [0, 1] scale.
    It is at least 0, the length of a code that can be written; a density would fall without end as sigma does.
    """
    below, above = (images - HALF_STEP - means) / sigma, (images + HALF_STEP - means) / sigma
    lower_tail, upper_tail = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    # Between them: log(cdf(above) - cdf(below)), on the side of the mean where both are small and not nearly 1.
    left = above + below < 0
    larger = torch.where(left, lower_tail, upper_tail)
    smaller = torch.special.log_ndtr(torch.where(left, below, -above))
    between = larger + torch.log(-torch.expm1(smaller - larger))
    return -torch.where(images < HALF_STEP, lower_tail, torch.where(images > 1 - HALF_STEP, upper_tail, between))
