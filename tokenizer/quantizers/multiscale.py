"""Residual quantization over scales: a pyramid of token grids, each adding what the coarser ones have left.

VAR, Tian et al. 2024, arXiv:2404.02905, algorithms 1 and 2; convolutions mixed in as in the released code.
Shapes: B batch, D codebook_dim, h w grid sides, S scales, L places of all scales together.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rounding import by_parts
from .base import Quantizer, QuantizerOutput
from .checks import check_codebook_dim
from .parts import DEFAULT_PART, SuccessiveQuantizer, build_part, evaluated, place_shared


class MultiscaleQuantizer(SuccessiveQuantizer):
    """One codebook for all scales: the residual is averaged down, quantized, and its codes are taken off upsampled.

    Codes are upsampled by bicubic interpolation and then mixed with a 3x3 convolution of themselves, which repairs
    what upsampling loses. The gradient passes straight through the whole. The loss `pyramid` is the squared error of
    the reconstruction after each scale, a mean over the scales; it teaches the convolutions, and codes that learn by
    gradient. Departures from VAR: the codebook's own losses and statistics are taken at the scale of the codes, not
    after upsampling; the convolutions start as the identity; the sides follow those of the latents, so that any grid,
    square or not, has its pyramid.

    The codes are placed on the residuals that codes found on the averaged latents leave.
    """

    multiscale = True
    coarse_to_fine = True

    def __init__(
        self,
        codebook_dim: int,
        each: dict[str, Any] = DEFAULT_PART,  # the quantizer that all scales share, and its hyperparameters
        scales: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # sides, as shares of the last, the whole grid
        num_convolutions: int = 4,  # shared out among the scales, at most one each; 0 leaves codes as they are
        convolution_weight: float = 0.5,  # share of the convolved codes in the mixture
    ):
        super().__init__()
        check_codebook_dim(codebook_dim)
        check_hyperparameters(scales, num_convolutions, convolution_weight)
        self.part = build_part(each, codebook_dim, "multiscale")
        self.vocab_size = self.part.vocab_size
        self.scales = list(scales)
        count = min(num_convolutions, len(scales))
        self.convolutions = nn.ModuleList(identity_convolution(codebook_dim) for _ in range(count))
        self.convolution_weight = convolution_weight

    @property
    def parts(self) -> tuple[Quantizer]:
        return (self.part,)

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """(h, w) of each scale, coarse to fine: sides in the proportions of `scales`, rounded, at least 1."""
        whole = self.scales[-1]
        return [
            tuple(max(1, (2 * side * scale + whole) // (2 * whole)) for side in (height, width))
            for scale in self.scales
        ]

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            self.remember(latents)
            grid_size = latents.shape[2:]
            before = by_parts(self.sums_before, [latents], self.training)  # (B, S, D, h, w)
            output = self.part(self.scale_inputs(latents, before))
            indices = output.indices.flatten(1)  # (B, L)
            sums = by_parts(lambda each: self.sums(each, grid_size), [indices], self.training)  # (B, S, D, h, w)
            placed = not self.training or self.placed
            codes = sums[:, -1].detach() if placed else latents.detach()
            quantized = codes + (latents - latents.detach())
            # Kept in the graph before it counts: with several ranks every parameter must get a gradient.
            pyramid = float(placed) * F.mse_loss(sums, latents.detach()[:, None].expand_as(sums))
        return QuantizerOutput(quantized, indices, output.losses | {"pyramid": pyramid})

    @torch.no_grad()
    def sums_before(self, latents: Tensor, part: Quantizer | None = None) -> Tensor:
        """For each scale the reconstruction of latents (B, D, h, w) from those before it, (B, S, D, h, w)."""
        part, grids = part or self.part, self.grids(*latents.shape[2:])
        total, before = torch.zeros_like(latents), []
        for scale, grid in enumerate(grids):  # algorithm 1
            before.append(total)
            codes = evaluated(part, shrunk(latents - total, grid)).quantized
            total = total + self.grown(codes, scale, latents.shape[2:])
        return torch.stack(before, dim=1)

    def scale_inputs(self, latents: Tensor, before: Tensor) -> Tensor:
        """What each scale quantizes of latents (B, D, h, w), one scale after another (B, D, 1, L)."""
        grids = self.grids(*latents.shape[2:])
        shares = [shrunk(latents - total, grid).flatten(2) for total, grid in zip(before.unbind(1), grids, strict=True)]
        return torch.cat(shares, dim=2).unsqueeze(2)

    def sums(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Indices (B, l) of the first s scales to the reconstruction after each of them, (B, s, D, h, w)."""
        total, sums, start = 0, [], 0
        for scale, (height, width) in enumerate(self.grids(*grid_size)):  # algorithm 2
            grid = indices[:, start : start + height * width].unflatten(1, (height, width))
            total = total + self.grown(self.part.indices_to_codes(grid), scale, grid_size)
            sums.append(total)
            start += height * width
            if start >= indices.shape[1]:
                break
        return torch.stack(sums, dim=1)

    def grown(self, codes: Tensor, scale: int, grid_size: tuple[int, int]) -> Tensor:
        """Codes of one scale to (B, D, h, w): upsampled, then mixed with their convolution."""
        if codes.shape[2:] != tuple(grid_size):
            codes = F.interpolate(codes, tuple(grid_size), mode="bicubic")
        if not self.convolutions:
            return codes
        convolution = self.convolutions[scale * len(self.convolutions) // len(self.scales)]
        weights = (convolution.weight.float(), convolution.bias.float())
        return torch.lerp(codes, F.conv2d(codes, *weights, padding=1), self.convolution_weight)

    def indices_to_codes(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Indices (B, l) of the first scales, or of all, to codes (B, D, h, w) float32 on a grid (h, w)."""
        with torch.autocast(indices.device.type, enabled=False):
            return by_parts(lambda each: self.sums(each, grid_size)[:, -1], [indices], self.training)

    @torch.no_grad()
    def place(self, latents: Tensor, progress: float) -> bool:
        """Place the codes on the residuals that codes found on the averaged latents leave."""
        guess = self.scale_inputs(latents, torch.zeros_like(latents)[:, None].expand(-1, len(self.scales), -1, -1, -1))
        return place_shared(
            self.part, guess, lambda part: self.scale_inputs(latents, self.sums_before(latents, part)), progress
        )


def identity_convolution(channels: int) -> nn.Conv2d:
    """A 3x3 convolution that changes nothing yet, so that codes are placed on plain residuals."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


def shrunk(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latents (B, D, h, w) averaged down to a grid; on their own they stay as they are."""
    return latents if tuple(latents.shape[2:]) == grid else F.interpolate(latents, grid, mode="area")


def check_hyperparameters(scales: Sequence[int], num_convolutions: int, convolution_weight: float) -> None:
    """Raise a ValueError that names the value and the rule."""
    if not scales or scales[0] < 1 or any(after <= before for before, after in pairwise(scales)):
        raise ValueError(
            f"scales={list(scales)} must be whole numbers that rise from at least 1; the last stands for the whole grid"
        )
    if num_convolutions < 0:
        raise ValueError(f"num_convolutions={num_convolutions} must be at least 0, which leaves codes as they are")
    if not 0 <= convolution_weight <= 1:
        raise ValueError(f"convolution_weight={convolution_weight} must lie in [0, 1]: it is a share of the mixture")
