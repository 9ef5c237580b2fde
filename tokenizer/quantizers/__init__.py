"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .ema_vq import EMAVectorQuantizer
from .gumbel_vq import GumbelVectorQuantizer
from .ibq import IndexBackpropagationQuantizer
from .simvq import SimVQ
from .softmax_vq import SoftmaxVectorQuantizer
from .vq import VectorQuantizer

QUANTIZERS = {
    "ema_vq": EMAVectorQuantizer,
    "vq": VectorQuantizer,
    "simvq": SimVQ,
    "softmax_vq": SoftmaxVectorQuantizer,
    "gumbel_vq": GumbelVectorQuantizer,
    "ibq": IndexBackpropagationQuantizer,
}

__all__ = ["QUANTIZERS", "EMAVectorQuantizer", "Quantizer", "QuantizerOutput"]
