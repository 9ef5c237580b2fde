"""Product quantization: the components of a latent split into groups, each quantized by itself.

Jegou et al. 2011, Product quantization for nearest neighbor search, section II-B. Over `residual` it is the grouped
residual quantization of HiFi-Codec (Yang et al. 2023, arXiv:2305.02765).
Shapes: B batch, D codebook_dim, h w grid sides, q indices of a place.
"""

from typing import Any

import torch
from torch import Tensor

from .base import QuantizerOutput
from .checks import check_codebook_dim
from .parts import DEFAULT_PART, CompositeQuantizer, build_part


class GroupedQuantizer(CompositeQuantizer):
    """`groups` quantizers over D / groups components each; of residual groups the indices stand group after group.

    The losses are means over the groups, which makes of mean squared errors those of the whole latents.
    """

    def __init__(
        self,
        codebook_dim: int,
        each: dict[str, Any] = DEFAULT_PART,  # the quantizer of a group and its hyperparameters; may be residual
        groups: int = 2,  # of equally many of the components
    ):
        super().__init__()
        check_codebook_dim(codebook_dim)
        if groups < 1 or codebook_dim % groups:
            raise ValueError(
                f"groups={groups} must divide codebook_dim={codebook_dim}: each group takes as many components"
            )
        self.parts = torch.nn.ModuleList(
            build_part(each, codebook_dim // groups, "grouped", also=("residual",)) for _ in range(groups)
        )
        if groups * self.parts[0].num_codebooks == 1:
            raise ValueError("groups=1 is its part by itself; give at least 2, or name the part as the quantizer")
        self.vocab_size = self.parts[0].vocab_size
        self.num_codebooks = groups * self.parts[0].num_codebooks

    def code_numbers(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        chunks = indices.chunk(len(self.parts), dim=-1)
        numbered = [part.code_numbers(each, grid_size) for part, each in zip(self.parts, chunks, strict=True)]
        return torch.cat([each + self.parts[0].num_codes * group for group, each in enumerate(numbered)], dim=-1)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        chunks = latents.float().chunk(len(self.parts), dim=1)
        outputs = [part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)]
        quantized = torch.cat([output.quantized for output in outputs], dim=1)
        indices = torch.cat([output.indices.reshape(*quantized[:, 0].shape, -1) for output in outputs], dim=-1)
        means = {name: sum(each.losses[name] for each in outputs) / len(outputs) for name in outputs[0].losses}
        return QuantizerOutput(quantized, indices, means)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w, q) to codes (B, D, h, w) float32."""
        chunks = indices.chunk(len(self.parts), dim=-1)  # (B, h, w, q / groups)
        if self.num_codebooks == len(self.parts):
            chunks = [chunk[..., 0] for chunk in chunks]
        return torch.cat([part.indices_to_codes(each) for part, each in zip(self.parts, chunks, strict=True)], dim=1)
