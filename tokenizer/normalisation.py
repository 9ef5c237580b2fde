"""Group norm and SiLU, on a CPU in one go (kernels/norm.c). Shapes: B batch, C channels, H W sides."""

import math

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from .kernels import LANES, run
from .kernels.memory import WORKSPACE, empty
from .processor import are_plain, is_hooked, wants_gradient
from .reference import gradients_by, is_for_reference


def group_norm(channels: int, norm_groups: int) -> nn.Module:
    """Group norm with `norm_groups` groups, or their greatest common divisor with `channels`; none where it is 0."""
    return nn.GroupNorm(math.gcd(channels, norm_groups), channels, eps=1e-6) if norm_groups else nn.Identity()


def activated(norm: nn.Module, features: Tensor, spare: bool = False) -> Tensor:
    """SiLU of the normed features (B, C, H, W), by the kernel where it can be.

    What is `spare` is not needed any more: without gradients the kernel may write the result over it, as new memory
    takes longer.
    """
    if type(norm) is nn.GroupNorm and is_for_kernel(norm, features):
        given = features, norm.weight, norm.bias, norm.num_groups, float(norm.eps)
        return NormedSiLU.apply(*given) if wants_gradient(*given[:3]) else normed_silu(*given, spare)[0]
    normed = norm(features)
    own = normed is not features and not torch.is_grad_enabled()
    # A grid of one place would keep other strides than with gradients, and the next layer round in another way.
    return F.silu(normed, inplace=own and normed.shape[2:].numel() > 1)


def is_for_kernel(norm: nn.GroupNorm, features: Tensor) -> bool:
    """Whether the kernel is here and takes these."""
    given = features, norm.weight, norm.bias
    return (
        LANES > 0
        and norm.weight is not None
        and norm.bias is not None
        and not is_hooked(norm)
        and features.ndim == 4
        and features.shape[1] == norm.num_channels
        and norm.num_channels % LANES == 0
        and norm.weight.shape == norm.bias.shape == (norm.num_channels,)
        and features.numel() > len(features) * norm.num_groups  # else PyTorch refuses to norm it
        and all(tensor.dtype == torch.float32 for tensor in given)
        and are_plain(*given)
    )


def normed_silu(
    features: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, spare: bool = False
) -> tuple[Tensor, Tensor]:
    """Features (B, C, H, W) to the same in channels last, in their own memory where that is spare; and statistics.

    These, (B, groups, 2), are the mean of a group and the inverse of its deviation.
    """
    features = features.contiguous(memory_format=torch.channels_last)
    sizes = len(features), features.shape[2:].numel(), features.shape[1]
    result = features if spare else empty(*features.shape, memory_format=torch.channels_last)
    statistics = empty(len(features), groups, 2)
    room = WORKSPACE.of(run("norm_room", *sizes))
    given = features, weight.contiguous(), bias.contiguous(), result, statistics, *sizes, groups, epsilon
    run("norm_silu", *given, room, torch.get_num_threads())
    return result, statistics


def gradients(
    features: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, towards: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of features, weight and bias from that of the result (B, C, H, W)."""
    features, towards = (each.contiguous(memory_format=torch.channels_last) for each in (features, towards))
    sizes = len(features), features.shape[2:].numel(), features.shape[1]
    found = empty(*features.shape, memory_format=torch.channels_last), empty(*weight.shape), empty(*bias.shape)
    room = WORKSPACE.of(run("norm_gradients_room", *sizes))
    given = features, towards, weight.contiguous(), bias.contiguous(), statistics, *found, *sizes, statistics.shape[1]
    run("norm_silu_gradients", *given, room, torch.get_num_threads())
    return found


class NormedSiLU(Function):
    """`normed_silu` with gradients."""

    @staticmethod
    def forward(ctx, features, weight, bias, groups, epsilon):
        result, statistics = normed_silu(features, weight, bias, groups, epsilon)
        ctx.save_for_backward(features, weight, bias, statistics)
        ctx.settings = groups, epsilon
        return result

    @staticmethod
    def backward(ctx, towards):
        *inputs, statistics = ctx.saved_tensors
        if not is_for_reference(towards):
            return *gradients(*inputs, statistics, towards), None, None
        groups, epsilon = ctx.settings

        def reference(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(F.group_norm(features, groups, weight, bias, epsilon))

        return *gradients_by(reference, inputs, ctx.needs_input_grad[:3], towards), None, None
