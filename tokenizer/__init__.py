"""tokengrid: images <-> grids of discrete tokens."""

from .config import TokenizerConfig
from .model import ImageTokenizer, TokenizerOutput
from .pretrained import ModelCard
from .quantizers import QUANTIZERS, Quantizer, QuantizerOutput

__all__ = [
    "QUANTIZERS",
    "ImageTokenizer",
    "ModelCard",
    "Quantizer",
    "QuantizerOutput",
    "TokenizerConfig",
    "TokenizerOutput",
]
