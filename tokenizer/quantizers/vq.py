"""Vector quantization with a codebook that learns by gradient (van den Oord et al. 2017, arXiv:1711.00937, equation 3).

Shapes: D codebook_dim, K codebook_size.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_not_negative
from .placement import PlacedQuantizer

USAGE_DECAY = 0.99  # of the running counts by which revival judges a code


class LearnedCodebook(PlacedQuantizer):
    """A codebook that the optimizer moves, placed and revived as in `PlacedQuantizer`.

    What an optimizer remembers of a code stays when the code is put elsewhere. Before placement no gradient reaches
    the codes, and a code that is revived has hardly had one for long, so that its momentum has faded; Adam's step is a
    few learning rates at most, whatever the second moment, and the quantizer need know no optimizer.
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int,
        placement: float,
        revival_threshold: float,
        commitment_weight: float,
        **comparison: str | bool | float,
    ):
        judged = (USAGE_DECAY, placement, revival_threshold)
        super().__init__(codebook_dim, codebook_size, *judged, commitment_weight, **comparison)
        self.codes = nn.Embedding(codebook_size, codebook_dim)

    @property
    def codebook(self) -> Tensor:
        codes = self.codes.weight.float()
        return F.normalize(codes, dim=1) if self.normalize else codes

    def put(self, codes: Tensor, which: Tensor | slice) -> None:
        self.codes.weight[which] = codes.to(self.codes.weight.dtype)


class VectorQuantizer(LearnedCodebook):
    """The original VQ-VAE's: `codebook` draws codes to latents that chose them, `commitment` latents to their codes."""

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        codebook_weight: float = 1.0,  # of the second term of equation 3
        commitment_weight: float = 0.25,  # beta, of the third
        normalize: bool = False,  # latents and codes on the unit sphere: the nearest code by cosine
        placement: float = 0.1,  # share of the run that is done when the codes are placed
        revival_threshold: float = 0.05,  # a code used less than this share of the mean is moved; 0 never moves one
        gradient: Literal["straight_through", "rotation"] = "straight_through",  # estimator, see gradients.py
    ):
        check_not_negative(codebook_weight=codebook_weight)
        options = {"gradient": gradient, "normalize": normalize, "codebook_weight": codebook_weight}
        super().__init__(codebook_dim, codebook_size, placement, revival_threshold, commitment_weight, **options)
