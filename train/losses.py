"""Training losses on images in [0, 1]: named, already weighted scalars.

Shapes: B batch, C channels, H W sides.
"""

from torch import Tensor

from .settings import LossSettings


def reconstruction_losses(reconstructions: Tensor, images: Tensor, settings: LossSettings) -> dict[str, Tensor]:
    """The error of (B, C, H, W) reconstructions, mean over all values, in float32, by its name."""
    error = reconstructions.float() - images
    value = error.abs().mean() if settings.reconstruction == "l1" else error.square().mean()
    return {settings.reconstruction: settings.reconstruction_weight * value}
