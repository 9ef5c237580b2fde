"""tokengrid: images <-> grids of discrete tokens, or of continuous latents."""

from .config import TokenizerConfig, VAEConfig
from .model import ImageTokenizer, TokenizerOutput
from .posteriors import POSTERIORS
from .pretrained import ModelCard
from .quantizers import QUANTIZERS, Quantizer, QuantizerOutput
from .vae import ImageVAE, VAEOutput

__all__ = [
    "POSTERIORS",
    "QUANTIZERS",
    "ImageTokenizer",
    "ImageVAE",
    "ModelCard",
    "Quantizer",
    "QuantizerOutput",
    "TokenizerConfig",
    "TokenizerOutput",
    "VAEConfig",
    "VAEOutput",
]
