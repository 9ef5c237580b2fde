"""Training losses on images in [0, 1]: named, already weighted scalars.

Shapes: B batch, C channels, H W sides.
"""

from torch import Tensor, nn

from .features import PerceptualDistance
from .settings import LossSettings


class ReconstructionLoss(nn.Module):
    """How far reconstructions are from their images: in pixels, and in the features of a network where asked for."""

    def __init__(self, settings: LossSettings):
        super().__init__()
        self.settings = settings
        self.perceptual = PerceptualDistance(settings.perceptual) if settings.perceptual else None

    def forward(self, reconstructions: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Weighted means over (B, C, H, W) reconstructions, in float32, by the name of the term."""
        settings, reconstructions = self.settings, reconstructions.float()
        error = reconstructions - images
        value = error.abs().mean() if settings.reconstruction == "l1" else error.square().mean()
        losses = {settings.reconstruction: settings.reconstruction_weight * value}
        if self.perceptual is not None:
            distances = self.perceptual(reconstructions, images)
            losses["perceptual"] = settings.perceptual_weight * distances.mean()
        return losses
