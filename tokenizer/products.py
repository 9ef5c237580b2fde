"""Products of matrices in float32 on a CPU, by the faster of the two libraries that PyTorch has for them.

PyTorch leaves them to MKL. oneDNN, which computes its convolutions, takes less than half the time on AMD processors
with vectors of 512 bits, and about as long where vectors have 256.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .processor import numbers_alone, onednn_operator, wants_gradient

ONEDNN_LINEAR = onednn_operator("mkldnn", "_linear_pointwise")
FEWEST_ROWS = 4  # of the left matrix: with fewer, MKL is done before oneDNN has begun
FEWEST_PRODUCTS = 2**21  # of numbers, where gradients are wanted: with fewer, Python takes the time that oneDNN saves


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, (n, m) from (n, d) and (d, m), up to rounding."""
    if is_for_onednn(left, right):
        return by_onednn(left, right.t())
    return left @ right


def linear(inputs: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(inputs, weight)`, (..., m) from (..., d) and (m, d), up to rounding."""
    rows = inputs.flatten(0, -2) if inputs.ndim > 1 else inputs[None]
    if is_for_onednn(rows, weight.t()):
        return by_onednn(rows, weight).unflatten(0, inputs.shape[:-1])
    return F.linear(inputs, weight)


def is_for_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN is to multiply (n, d) by (d, m)."""
    return (
        ONEDNN_LINEAR is not None
        and len(left) >= FEWEST_ROWS
        and left.dtype == right.dtype == torch.float32
        and left.shape[1] == right.shape[0] > 0
        and (not wants_gradient(left, right) or len(left) * right.numel() >= FEWEST_PRODUCTS)
        and numbers_alone(left, right)
    )


def by_onednn(left: Tensor, weight: Tensor) -> Tensor:
    """`left @ weight.t()`, with gradients where they are wanted."""
    if wants_gradient(left, weight):
        return OneDNNLinear.apply(left, weight)
    return ONEDNN_LINEAR(left, weight, None, "none", [], "")


class OneDNNLinear(Function):
    """`left @ weight.t()` by oneDNN, which has no backward pass; this one's are products again."""

    @staticmethod
    def forward(ctx, left, weight):
        for_left, for_weight = ctx.needs_input_grad
        ctx.save_for_backward(weight if for_left else None, left if for_weight else None)
        return ONEDNN_LINEAR(left, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, towards):
        weight, left = ctx.saved_tensors
        by_left = None if weight is None else product(towards, weight)
        if left is None:
            return by_left, None
        if towards.shape[1] > left.shape[1]:  # what is turned over is copied: the smaller of the two
            return by_left, product(left.t(), towards).t()
        return by_left, product(towards.t(), left)
