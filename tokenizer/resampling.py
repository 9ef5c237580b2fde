"""Small networks between the grids of two levels of latents, shared by the discrete and the Gaussian hierarchy.

Shapes: B batch, C channels in, W width, O channels out, h w sides of the finer grid; the coarser has half of them,
rounded up, so that every grid has one above it.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import ResidualBlock
from .rounding import by_parts, laid_out


def halved(height: int, width: int) -> tuple[int, int]:
    """The grid above a grid."""
    return (height + 1) // 2, (width + 1) // 2


class Halving(nn.Sequential):
    """(B, C, h, w) to (B, O, ceil(h / 2), ceil(w / 2)); linear until its residual block has learned something."""

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, width, 3, stride=2, padding=1),
            ResidualBlock(width, width, norm_groups=0, dropout=0.0),
            nn.Conv2d(width, out_channels, 1),
        )


class Growing(nn.Module):
    """(B, C, ceil(h / 2), ceil(w / 2)) and the grid (h, w) to (B, O, h, w), by nearest neighbour; linear at first."""

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.block = ResidualBlock(width, width, norm_groups=0, dropout=0.0)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, features: Tensor, grid_size: tuple[int, int]) -> Tensor:
        features = self.block(self.conv_in(features))
        return self.conv_out(F.interpolate(features, tuple(grid_size), mode="nearest"))


def applied(network: nn.Module, features: Tensor, *arguments: Any) -> Tensor:
    """`network` of features (B, ...) in the type of its weights, float32 after it; in eval mode on a CPU one by one."""
    return by_parts(lambda each: network(laid_out(each, network), *arguments), [features], network.training).float()
