"""Quantizers: continuous latents <-> indices into a codebook, one file per family, chosen by name."""

from .base import Quantizer, QuantizerOutput
from .bsq import BinarySphericalQuantizer
from .ema_vq import EMAVectorQuantizer
from .fsq import FiniteScalarQuantizer
from .grouped import GroupedQuantizer
from .gumbel_vq import GumbelVectorQuantizer
from .hierarchical import HierarchicalQuantizer
from .ibq import IndexBackpropagationQuantizer
from .lfq import LookupFreeQuantizer
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
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "residual": ResidualQuantizer,
    "grouped": GroupedQuantizer,
    "multiscale": MultiscaleQuantizer,
    "hierarchical": HierarchicalQuantizer,
}

__all__ = [
    "QUANTIZERS",
    "Quantizer",
    "QuantizerOutput",
]
