"""Convolutions in integers of 8 bits on a CPU, which multiplies them four times as fast as float32.

The weights of each output channel get 255 values, the features of each picture 255 between the least and the greatest
of them, so that no picture depends on those beside it; sums are exact. Source: Jacob et al. 2018, arXiv:1712.05877,
section 2.1; a scale for each channel is Krishnamoorthi's, 2018, arXiv:1806.08342, section 2. Departure: nothing is
calibrated, the range is that of the features at hand. Shapes: B batch, C O channels in and out, H W sides, k kernel
sides.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .processor import multiplies_int8

# What `torch.compile` puts in the place of a quantized convolution; no public function leads there. None: not here.
PACK = getattr(torch.ops.onednn, "qconv_prepack", None)
CONVOLVE = getattr(torch.ops.onednn, "qconv2d_pointwise", None)
SMALLEST = 1e-30  # step between two values
AT_ONCE = 2**17  # features, of which what comes between them and their 8 bits stays in the processor's cache
INTEGERS = 1.5 * 2**23  # from here on float32 holds nothing but integers, their lowest bits those of the number


class Packed(NamedTuple):
    """A kernel in 8 bits, as oneDNN wants it, and the weight that it was made of."""

    source: Tensor
    version: int | None
    kernel: Tensor
    scales: Tensor  # (O,) float32

    def is_of(self, weight: Tensor) -> bool:
        """Whether it was made of this weight, unchanged since; a change through `weight.data` in place is not seen."""
        return self.source.data_ptr() == weight.data_ptr() and self.version == version_of(weight)


def version_of(weight: Tensor) -> int | None:
    """The number of its changes; None for tensors of inference mode, which count none."""
    return None if weight.is_inference() else weight._version


class Int8Conv2d(nn.Conv2d):
    """A convolution with the parameters of another, in 8 bits where `is_for_int8` allows that, else as that one is."""

    def __init__(self, convolution: nn.Conv2d):
        sizes = (convolution.in_channels, convolution.out_channels, convolution.kernel_size)
        super().__init__(*sizes, stride=convolution.stride, padding=convolution.padding, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.packed: Packed | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W') in the type of both."""
        if not is_for_int8(features):
            return self.in_floats(features)
        convolved = [self.of_picture(picture) for picture in features.split(1)]
        return convolved[0] if len(convolved) == 1 else torch.cat(convolved)

    def in_floats(self, features: Tensor) -> Tensor:
        """What it is without 8 bits."""
        return super().forward(features)

    def kernel(self) -> Tensor:
        """What the features are convolved with, float32 (O, C, k, k)."""
        return self.weight.float()

    def of_picture(self, features: Tensor) -> Tensor:
        """Features (1, C, H, W) to (1, O, H', W')."""
        features = features.contiguous(memory_format=torch.channels_last)
        low, high = (bound.item() for bound in flat(features).aminmax())
        low, high = min(low, 0.0), max(high, 0.0)  # the border is 0, which must be one of the values
        if not math.isfinite(high - low):
            return self.in_floats(features)  # which carries it on
        scale = max((high - low) / 254, SMALLEST)
        zero = math.ceil(-low / scale)  # so that with rounding, too, all lie in 0 ... 255
        kernel, kernel_scales = self.in_int8(features)
        no_zeros = torch.zeros(len(kernel), dtype=torch.int32)
        bias = None if self.bias is None else self.bias.float().repeat(len(kernel) // self.out_channels)
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        given = (in_uint8(features, scale, zero), scale, zero, kernel, kernel_scales, no_zeros, bias)
        return CONVOLVE(*given, *sizes, 1.0, 0, features.dtype, "none", [], "")

    def in_int8(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel, packed for such features, and its scales (O,) float32; made anew where the weight has changed."""
        if self.packed is None or not self.packed.is_of(self.weight):
            kernel = self.kernel()
            scales = (kernel.abs().amax((1, 2, 3)) / 127).clamp_min(SMALLEST)
            rounded = (kernel / scales[:, None, None, None]).round().to(torch.int8)
            sizes = (self.stride, self.padding, self.dilation, self.groups)
            packed = PACK(rounded, scales, 1.0, 1, *sizes, features.shape)  # a zero that is not 0: it packs for any
            self.packed = Packed(self.weight.detach(), version_of(self.weight), packed, scales)
        return self.packed.kernel, self.packed.scales

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"packed": None}  # oneDNN's tensors are neither copied nor pickled


def is_for_int8(features: Tensor) -> bool:
    """Whether oneDNN is to convolve these in 8 bits, which no backward pass, autocast or trace for a compiler knows."""
    return (
        None not in (PACK, CONVOLVE)
        and torch.backends.mkldnn.enabled
        and features.device.type == "cpu"
        and multiplies_int8(features.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def in_uint8(features: Tensor, scale: float, zero: int) -> Tensor:
    """`features / scale + zero`, which lies in [0, 255], rounded, as uint8; all (1, C, H, W) in channels last."""
    integers, offset = torch.empty_like(features, dtype=torch.uint8), torch.tensor(INTEGERS + zero)
    for part, target in zip(flat(features).split(AT_ONCE), flat(integers).split(AT_ONCE), strict=True):
        target.copy_(torch.add(offset, part.float(), alpha=1 / scale).view(torch.int32))  # the lowest 8 bits
    return integers


def flat(features: Tensor) -> Tensor:
    """Features that lie in channels last in one row, in the order of the memory."""
    return features.permute(0, 2, 3, 1).reshape(-1)
