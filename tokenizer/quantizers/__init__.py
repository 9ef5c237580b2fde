"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .ema_vq import EMAVectorQuantizer
from .grouped import GroupedQuantizer
from .residual import ResidualQuantizer

QUANTIZERS = {
    "ema_vq": EMAVectorQuantizer,
    "residual": ResidualQuantizer,
    "grouped": GroupedQuantizer,
}

__all__ = [
    "QUANTIZERS",
    "EMAVectorQuantizer",
    "GroupedQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "ResidualQuantizer",
]
