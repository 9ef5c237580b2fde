"""Products of matrices in float32 on a CPU, by the faster of the two libraries that PyTorch has for them.

PyTorch leaves them to MKL. oneDNN, which computes its convolutions, takes less than half the time on AMD processors
with vectors of 512 bits, and about as long where vectors have 256.
"""

import platform

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter
from torch.nn import functional as F

# What `torch.compile` puts in the place of a frozen linear layer; no public function leads there. None: it is not here,
# or nobody has measured it here.
ONEDNN_LINEAR = None
if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
    ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
FEWEST_ROWS = 4  # of the left matrix: with fewer, MKL is done before oneDNN has begun


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, (n, m) from (n, d) and (d, m), up to rounding."""
    if is_for_onednn(left, right.t()):
        return by_onednn(left, right.t())
    return left @ right


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(inputs, weight)`, (..., m) from (..., d) and (m, d), up to rounding."""
    rows = inputs.flatten(0, -2)
    if is_for_onednn(rows, weight):
        return by_onednn(rows, weight).unflatten(0, inputs.shape[:-1])
    return F.linear(inputs, weight)


def is_for_onednn(left: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply (n, d) by (m, d) turned over: it knows no autocast, trace, transform, tangent."""
    return (
        ONEDNN_LINEAR is not None
        and torch.backends.mkldnn.enabled
        and left.device.type == "cpu"
        and {type(left), type(weight)} <= {Tensor, Parameter}
        and left.dtype == weight.dtype == torch.float32
        and len(left) >= FEWEST_ROWS
        and left.shape[1] == weight.shape[1] > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and unpack_dual(left).tangent is unpack_dual(weight).tangent is None
    )


def by_onednn(left: Tensor, weight: Tensor) -> Tensor:
    """`left @ weight.t()`, with gradients where they are wanted."""
    if torch.is_grad_enabled() and (left.requires_grad or weight.requires_grad):
        return Linear.apply(left, weight)
    return ONEDNN_LINEAR(left, weight, None, "none", [], "")


class Linear(Function):
    """`left @ weight.t()` by oneDNN, which has no backward pass; this one's are products again."""

    @staticmethod
    def forward(ctx, left, weight):
        ctx.save_for_backward(left, weight)
        return ONEDNN_LINEAR(left, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, towards):
        left, weight = ctx.saved_tensors
        by_left = product(towards, weight) if ctx.needs_input_grad[0] else None
        by_weight = product(towards.t(), left) if ctx.needs_input_grad[1] else None
        return by_left, by_weight
