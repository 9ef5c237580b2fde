"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .ema_vq import EMAVectorQuantizer

QUANTIZERS = {"ema_vq": EMAVectorQuantizer}

__all__ = ["QUANTIZERS", "EMAVectorQuantizer", "Quantizer", "QuantizerOutput"]
