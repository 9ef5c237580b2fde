"""Vector quantization with a codebook that follows the latents by exponential moving averages.

EMA update: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; smoothing: Sonnet's VectorQuantizerEMA.
k-means is a special case: with `decay=0` and the whole data as one batch, a step is one step of Lloyd's algorithm.
Shapes: D codebook_dim, K codebook_size, N vectors of a batch.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .placement import PlacedQuantizer

SMOOTHING = 1e-5  # Laplace pseudo-count of a code (Sonnet's epsilon)


class EMAVectorQuantizer(PlacedQuantizer):
    """VQ-VAE's quantizer: each code is the running mean of the latents that chose it, and no gradient reaches it.

    Codes are placed and revived as in `PlacedQuantizer`. A code is the quotient of two averages at each use, so that
    the codebook and its statistics can never disagree. At `decay=0` it is k-means, one step of it for each batch.
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        decay: float = 0.99,  # of the moving averages, per optimizer step; it rises to this, see `step`
        commitment_weight: float = 0.25,  # beta in equation 3 of the paper
        normalize: bool = False,  # latents and codes on the unit sphere
        placement: float = 0.1,  # share of the run that is done when the codes are placed
        revival_threshold: float = 0.05,  # a code used less than this share of the mean is moved; 0 never moves one
        gradient: Literal["straight_through", "rotation"] = "straight_through",  # estimator, see gradients.py
    ):
        options = {"gradient": gradient, "normalize": normalize}
        super().__init__(codebook_dim, codebook_size, decay, placement, revival_threshold, commitment_weight, **options)
        self.register_buffer("ema_sum", torch.randn(codebook_size, codebook_dim))

    @property
    def codebook(self) -> Tensor:
        """(K, D) float32, derived from the averages at each use, so that the two can never disagree."""
        if self.normalize:
            return F.normalize(self.ema_sum.float(), dim=1)
        return self.ema_sum.float() / smoothed(self.ema_count.float())[:, None]

    def statistics(self, vectors: Tensor, nearest: Tensor) -> list[Tensor]:
        """How many vectors chose each code (K,), and their sums (K, D)."""
        sums = torch.zeros_like(self.ema_sum, dtype=torch.float32).index_add_(0, nearest, vectors)
        return [*super().statistics(vectors, nearest), sums]

    def move(self, sums: list[Tensor], share: float) -> None:
        super().move(sums, share)
        self.ema_sum.lerp_(sums[1], share)

    def put(self, codes: Tensor, which: Tensor | slice) -> None:
        self.ema_sum[which] = codes * smoothed(self.ema_count)[which, None]


def smoothed(count: Tensor) -> Tensor:
    """Counts (K,) with Laplace smoothing, their total unchanged."""
    total = count.sum()
    return (count + SMOOTHING) / (total + len(count) * SMOOTHING) * total
