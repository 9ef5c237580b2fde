"""3x3 convolutions on a CPU by Winograd's minimal filtering (kernels/winograd.c), which needs fewer products.

They are 36 for 144, and 25 or 81 where the sides of a picture are doubled or halved.

The result is off by four times as much as by plain sums, some 1e-6 of its size. Shapes: B batch, C O channels in and
out, H W sides, n numbers taken of a tile along an axis.
"""

import ctypes
from enum import IntEnum
from functools import cache, cached_property, lru_cache, partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from .kernels import LANES, LIBRARY, filled, filled_up, run
from .kernels.memory import WORKSPACE, Workspace, empty
from .processor import are_plain, is_in_float32, wants_gradient
from .reference import gradients_by, is_for_reference

FEWEST_TILES = 16  # of a batch: with fewer, reading what is taken of the kernel takes as long as all the products
FEWEST_OF_THREAD = 8  # tiles, of all pictures
MOST_COMPUTED = 2  # for each pixel that is asked for: tiles reach beyond a picture
LARGE_WEIGHT = 2**20  # numbers
MUCH = 2**25  # bytes of a result: PyTorch takes longer for so much new memory than the kernel does for the whole
PIXELS = 4  # of a side of what comes of a tile


class Sides(IntEnum):
    """What becomes of those of a picture, as `sides` in winograd.c."""

    KEPT = 0  # padding 1
    DOUBLED = 1  # before, nearest neighbour; padding 1
    HALVED = 2  # stride 2, padded by one pixel at the right and the bottom only

    def after(self, length: int) -> int:
        """Of a side of so many pixels."""
        if self is Sides.KEPT:
            return length
        return 2 * length if self is Sides.DOUBLED else -(-length // 2)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution.

    It goes by tiles where that can be and pays, whether gradients are wanted or not, else it is as any other.
    Without them it keeps what is taken of its kernel, n * n numbers for nine weights.
    """

    def __init__(self, in_channels: int, out_channels: int, sides: Sides = Sides.KEPT):
        strided = {"stride": 2, "padding": 2} if sides == Sides.HALVED else {"padding": 1}  # as `convolution` has it
        super().__init__(in_channels, out_channels, 3, **strided)
        self.sides = sides
        self.packed: tuple[Tensor, int, Tensor] | None = None  # beside `changes_of` and `print_of` of the weight

    def forward(self, features: Tensor, added: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W) to (B, O, H', W'), and to what is added, in the type of that.

        Under autocast, too, it is in float32 where it is by tiles.
        """
        weight, bias = self.weight, self.bias  # once: they may be computed from others
        if not is_for_tiles(features, weight, bias, self.sides):
            result = convolution(features, weight, bias, self.sides)
        elif wants_gradient(features, weight, bias):
            result = ByTiles.apply(features.float(), weight, bias, self.sides)
        else:
            given = features.float(), self.packed_of(weight.detach()), weight.shape[0], bias, self.sides
            if added is not None and added.dtype == torch.float32 and are_plain(added) and not wants_gradient(added):
                return convolve(*given, added)
            result = convolve(*given)
        return result if added is None else result.to(added.dtype).add_(added)

    def packed_of(self, weight: Tensor) -> Tensor:
        """What is taken of the weight; made anew where that has changed."""
        changes, of_now, held = changes_of(weight), print_of(weight), self.packed
        if held is None or held[1] != changes or not torch.equal(held[2], of_now):
            held = self.packed = pack(weight, self.sides), changes, of_now
        return held[0]

    def _apply(self, *arguments: object, **options: object) -> Self:
        self.packed = None  # it does not follow to another device or type
        return super()._apply(*arguments, **options)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"packed": None}  # it need not travel


def is_for_tiles(features: Tensor, weight: Tensor, bias: Tensor | None, sides: Sides) -> bool:
    """Whether the kernels are here, take these, and were seen to be faster."""
    parameters = [weight] if bias is None else [weight, bias]
    if LIBRARY is None or not is_in_float32(features, *parameters) or not are_plain(features, *parameters):
        return False
    if features.ndim != 4 or weight.shape[1:] != (features.shape[1], 3, 3):
        return False  # what it means, or why it is refused, any convolution tells
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    batch, channels, *lengths = features.shape
    height, width = map(sides.after, lengths)
    tiles = batch * -(-height // PIXELS) * -(-width // PIXELS)
    if channels < LANES and tiles * PIXELS**2 * weight.shape[0] * 4 < MUCH:
        return False  # most of what is multiplied would be filled up
    return tiles >= FEWEST_TILES and tiles * PIXELS**2 <= MOST_COMPUTED * batch * height * width


def changes_of(weight: Tensor) -> int:
    """How often PyTorch has counted a change of it, which it does not in inference mode."""
    return 0 if weight.is_inference() else weight._version


def print_of(weight: Tensor) -> Tensor:
    """A number of each output channel by which a change shows that is not rounding, whether PyTorch counts it or not.

    Those through `.data`, in NumPy and by fused optimizers it does not count, nor any in inference mode. Of a large
    weight each channel shows a quarter, another one than its neighbours': reading all of it takes long beside the
    products of a small picture. What changes a few numbers uncounted may then go unseen.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1)  # no copy of a kernel that lies as features do
    if rows.numel() < LARGE_WEIGHT:
        return rows @ waves(rows.shape[1])
    parts = rows.chunk(4, dim=1)
    return torch.cat([parts[i][i::4] @ waves(parts[i].shape[1]) for i in range(4)])


@cache
def waves(count: int) -> Tensor:
    """Numbers of which no few are multiples of others."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.float32, device="cpu").cos()


def convolution(features: Tensor, weight: Tensor, bias: Tensor | None, sides: Sides) -> Tensor:
    """The reference, by PyTorch's operators, which have gradients of every order."""
    if sides == Sides.KEPT:
        return F.conv2d(features, weight, bias, padding=1)
    if sides == Sides.HALVED:
        # Padded by two all around, and the first row and column of the result left out: that is a smaller copy than one
        # of the features into a larger tensor.
        return F.conv2d(features, weight, bias, stride=2, padding=2)[..., 1:, 1:].clone()
    # Of the nine pixels under a kernel those that repeat one pixel are equal, so their weights are added up beforehand:
    # four products for nine.
    weight = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last).flip(2, 3)
    sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # over 2x2 weights: (C, O, 4, 4)
    return F.conv_transpose2d(features, sums, bias, stride=2, padding=1)


class ByTiles(Function):
    """The same by tiles, with gradients."""

    @staticmethod
    def forward(ctx, features, weight, bias, sides):
        ctx.save_for_backward(features, weight, bias)
        ctx.sides = sides
        return convolve(features, pack(weight, sides, into=PASSING), weight.shape[0], bias, sides)

    @staticmethod
    def backward(ctx, towards):
        wanted, (features, weight, _) = ctx.needs_input_grad[:3], ctx.saved_tensors
        if is_for_reference(towards):
            return *gradients_by(partial(convolution, sides=ctx.sides), ctx.saved_tensors, wanted, towards), None
        if ctx.sides == Sides.HALVED:  # by PyTorch's own, which need not convolve once more as those of any function
            padded = F.pad(towards, (1, 0, 1, 0))  # what `convolution` leaves out
            given = padded, features, weight, [weight.shape[0]], [2, 2], [2, 2], [1, 1], False, [0, 0], 1, wanted
            return *torch.ops.aten.convolution_backward(*given), None
        return (
            to_features(towards, weight, ctx.sides) if wanted[0] else None,
            to_weight(features, towards, ctx.sides) if wanted[1] else None,
            towards.sum((0, 2, 3)) if wanted[2] else None,
            None,
        )


def to_features(towards: Tensor, weight: Tensor, sides: Sides) -> Tensor:
    """The gradient of features (B, C, H, W) from that of the result: a convolution by the kernel turned over."""
    gradient = convolve(towards, pack(weight.transpose(0, 1), turned=True, into=PASSING), weight.shape[1])
    return F.avg_pool2d(gradient, 2, divisor_override=1) if sides == Sides.DOUBLED else gradient


class Shape(ctypes.Structure):
    """How the kernels are told of pictures, and of channels that fill whole vectors."""

    _fields_ = [
        (name, ctypes.c_ssize_t) for name in ("pictures", "height", "width", "channels", "out_channels", "sides")
    ]

    @property
    def products(self) -> int:
        """Of a tile and a kernel, for a channel in and one out."""
        return {Sides.KEPT: 36, Sides.DOUBLED: 25, Sides.HALVED: 81}[self.sides]

    @cached_property
    def tiles(self) -> int:
        """That cover what becomes of all pictures."""
        height, width = map(Sides(self.sides).after, (self.height, self.width))
        return self.pictures * -(-height // PIXELS) * -(-width // PIXELS)

    @cached_property
    def numbers(self) -> int:
        """Of what is taken of a weight."""
        return run("winograd_numbers", self)

    @cached_property
    def room(self) -> int:
        """Numbers that lie between the steps of a thread."""
        return run("winograd_room", self)

    def threads(self, fewest: int) -> int:
        """With at least so many tiles for each."""
        return max(1, min(torch.get_num_threads(), self.tiles // fewest))


shape_of = lru_cache(Shape)  # one of each of late, which keeps its counts
Steps = ctypes.c_ssize_t * 4
PASSING = Workspace()  # for what is taken of a weight that changes at every step
TILES = run("winograd_tiles") if LIBRARY else 0  # of a block


def laid_out(features: Tensor) -> Tensor:
    """Features (B, C, H, W) as the kernels want them: (B, H, W, C) without gaps, C filled up to whole vectors."""
    return filled_up(features.permute(0, 2, 3, 1), -features.shape[1] % LANES)


def pack(weight: Tensor, sides: Sides = Sides.KEPT, turned: bool = False, into: Workspace | None = None) -> Tensor:
    """A weight (O, C, 3, 3), turned over or not, to what is taken of it, filled up to whole vectors."""
    out_channels, channels = weight.shape[:2]
    shape = shape_of(0, 0, 0, filled(channels, LANES), filled(out_channels, LANES), sides)
    packed = empty(shape.numbers) if into is None else into.of(shape.numbers)
    run("winograd_pack", shape, weight, channels, out_channels, Steps(*weight.stride()), turned, packed)
    return packed


def convolve(
    features: Tensor,
    packed: Tensor,
    out_channels: int,
    bias: Tensor | None = None,
    sides: Sides = Sides.KEPT,
    added: Tensor | None = None,
) -> Tensor:
    """Features (B, C, H, W) to (B, O, H', W') in channels last, by what `pack` gave."""
    features = laid_out(features)
    batch, height, width, channels = features.shape
    shape = shape_of(batch, height, width, channels, filled(out_channels, LANES), sides)
    threads = shape.threads(FEWEST_OF_THREAD)
    size = batch, out_channels, sides.after(height), sides.after(width)
    result = empty(batch, shape.out_channels, *size[2:], memory_format=torch.channels_last)
    added = None if added is None else laid_out(added.expand(size))
    missing = shape.out_channels - out_channels
    if bias is not None:
        bias = filled_up(bias, missing)
    room = WORKSPACE.of(threads * shape.room)
    run("winograd_convolve", shape, features, packed, bias, added, result, room, threads)
    return result[:, :out_channels].contiguous(memory_format=torch.channels_last) if missing else result


def to_weight(features: Tensor, towards: Tensor, sides: Sides) -> Tensor:
    """The gradient of the weight (O, C, 3, 3) from features and that of the result."""
    channels, out_channels = features.shape[1], towards.shape[1]
    features, towards = laid_out(features), laid_out(towards)
    shape = shape_of(*features.shape, towards.shape[3], sides)
    threads = shape.threads(TILES)  # of which each has sums of its own
    sums = WORKSPACE.of(threads * (shape.numbers + shape.room))
    room = sums[threads * shape.numbers :]
    weight = empty(shape.out_channels, shape.channels, 3, 3, memory_format=torch.channels_last)
    run("winograd_weight_gradient", shape, features, towards, weight, sums, room, threads)
    return weight[:out_channels, :channels]
