"""Convolutions in integers of 8 bits on a CPU, which multiplies them four times as fast as float32.

The weights of each output channel get 255 values, the features of each picture 255 between the least and the greatest
of them, so that no picture depends on those beside it; sums are exact. Source: Jacob et al. 2018, arXiv:1712.05877,
section 2.1; a scale for each channel is Krishnamoorthi's, 2018, arXiv:1806.08342, section 2. Departure: nothing is
calibrated, the range is that of the features at hand. Shapes: B batch, C O channels in and out, H W sides, k kernel
sides.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from .packed import PackedConv2d
from .processor import multiplies_int8, onednn_operator

PACK = onednn_operator("onednn", "qconv_prepack")
CONVOLVE = onednn_operator("onednn", "qconv2d_pointwise")
FEWEST_PRODUCTS = 2**25  # of a picture: with fewer, bfloat16 is done before features are rounded
MOST_ADDENDS = 2**31 // (255 * 127)  # of a sum in 32 bits
SMALLEST = 1e-30  # step between two values
AT_ONCE = 2**17  # features, of which what comes between them and their 8 bits stays in the processor's cache
INTEGERS = 1.5 * 2**23  # from here on float32 holds nothing but integers, their lowest bits those of the number


class Int8Conv2d(PackedConv2d):
    """A plain convolution with the parameters of another, in 8 bits where that can be and pays, else as that one is.

    For 8 bits it holds a second kernel, half the size of one in bfloat16.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W') in the type of both."""
        pays = features.shape[2] * features.shape[3] * self.weight.numel() >= FEWEST_PRODUCTS
        fits = self.weight[0].numel() <= MOST_ADDENDS
        if not (pays and fits and self.is_for_numbers(features) and convolves_int8(features.dtype)):
            return self.plainly(features)
        packed = self.packed_for((1, *features.shape[1:]))
        convolved = [self.of_picture(picture, packed) for picture in features.split(1)]
        return convolved[0] if len(convolved) == 1 else torch.cat(convolved)

    def of_picture(self, features: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """Features (1, C, H, W) to (1, O, H', W') by what `pack` gave."""
        features = features.contiguous(memory_format=torch.channels_last)
        low, high = (bound.item() for bound in flat(features).aminmax())
        low, high = min(low, 0.0), max(high, 0.0)  # the border is 0, which must be one of the values
        if not math.isfinite(high - low):
            return self.plainly(features)  # which carries it on
        scale = max((high - low) / 254, SMALLEST)
        zero = math.ceil(-low / scale)  # so that with rounding, too, all lie in 0 ... 255
        return self.convolved((in_uint8(features, scale, zero), scale, zero, *packed), features.dtype)

    def convolved(self, given: tuple[object, ...], dtype: torch.dtype) -> Tensor:
        """Features (1, C, H, W) as `in_uint8` gives them, scale and zero, what `pack` gave, to (1, O, H', W')."""
        bias = None if self.bias is None else self.biases()
        return CONVOLVE(*given, bias, *self.sizes(), 1.0, 0, dtype, "none", [], "")

    def pack(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """The kernel as oneDNN wants it for integers of this size, each channel's scale and what stands for 0."""
        kernel = self.kernel()
        scales = (kernel.abs().amax((1, 2, 3)) / 127).clamp_min(SMALLEST)
        rounded = (kernel / scales[:, None, None, None]).round().to(torch.int8)
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        packed = PACK(rounded, scales, 1.0, 1, *self.sizes(), size)  # for any zero: one that is not 0
        return packed, scales, zeros

    def kernel(self) -> Tensor:
        """What the features are convolved with, float32 (O, C, k, k)."""
        return self.weight.float()

    def biases(self) -> Tensor:
        """What is added to each channel, float32 (O,)."""
        return self.bias.float()

    def sizes(self) -> tuple[object, ...]:
        """What oneDNN is told of a convolution beside its kernel."""
        return self.stride, self.padding, self.dilation, self.groups


def convolves_int8(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves features of this type in 8 bits here."""
    return None not in (PACK, CONVOLVE) and multiplies_int8(dtype) and sums_are_exact()


@cache
def sums_are_exact() -> bool:
    """Whether sums of the greatest products, two of which overflow 16 bits, are right: oneDNN may be held to less."""
    plain = nn.Conv2d(64, 16, 1, bias=False, device="meta")  # without a draw for its weights
    plain.weight = nn.Parameter(torch.ones(plain.weight.shape, dtype=torch.float32, device="cpu"))
    greatest = torch.full((1, 64, 1, 1), 255, dtype=torch.uint8, device="cpu")
    greatest, convolution = greatest.to(memory_format=torch.channels_last), Int8Conv2d(plain)
    sums = convolution.convolved((greatest, 1 / 255, 0, *convolution.pack(greatest.shape)), torch.float32)
    return bool(((sums - 64).abs() < 0.1).all())


def in_uint8(features: Tensor, scale: float, zero: int) -> Tensor:
    """`features / scale + zero`, which lies in [0, 255], rounded, as uint8; all (1, C, H, W) in channels last."""
    integers = torch.empty_like(features, dtype=torch.uint8)
    offset = features.new_tensor(INTEGERS + zero, dtype=torch.float32)
    for part, target in zip(flat(features).split(AT_ONCE), flat(integers).split(AT_ONCE), strict=True):
        target.copy_(torch.add(offset, part.float(), alpha=1 / scale).view(torch.int32))  # the lowest 8 bits
    return integers


def flat(features: Tensor) -> Tensor:
    """Features that lie in channels last in one row, in the order of the memory."""
    return features.permute(0, 2, 3, 1).reshape(-1)
