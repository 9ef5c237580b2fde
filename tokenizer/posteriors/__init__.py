"""Posteriors: what an encoder says of an image's latents as a distribution, one file per family, chosen by name."""

from .base import Posterior, PosteriorOutput
from .gaussian import GaussianPosterior
from .ladder import LadderPosterior

POSTERIORS = {"gaussian": GaussianPosterior, "ladder": LadderPosterior}

__all__ = ["POSTERIORS", "Posterior", "PosteriorOutput"]
