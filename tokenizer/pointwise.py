"""1x1 convolutions, on a CPU by products whose rows do not depend on each other (kernels/pointwise.c).

PyTorch chooses between libraries by the number of pictures, so that a picture would depend on those beside it.
Shapes: B batch, C O channels in and out, H W sides.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from .kernels import LANES, LIBRARY, filled, run
from .kernels.memory import WORKSPACE, empty
from .processor import are_plain, is_in_float32, wants_gradient
from .reference import gradients_by

ROWS = 4  # of a product that the kernels take at once, as in products.h


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
        if torch.is_grad_enabled() or not are_plain(towards):  # gradients of gradients, or many at once
            return tuple(gradients_by(F.conv2d, ctx.saved_tensors, wanted, towards))
        return (
            to_features(towards, weight) if wanted[0] else None,
            to_weight(features, towards) if wanted[1] else None,
            towards.sum((0, 2, 3)) if wanted[2] else None,
        )


def places_of(features: Tensor) -> Tensor:
    """Features (B, C, H, W) as (B * H * W, C) without gaps."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).contiguous()


def pictures_of(places: Tensor, like: Tensor) -> Tensor:
    """The same back, beside the features that they came of, (B, ..., H, W)."""
    batch, _, height, width = like.shape
    return places.view(batch, height, width, places.shape[1]).permute(0, 3, 1, 2)


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Features (B, C, H, W) by a weight (O, C, 1, 1) to (B, O, H, W) in channels last."""
    places, out_channels = places_of(features), weight.shape[0]
    count, channels = places.shape
    columns = filled(out_channels, LANES)
    result, room = empty(count, columns), WORKSPACE.of(run("pointwise_room", channels, columns))
    if bias is not None:
        bias = F.pad(bias, (0, columns - out_channels)).contiguous()
    given = places, weight.contiguous(), bias, result, count, channels, out_channels, columns, room
    run("pointwise_convolve", *given, torch.get_num_threads())
    return pictures_of(result[:, :out_channels].contiguous(), features)


def to_features(towards: Tensor, weight: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of features from that of the result."""
    places = places_of(towards)
    count, (out_channels, channels) = len(places), weight.shape[:2]
    if channels % LANES:
        return pictures_of(places @ weight.flatten(1), towards)
    result, room = empty(count, channels), WORKSPACE.of(run("pointwise_room", channels, out_channels))
    given = places, weight.contiguous(), result, count, channels, out_channels, room
    run("pointwise_to_features", *given, torch.get_num_threads())
    return pictures_of(result, towards)


def to_weight(features: Tensor, towards: Tensor) -> Tensor:
    """The gradient (O, C, 1, 1) of a weight from features and that of the result."""
    left, right = places_of(towards), places_of(features)
    out_channels, channels = left.shape[1], right.shape[1]
    if channels % LANES or out_channels % ROWS:
        return (left.t() @ right)[:, :, None, None]
    result = empty(out_channels, channels, 1, 1)
    run("pointwise_to_weight", right, left, result, len(left), channels, out_channels, torch.get_num_threads())
    return result
