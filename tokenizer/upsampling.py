"""Nearest-neighbour upsampling and the convolution after it, in one: four products for nine.

Of the nine pixels under a 3x3 kernel those that repeat one pixel of the input are equal, so their weights are added up
beforehand. Shapes: B batch, C O channels in and out, H W sides.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .int8 import Int8Conv2d
from .winograd import DOUBLE, OF_KERNEL, OF_TILE, TO_PIXELS, Filtering, WinogradConv2d

# A tile of pixels that stand twice, but for its border; of the numbers that are taken of it one is always 0.
TWICE = torch.eye(4, **DOUBLE).repeat_interleave(torch.tensor([1, 2, 2, 1], device="cpu"), 0)
OF_TWICE = OF_TILE @ TWICE
TAKEN = OF_TWICE.any(1)


class UpsampledConv2d(WinogradConv2d):
    """Doubles both sides, nearest neighbour, then a 3x3 convolution with padding 1."""

    filtering = Filtering(OF_TWICE[TAKEN], OF_KERNEL[TAKEN], TO_PIXELS[:, TAKEN])
    fewest_channels = 192  # fewer products are saved: 25 are left of 64

    def plainly(self, features: Tensor) -> Tensor:
        return upsampled(features, self.weight, self.bias)


class Int8UpsampledConv2d(Int8Conv2d):
    """The same in 8 bits: four 2x2 kernels, one for each of the four pixels that come of one."""

    def plainly(self, features: Tensor) -> Tensor:
        return upsampled(features, self.weight, self.bias)

    def kernel(self) -> Tensor:
        """(4 * O, C, 2, 2): rows first, the kernels of the upper and the lower pixel, of the left and the right one."""
        return by_halves(by_halves(super().kernel())).flatten(0, 2)  # columns, then rows

    def biases(self) -> Tensor:
        return super().biases().repeat(4)

    def convolved(self, given: tuple[object, ...], dtype: torch.dtype) -> Tensor:
        """Features (1, C, H, W) to (1, O, 2 * H, 2 * W)."""
        of_each = super().convolved(given, dtype).unflatten(1, (2, 2, -1))  # (1, 2, 2, O, H + 1, W + 1)
        height, width = (side - 1 for side in of_each.shape[4:])
        pixels = of_each.new_empty(1, height, 2, width, 2, self.out_channels)
        for row in range(2):
            for column in range(2):
                part = of_each[:, row, column, :, row : row + height, column : column + width]
                pixels[:, :, row, :, column] = part.permute(0, 2, 3, 1)
        return pixels.view(1, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def by_halves(kernel: Tensor) -> Tensor:
    """Of three weights along dimension 3 the sums of two that the first and the second of two equal pixels see.

    A dimension for these two comes first, so that dimension 3 of the result is the one that stood before it.
    """
    first, second, third = kernel.unbind(3)
    return torch.stack([torch.stack([first, second + third], 3), torch.stack([first + second, third], 3)])


def upsampled(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Features (B, C, H, W) to (B, O, 2 * H, 2 * W) by a transposed convolution."""
    weight = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).flip(2, 3)
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # over 2x2 weights: (in, out, 4, 4)
    return F.conv_transpose2d(features, sums, bias, stride=2, padding=1)
