"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .ema_vq import EMAVectorQuantizer
from .grouped import GroupedQuantizer
from .gumbel_vq import GumbelVectorQuantizer
from .ibq import IndexBackpropagationQuantizer
from .multiscale import MultiscaleQuantizer
from .residual import ResidualQuantizer
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
