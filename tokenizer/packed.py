"""Convolutions with a second kernel, which an operator that PyTorch has for its compiler wants in a form of its own.

Shapes: B batch, C O channels in and out, H W sides, k kernel sides.
"""

from typing import NamedTuple, Self

from torch import Tensor, nn


class Packed(NamedTuple):
    """What was made of a weight (O, C, k, k)."""

    source: Tensor  # the weight
    version: int | None  # how often that had changed
    made: tuple[Tensor, ...]

    def is_of(self, weight: Tensor) -> bool:
        """Whether it was made of this weight, unchanged since; a change through `weight.data` in place is not seen."""
        if weight.is_inference():  # whose changes are not counted
            return False
        return self.source.data_ptr() == weight.data_ptr() and self.version == weight._version


class PackedConv2d(nn.Conv2d):
    """A plain convolution with the parameters of another, and in memory what `pack` has made of its weight."""

    def __init__(self, convolution: nn.Conv2d):
        sizes = (convolution.in_channels, convolution.out_channels, convolution.kernel_size)
        super().__init__(*sizes, stride=convolution.stride, padding=convolution.padding, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.packed: Packed | None = None
        self.train(convolution.training)

    def plainly(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W') as any convolution."""
        return super().forward(features)

    def packed_for(self, features: Tensor) -> tuple[Tensor, ...]:
        """What `pack` makes of the weight for such features; made anew where the weight has changed."""
        if self.packed is None or not self.packed.is_of(self.weight):
            version = None if self.weight.is_inference() else self.weight._version
            self.packed = Packed(self.weight.detach(), version, self.pack(features))
        return self.packed.made

    def pack(self, features: Tensor) -> tuple[Tensor, ...]:
        """Other forms of the weight, for features of this shape."""
        raise NotImplementedError

    def _apply(self, *arguments: object, **options: object) -> Self:
        self.packed = None  # it does not follow to another device or type
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"packed": None}  # oneDNN's tensors are neither copied nor pickled
