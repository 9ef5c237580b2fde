"""SimVQ: frozen codes behind a learned linear map (Zhu et al. 2024, arXiv:2411.02038).

Shapes: D codebook_dim, K codebook_size.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_codebook, check_not_negative
from .nearest import NearestCodeQuantizer


class SimVQ(NearestCodeQuantizer):
    """The codebook is a frozen Gaussian one times a learned matrix, so that all codes move as one.

    No code can be left behind, so none is placed or revived. Search, output and lookup by index all use the mapped
    codes; the authors' published implementation looks up unmapped ones.
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        codebook_weight: float = 1.0,  # of the term that draws mapped codes to latents
        commitment_weight: float = 0.25,  # beta, of the term that draws latents to mapped codes
        gradient: Literal["straight_through", "rotation"] = "straight_through",  # estimator, see gradients.py
    ):
        check_codebook(codebook_dim, codebook_size)
        check_not_negative(codebook_weight=codebook_weight, commitment_weight=commitment_weight)
        super().__init__(commitment_weight, gradient, codebook_weight=codebook_weight)
        self.vocab_size = codebook_size
        self.register_buffer("frozen_codes", torch.empty(codebook_size, codebook_dim).normal_(std=codebook_dim**-0.5))
        self.map = nn.Linear(codebook_dim, codebook_dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        with torch.autocast(self.frozen_codes.device.type, enabled=False):
            return F.linear(self.frozen_codes.float(), self.map.weight.float())
