"""Convolutions with a second kernel, which an operator that PyTorch has for its compiler wants in a form of its own.

Shapes: B batch, C O channels in and out, H W sides, k kernel sides.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from .processor import numbers_alone


class PackedConv2d(nn.Conv2d):
    """A plain convolution with the parameters of another, and in memory what `pack` has made of its weight."""

    def __init__(self, convolution: nn.Conv2d):
        sizes = (convolution.in_channels, convolution.out_channels, convolution.kernel_size)
        super().__init__(*sizes, stride=convolution.stride, padding=convolution.padding, device="meta")
        if (convolution.dilation, convolution.groups, convolution.padding_mode) != ((1, 1), 1, "zeros"):
            raise ValueError(f"{convolution} must be without dilation and groups, with zeros around it")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.packed: tuple[Tensor, ...] | None = None
        self.packed_of: Tensor | None = None  # the `print_of` the weight
        self.train(convolution.training)

    def is_for_numbers(self, features: Tensor) -> bool:
        """Whether an operator that has no gradient and knows plain tensors alone may take features and parameters."""
        given = [features, self.weight] if self.bias is None else [features, self.weight, self.bias]
        return not torch.is_grad_enabled() and numbers_alone(*given)

    def plainly(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W') as any convolution."""
        return super().forward(features)

    def packed_for(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """What `pack` makes of the weight; made anew where that has changed."""
        of_now = print_of(self.weight.detach())
        if self.packed is None or not torch.equal(self.packed_of, of_now):
            self.packed, self.packed_of = self.pack(size), of_now
        return self.packed

    def pack(self, size: Sequence[int]) -> tuple[Tensor, ...]:
        """Other forms of the weight, for features of this size."""
        raise NotImplementedError

    def _apply(self, *arguments: object, **options: object) -> Self:
        self.packed = None  # it does not follow to another device or type
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"packed": None}  # oneDNN's tensors are neither copied nor pickled


def print_of(weight: Tensor) -> Tensor:
    """A number of each output channel by which a change shows that is not rounding, whether PyTorch counts it or not.

    Those through `.data`, in NumPy and by fused optimizers it does not count, nor any in inference mode.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # no copy of a kernel that lies as features do
    return rows @ torch.arange(rows.shape[1], device=weight.device).cos().to(weight.dtype)
