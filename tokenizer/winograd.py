"""3x3 convolutions in float32 on a CPU with a quarter of the products, by Winograd's minimal filtering.

A picture is cut into tiles that overlap. Of each tile n x n numbers a channel are taken, linear in its pixels, and as
many of the kernel; their products, summed over the channels, give 4 x 4 pixels of the result, linear again. With n = 6
these are 36 products for 144. The result is off by three times as much as by plain sums, some 4e-6 of its size. Source:
Lavin and Gray 2015, arXiv:1509.09308, section 4.3, F(4x4, 3x3). Shapes: B batch, C O channels in and out, H W sides, s
side of a tile.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packed import PackedConv2d
from .processor import onednn_operator

PACK = onednn_operator("mkldnn", "_reorder_convolution_weight")
CONVOLVE = onednn_operator("mkldnn", "_convolution_pointwise")
TILES = 64  # of a block: their numbers stay in the processor's cache, and those of the kernel are read seldom
HEIGHTS = (8, 4, 16, 2, 32, 1, 64)  # of a block, in tiles; the first of those that need the fewest blocks
MOST_COMPUTED = 1.15  # for each pixel that is asked for: blocks reach beyond a picture
PIXELS = 4  # of a side of what comes of a tile

# A row of a tile, a row of a kernel and their product as polynomials, at 0, 1, -1, 2, -2 and infinity: equation 15.
DOUBLE = {"dtype": torch.float64, "device": "cpu"}
OF_TILE = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    **DOUBLE,
)
OF_KERNEL = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], **DOUBLE) / 24
TO_PIXELS = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], **DOUBLE)


class Filtering:
    """What is taken of tiles and kernels and what it gives, by matrices for one axis: (n, s), (n, 3), (4, n)."""

    def __init__(self, of_tile: Tensor, of_kernel: Tensor, to_pixels: Tensor):
        self.numbers, self.side = of_tile.shape
        self.step = self.side - 2  # from one tile to the next: a kernel reaches one pixel beyond on both sides
        self.of_kernel = of_kernel
        self.of_tile, self.to_pixels = of_tile.float(), to_pixels.float()


class WinogradConv2d(PackedConv2d):
    """A 3x3 convolution with padding 1 and the parameters of another, by tiles where that can be and pays.

    For these it holds what is taken of its kernel, n * n numbers for nine weights.
    """

    filtering = Filtering(OF_TILE, OF_KERNEL, TO_PIXELS)
    fewest_channels = 128  # in and out: with fewer, taking the numbers costs what the products save

    def __init__(self, convolution: nn.Conv2d):
        super().__init__(convolution)
        if (self.kernel_size, self.stride, self.padding) != ((3, 3), (1, 1), (1, 1)):
            raise ValueError(f"{convolution} must be 3x3 with stride 1 and padding 1")

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W')."""
        return self.by_tiles(features) if self.is_for_tiles(features) else self.plainly(features)

    def is_for_tiles(self, features: Tensor) -> bool:
        """Whether oneDNN is to multiply numbers of tiles: it can, and was seen to be faster so, on one thread."""
        if min(self.in_channels, self.out_channels) < self.fewest_channels or None in (PACK, CONVOLVE):
            return False
        if not self.is_for_numbers(features) or torch.get_num_threads() > 1:
            return False
        if features.ndim != 4 or features.shape[1] != self.in_channels or not features.numel():
            return False  # what it means, or why it is refused, any convolution tells
        down, across, _, _ = self.blocks_of(features)
        computed = down * across * TILES * self.filtering.step**2
        return (
            features.dtype == self.weight.dtype == torch.float32
            and computed <= MOST_COMPUTED * features.shape[2:].numel()
        )

    def blocks_of(self, features: Tensor) -> tuple[int, int, int, int]:
        """A picture is cut into so many blocks, one below another and side by side, of so many tiles each way."""
        down, across = (math.ceil(side / self.filtering.step) for side in features.shape[2:])  # tiles
        cuts = [(math.ceil(down / high), math.ceil(across * high / TILES), high, TILES // high) for high in HEIGHTS]
        return min(cuts, key=lambda cut: cut[0] * cut[1])

    def by_tiles(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W') in channels last, block by block."""
        down, across, height, width = self.blocks_of(features)
        step = self.filtering.step
        tall, wide = height * step, width * step
        pixels = features.new_empty(len(features), down, height, PIXELS, across, width, PIXELS, self.out_channels)
        (kernel,) = self.packed_for(features.shape)
        for picture, into in zip(features.permute(0, 2, 3, 1), pixels, strict=True):
            for row, column in product(range(down), range(across)):
                block = cut_out(picture, row * tall - 1, column * wide - 1, tall + 2, wide + 2)
                into[row, :, :, column] = self.of_tiles(block, kernel).transpose(1, 2)
        pixels = pixels.flatten(4, 6).flatten(1, 3)  # (B, H', W', O), and what lies beyond
        height, width = (side * PIXELS // step for side in features.shape[2:])
        pixels = pixels[:, :height, :width].permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=torch.channels_last)

    def of_tiles(self, block: Tensor, kernel: Tensor) -> Tensor:
        """A block and the pixels around it (H, W, C) to what comes of its tiles, (down, across, 4, 4, O)."""
        side, step, numbers = self.filtering.side, self.filtering.step, self.filtering.numbers
        columns = block.unfold(1, side, step).transpose(2, 3)  # (H, across, s, C)
        columns = (self.filtering.of_tile @ columns).flatten(2)  # (H, across, n * C)
        rows = columns.unfold(0, side, step).transpose(2, 3)  # (down, across, s, n * C)
        products = self.products((self.filtering.of_tile @ rows).view(TILES, numbers**2, self.in_channels), kernel)
        rows = self.filtering.to_pixels @ products.view(*rows.shape[:2], numbers, -1)  # (down, across, 4, n * O)
        return self.filtering.to_pixels @ rows.unflatten(3, (numbers, self.out_channels))

    def products(self, of_tiles: Tensor, kernel: Tensor) -> Tensor:
        """Numbers (TILES, n * n, C) by those of the kernel, summed over channels: (TILES, n * n, O).

        As a 1x1 convolution in groups, which oneDNN does at the rate of large products; MKL, to which PyTorch leaves
        products of many matrices, takes twice as long on some processors.
        """
        groups = of_tiles.shape[1]
        biases = of_tiles.new_zeros(groups, self.out_channels)
        if self.bias is not None:
            biases[self.filtering.numbers + 1] = self.bias  # the number at 1 of both axes goes to each pixel, once
        row = of_tiles.view(1, 1, TILES, -1).permute(0, 3, 1, 2)  # of places, channels last
        summed = CONVOLVE(row, kernel, biases.flatten(), *sizes(groups), "none", [], "")
        return summed.permute(0, 2, 3, 1).reshape(TILES, groups, self.out_channels)

    def pack(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """The kernel's numbers (n * n * O, C, 1, 1), as oneDNN wants them for TILES places."""
        of_kernel = self.filtering.of_kernel
        numbers = torch.einsum("ia,ocab,jb->ijoc", of_kernel, self.weight.double(), of_kernel).float()
        groups = len(of_kernel) ** 2
        kernel = numbers.flatten(0, 2)[:, :, None, None]
        return (PACK(kernel, *sizes(groups), [1, groups * self.in_channels, 1, TILES]),)


def cut_out(picture: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """Pixels (height, width, C) of a picture (H, W, C), which begins at 0, 0; zeros where it has none."""
    part = picture[max(0, top) : top + height, max(0, left) : left + width]
    above, before = max(0, -top), max(0, -left)
    below, after = height - above - part.shape[0], width - before - part.shape[1]
    return F.pad(part, (0, 0, before, after, above, below))


def sizes(groups: int) -> tuple[object, ...]:
    """Padding, stride, dilation and groups of a 1x1 convolution, as oneDNN is told them."""
    return [0, 0], [1, 1], [1, 1], groups
