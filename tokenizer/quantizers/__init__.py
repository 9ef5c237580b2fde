"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .ema_vq import EMAVectorQuantizer
from .grouped import GroupedQuantizer
from .multiscale import MultiscaleQuantizer
from .residual import ResidualQuantizer

QUANTIZERS = {
    "ema_vq": EMAVectorQuantizer,
    "residual": ResidualQuantizer,
    "grouped": GroupedQuantizer,
    "multiscale": MultiscaleQuantizer,
}

__all__ = [
    "QUANTIZERS",
    "EMAVectorQuantizer",
    "GroupedQuantizer",
    "MultiscaleQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "ResidualQuantizer",
]
