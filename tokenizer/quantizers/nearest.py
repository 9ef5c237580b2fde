"""What quantizers have in common whose code is the nearest: comparison, search, lookup and losses.

Losses: van den Oord et al. 2017, arXiv:1711.00937, equation 3, each a mean over vectors and components.
Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors.
"""

from abc import abstractmethod

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .base import Quantizer, QuantizerOutput
from .gradients import GRADIENTS
from .search import nearest_codes


class NearestCodeQuantizer(Quantizer):
    """Each latent becomes its nearest code, by Euclidean distance.

    With `normalize`, latents and codes are compared and returned on the unit sphere, where that is the distance by
    cosine (ViT-VQGAN, Yu et al. 2021, arXiv:2110.04627, section 3.2). Without a `codebook_weight` no gradient reaches
    the codes.
    """

    def __init__(
        self, commitment_weight: float, gradient: str, normalize: bool = False, codebook_weight: float | None = None
    ):
        super().__init__()
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.normalize = normalize
        self.estimator = GRADIENTS[gradient]

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(K, D) float32, on the unit sphere where `normalize` says so."""

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.comparable(latents.float())
            vectors = rearrange(latents.detach(), "b d h w -> (b h w) d")
            codebook = self.codebook
            nearest = nearest_codes(vectors, codebook.detach())  # (N,)
            self.gather(vectors, nearest)
            indices = nearest.view(latents.shape[0], *latents.shape[2:])
            codes = F.embedding(indices, codebook).movedim(-1, 1)  # (B, D, h, w)
            codes = self.once_placed(codes, latents.detach())
            return QuantizerOutput(self.estimator(latents, codes), indices, self.losses(latents, codes))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def comparable(self, latents: Tensor) -> Tensor:
        """Latents (B, D, h, w) as they are compared with codes."""
        return F.normalize(latents, dim=1) if self.normalize else latents

    def losses(self, latents: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """`commitment`, which moves latents alone, and `codebook`, which moves codes alone."""
        losses = {"commitment": self.commitment_weight * F.mse_loss(latents, codes.detach())}
        if self.codebook_weight is not None:
            losses["codebook"] = self.codebook_weight * F.mse_loss(codes, latents.detach())
        return losses

    def gather(self, vectors: Tensor, nearest: Tensor) -> None:
        """Note what `step` will need of a batch: vectors (N, D) and the index of the code of each (N,)."""

    def once_placed(self, codes: Tensor, latents: Tensor) -> Tensor:
        """The codes, or in training the latents as long as the codes lie nowhere in particular."""
        return codes
