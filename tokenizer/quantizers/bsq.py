"""Binary spherical quantization: signs of latents on the unit sphere; the codebook is never stored.

Zhao et al. 2024, arXiv:2406.07548, section 4.
Shapes: B batch, D codebook_dim and number of bits, h w grid sides.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from .lfq import LookupFreeQuantizer


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """BSQ: latents at unit length, codes of -1/sqrt(D) and 1/sqrt(D), so that a code is never far from its latents.

    Indices, losses and groups are those of lfq. The paper's soft code is proportional to exp(tau * code . u), which is
    lfq's at inverse_temperature = tau / 2, latents and codes being of unit length. The gradient goes straight through
    to the latents at unit length, and on through the division by their length.
    """

    def __init__(
        self,
        codebook_dim: int,  # D, the number of bits
        entropy_weight: float = 0.1,  # of both entropies
        diversity: float = 1.0,  # gamma, of the batch's entropy against the vectors'
        inverse_temperature: float = 100.0,
        commitment_weight: float = 0.25,
        bits_per_group: int = 18,  # whose entropy in the batch is exact
    ):
        super().__init__(
            codebook_dim, entropy_weight, diversity, inverse_temperature, commitment_weight, bits_per_group
        )
        self.scale = 1 / math.sqrt(codebook_dim)

    def compared(self, latents: Tensor) -> Tensor:
        """The latents (B, D, h, w) at unit length."""
        return F.normalize(latents, dim=1)
