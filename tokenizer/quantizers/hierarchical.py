"""Two-level quantization: a coarse grid of codes, and a fine one whose latents are computed given the coarse codes.

VQ-VAE-2, Razavi et al. 2019, arXiv:1906.00446, section 3.1, figure 2a and algorithm 1.
Shapes: B batch, D codebook_dim, h w grid sides, L places of both grids together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..resampling import Growing, Halving, applied, halved
from .base import Quantizer, QuantizerOutput
from .checks import check_codebook_dim
from .parts import DEFAULT_PART, SuccessiveQuantizer, build_part, evaluated


class HierarchicalQuantizer(SuccessiveQuantizer):
    """Top codes at half the sides, then bottom codes given them; indices are those of the top, then of the bottom.

    The networks between the two are part of the quantizer, so that it goes with any encoder and decoder: `to_top`
    halves the grid of the latents, `from_top` decodes the top codes on the grid of the bottom, `to_bottom` computes
    the bottom latents from the latents and the decoded top, and `merge` gives the decoder both. Each level has a
    codebook of its own, both of one size, and passes its gradient as its part says. The losses are summed over levels.

    Departures from the paper: the latents that both levels start from, and what the decoder sees of both, have D
    components; one network decodes the top for the bottom and for the decoder; one residual block in each network.

    At first the bottom is one level by itself, to which a mixture of the decoded top is added, before and after it is
    quantized: from random mixtures training starts slowly.

    The bottom is placed on what it is given once the top is placed. Without the bottom nothing decodes: the decoder
    has never seen the top alone.
    """

    multiscale = True

    def __init__(
        self,
        codebook_dim: int,
        each: dict[str, Any] = DEFAULT_PART,  # the quantizer of a level and its hyperparameters
        width: int = 64,  # channels within the networks between the levels
    ):
        super().__init__()
        check_codebook_dim(codebook_dim)
        if width < 1:
            raise ValueError(f"width={width} must be at least 1 channel")
        self.top, self.bottom = (build_part(each, codebook_dim, "hierarchical") for _ in range(2))
        self.vocab_size = self.top.vocab_size
        self.to_top = Halving(codebook_dim, width, codebook_dim)
        self.from_top = Growing(codebook_dim, width, codebook_dim)
        self.to_bottom, self.merge = (joining(codebook_dim) for _ in range(2))

    @property
    def parts(self) -> tuple[Quantizer, Quantizer]:
        return self.top, self.bottom

    def code_numbers(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        top, bottom = self.levels(indices, grid_size)
        numbers = self.top.code_numbers(top, grid_size), self.bottom.code_numbers(bottom, grid_size)
        return torch.cat([numbers[0].flatten(1), numbers[1].flatten(1) + self.top.num_codes], dim=1)

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """(h, w) of the top, half the sides and rounded up, and of the bottom, the grid of the latents."""
        return [halved(height, width), (height, width)]

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            self.remember(latents)
            top = self.top(applied(self.to_top, latents))
            decoded = applied(self.from_top, top.quantized, latents.shape[2:])  # (B, D, h, w)
            bottom = self.bottom(self.bottom_latents(latents, decoded))
            quantized = applied(self.merge, torch.cat([bottom.quantized, decoded], dim=1))
        indices = torch.cat([top.indices.flatten(1), bottom.indices.flatten(1)], dim=1)  # (B, L)
        losses = {name: top.losses[name] + bottom.losses[name] for name in top.losses}
        return QuantizerOutput(quantized, indices, losses)

    def bottom_latents(self, latents: Tensor, decoded: Tensor) -> Tensor:
        """What the bottom quantizes (B, D, h, w), given the decoded top."""
        return applied(self.to_bottom, torch.cat([latents, decoded], dim=1))

    def indices_to_codes(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Indices (B, L) to what the decoder sees of both levels, (B, D, h, w) float32, on a grid (h, w)."""
        top, bottom = self.levels(indices, grid_size)
        with torch.autocast(indices.device.type, enabled=False):
            decoded = applied(self.from_top, self.top.indices_to_codes(top), grid_size)
            return applied(self.merge, torch.cat([self.bottom.indices_to_codes(bottom), decoded], dim=1))

    def levels(self, indices: Tensor, grid_size: tuple[int, int]) -> list[Tensor]:
        """Indices (B, L) as the grid of the top and that of the bottom."""
        grids = self.grids(*grid_size)
        parts = indices.split([height * width for height, width in grids], dim=1)
        return [part.unflatten(1, grid) for part, grid in zip(parts, grids, strict=True)]

    @torch.no_grad()
    def place(self, latents: Tensor, progress: float) -> bool:
        """Place the top, and then the bottom on what it is given of the same latents (B, D, h, w)."""
        self.discard()
        top_latents = applied(self.to_top, latents)
        self.top(top_latents)
        self.top.step(progress)
        if not self.top.placed:  # it is too early
            return False
        decoded = applied(self.from_top, evaluated(self.top, top_latents).quantized, latents.shape[2:])
        self.bottom(self.bottom_latents(latents, decoded))
        return self.bottom.step(progress)


def joining(channels: int) -> nn.Conv2d:
    """A 1x1 convolution of (B, 2 * channels, h, w), which at first adds a mixture of the second half to the first."""
    convolution = nn.Conv2d(2 * channels, channels, 1)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:, :channels])
    return convolution
