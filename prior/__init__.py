"""tokengrid: p(tokens), a prior over the grids of discrete tokens that a tokenizer makes."""

from .autoregressive import PRIORS, AutoregressivePrior
from .config import SIZES, PriorConfig

__all__ = ["PRIORS", "SIZES", "AutoregressivePrior", "PriorConfig"]
