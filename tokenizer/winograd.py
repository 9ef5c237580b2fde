"""3x3 convolutions in float32 on a CPU with a quarter of the products, by Winograd's minimal filtering.

A picture is cut into tiles that overlap. Of each tile n x n numbers a channel are taken, linear in its pixels, and as
many of the kernel; their products, summed over the channels, give 4 x 4 pixels of the result, linear again. With n = 6
these are 36 products for 144. Source: Lavin and Gray 2015, arXiv:1509.09308, section 4.3, F(4x4, 3x3). Departure: both
axes at once, by the Kronecker product of a matrix with itself. Shapes: B batch, C O channels in and out, H W sides, t
tiles, s their side.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .packed import PackedConv2d
from .processor import numbers_alone, onednn_operator

PACK = onednn_operator("mkldnn", "_reorder_convolution_weight")
CONVOLVE = onednn_operator("mkldnn", "_convolution_pointwise")
FEWEST_CHANNELS = 128  # in and out: with fewer, taking the numbers costs what the products save
FEWEST_TILES = 64  # of a picture: with fewer, reading the kernel's numbers takes longer than the products
TILES_AT_ONCE = 64  # so that their numbers stay in the processor's cache, and those of the kernel are read seldom
PIXELS = 4  # of a side of what comes of a tile

# A row of a tile, a row of a kernel and their product as polynomials, at 0, 1, -1, 2, -2 and infinity: equation 15.
EXACT = {"dtype": torch.float64, "device": "cpu"}
OF_TILE = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    **EXACT,
)
OF_KERNEL = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], **EXACT) / 24
TO_PIXELS = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], **EXACT)
AT_ONE = 1  # which of a row's numbers goes to each of its pixels once


class Filtering:
    """What is taken of tiles and kernels and what it gives, by matrices for one axis: (n, s), (n, 3), (4, n)."""

    def __init__(self, of_tile: Tensor, of_kernel: Tensor, to_pixels: Tensor):
        self.numbers, self.side = of_tile.shape
        self.step = self.side - 2  # from one tile to the next: a kernel reaches one pixel beyond on both sides
        self.of_kernel = of_kernel
        self.of_tile = torch.kron(of_tile, of_tile).float()  # (n * n, s * s)
        self.to_pixels = torch.kron(to_pixels, to_pixels).float()  # (16, n * n)


class WinogradConv2d(PackedConv2d):
    """A 3x3 convolution with padding 1 and the parameters of another, by tiles where that can be and pays.

    For these it holds what is taken of its kernel, four times the size of its weight.
    """

    filtering = Filtering(OF_TILE, OF_KERNEL, TO_PIXELS)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W')."""
        return self.by_tiles(features) if self.is_for_tiles(features) else self.plainly(features)

    def is_for_tiles(self, features: Tensor) -> bool:
        """Whether oneDNN is to multiply numbers of tiles, which has no gradient."""
        step = self.filtering.step
        return (
            None not in (PACK, CONVOLVE)
            and not torch.is_grad_enabled()
            and numbers_alone(features, self.weight)  # before sizes: one that is looked at is not free in an export
            and features.dtype == self.weight.dtype == torch.float32
            and not self.weight.is_inference()  # it would be packed at each call
            and min(self.in_channels, self.out_channels) >= FEWEST_CHANNELS
            and features.shape[2] % step == features.shape[3] % step == 0
            and features.shape[2:].numel() >= FEWEST_TILES * step**2
        )

    def by_tiles(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W), multiples of the step, to (B, O, H', W'), channels last and one picture at a time."""
        down, across = (side // self.filtering.step for side in features.shape[2:])
        pixels = features.new_empty(len(features), down, PIXELS, across, PIXELS, self.out_channels)
        at_once = max(1, TILES_AT_ONCE // across)
        for picture, into in zip(features.permute(0, 2, 3, 1), pixels, strict=True):
            for first in range(0, down, at_once):
                rows = into[first : first + at_once]
                rows.copy_(self.rows_of_tiles(picture, first, len(rows)))
        return pixels.view(len(features), down * PIXELS, across * PIXELS, -1).permute(0, 3, 1, 2)

    def rows_of_tiles(self, picture: Tensor, first: int, count: int) -> Tensor:
        """Of a picture (H, W, C) what comes of `count` rows of tiles: (count, 4, tiles of a row, 4, O)."""
        filtering = self.filtering
        top, bottom = filtering.step * first - 1, filtering.step * (first + count) + 1
        beyond = (0, 0, 1, 1, int(top < 0), int(bottom > len(picture)))
        lines = F.pad(picture[max(0, top) : bottom], beyond)
        tiles = lines.unfold(0, filtering.side, filtering.step).unfold(1, filtering.side, filtering.step)
        tiles = tiles.permute(0, 1, 3, 4, 2).flatten(2, 3).flatten(0, 1)  # (t, s * s, C)
        pixels = filtering.to_pixels @ self.products(filtering.of_tile @ tiles)
        return pixels.view(count, -1, PIXELS, PIXELS, self.out_channels).transpose(1, 2)

    def products(self, of_tiles: Tensor) -> Tensor:
        """Numbers (t, n * n, C) by those of the kernel, summed over channels: (t, n * n, O).

        As a 1x1 convolution in groups, which oneDNN does at the rate of large products; MKL, to which PyTorch leaves
        products of many matrices, takes twice as long on some processors.
        """
        tiles, groups, _ = of_tiles.shape
        biases = of_tiles.new_zeros(groups, self.out_channels)
        if self.bias is not None:
            biases[AT_ONE * self.filtering.numbers + AT_ONE] = self.bias
        row = of_tiles.view(1, 1, tiles, -1).permute(0, 3, 1, 2)  # a row of places, channels last
        summed = CONVOLVE(row, *self.packed_for(row), biases.flatten(), *sizes(groups), "none", [], "")
        return summed.permute(0, 2, 3, 1).view(tiles, groups, -1)

    def pack(self, features: Tensor) -> tuple[Tensor, ...]:
        """The kernel's numbers (n * n * O, C, 1, 1), as oneDNN wants them for a row of TILES_AT_ONCE places."""
        of_kernel = self.filtering.of_kernel
        numbers = torch.einsum("ia,ocab,jb->ijoc", of_kernel, self.weight.double(), of_kernel).float()
        groups = len(of_kernel) ** 2
        kernel = numbers.flatten(0, 2)[:, :, None, None]
        return (PACK(kernel, *sizes(groups), [1, groups * self.in_channels, 1, TILES_AT_ONCE]),)


def sizes(groups: int) -> tuple[object, ...]:
    """Padding, stride, dilation and groups of a 1x1 convolution, as oneDNN is told them."""
    return [0, 0], [1, 1], [1, 1], groups
