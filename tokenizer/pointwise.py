"""1x1 convolutions, on a CPU by products whose rows do not depend on each other (kernels/pointwise.c).

PyTorch chooses between libraries by the number of pictures, so that the result would depend on those beside it.
Shapes: B batch, C O channels in and out, H W sides.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from .kernels import LANES, LIBRARY, filled, filled_up, run
from .kernels.memory import WORKSPACE, empty
from .processor import are_plain, is_in_float32, wants_gradient
from .reference import gradients_by, is_for_reference


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, with gradients and without by the kernels where they are here and take these."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, H, W) to (B, O, H, W); under autocast, too, in float32 where it is by the kernels."""
        weight, bias = self.weight, self.bias  # once: they may be computed from others
        if not is_for_kernels(features, weight, bias):
            return F.conv2d(features, weight, bias)
        given = features.float(), weight, bias
        return Pointwise.apply(*given) if wants_gradient(*given) else convolve(*given)


def is_for_kernels(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels are here and take these."""
    parameters = [weight] if bias is None else [weight, bias]
    return (
        LIBRARY is not None
        and is_in_float32(features, *parameters)
        and are_plain(features, *parameters)
        and features.ndim == 4
        and features.numel() > 0
        and weight.shape[1:] == (features.shape[1], 1, 1)
        and (bias is None or bias.shape == weight.shape[:1])
    )


class Pointwise(Function):
    """`convolve` with gradients."""

    @staticmethod
    def forward(ctx, features, weight, bias):
        ctx.save_for_backward(features, weight, bias)
        return convolve(features, weight, bias)

    @staticmethod
    def backward(ctx, towards):
        wanted, (features, weight, _) = ctx.needs_input_grad, ctx.saved_tensors
        if is_for_reference(towards):
            return tuple(gradients_by(F.conv2d, ctx.saved_tensors, wanted, towards))
        if features.shape[1] % LANES or weight.shape[0] % LANES:  # by PyTorch's own, which take any number
            given = towards, features, weight, [weight.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
            return torch.ops.aten.convolution_backward(*given)
        return (
            to_features(towards, weight) if wanted[0] else None,
            to_weight(features, towards) if wanted[1] else None,
            towards.sum((0, 2, 3)) if wanted[2] else None,
        )


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features (B, C, H, W) by a weight (O, C, 1, 1) to (B, O, H, W) in channels last."""
    features = features.contiguous(memory_format=torch.channels_last)
    (batch, channels, height, width), out_channels = features.shape, weight.shape[0]
    columns = filled(out_channels, LANES)
    missing = columns - out_channels
    result = empty(batch, columns, height, width, memory_format=torch.channels_last)
    if bias is not None:
        bias = filled_up(bias, missing)
    sizes = batch * height * width, channels, out_channels
    room = WORKSPACE.of(run("pointwise_room", channels, columns))
    given = features, weight.contiguous(), bias, result, *sizes, columns, room
    run("pointwise_convolve", *given, torch.get_num_threads())
    return result[:, :out_channels].contiguous(memory_format=torch.channels_last) if missing else result


def to_features(towards: Tensor, weight: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of features from that of the result, C and O multiples of LANES."""
    towards = towards.contiguous(memory_format=torch.channels_last)
    (batch, out_channels, height, width), channels = towards.shape, weight.shape[1]
    result = empty(batch, channels, height, width, memory_format=torch.channels_last)
    sizes = batch * height * width, channels, out_channels
    room = WORKSPACE.of(run("pointwise_rest", channels, out_channels))
    run("pointwise_to_features", towards, weight.contiguous(), result, *sizes, room, torch.get_num_threads())
    return result


def to_weight(features: Tensor, towards: Tensor) -> Tensor:
    """The gradient (O, C, 1, 1) of a weight from features and that of the result, C and O multiples of LANES."""
    features, towards = (each.contiguous(memory_format=torch.channels_last) for each in (features, towards))
    (batch, channels, height, width), out_channels = features.shape, towards.shape[1]
    sizes = batch * height * width, channels, out_channels
    result = empty(out_channels, channels, 1, 1)
    run("pointwise_to_weight", features, towards, result, *sizes, torch.get_num_threads())
    return result
