"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .bsq import BinarySphericalQuantizer
from .ema_vq import EMAVectorQuantizer
from .fsq import FiniteScalarQuantizer
from .lfq import LookupFreeQuantizer

QUANTIZERS = {
    "ema_vq": EMAVectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
}

__all__ = [
    "QUANTIZERS",
    "BinarySphericalQuantizer",
    "EMAVectorQuantizer",
    "FiniteScalarQuantizer",
    "LookupFreeQuantizer",
    "Quantizer",
    "QuantizerOutput",
]
