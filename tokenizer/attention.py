"""Attention of one head over all places, on a CPU by a kernel (kernels/attention.c).

Shapes: B batch, n places, C channels.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .kernels import LANES, LIBRARY, run
from .kernels.memory import WORKSPACE, empty
from .processor import are_plain, is_in_float32, wants_gradient
from .reference import gradients_by, is_for_reference

PLAIN_PLACES = 1024  # up to which a CPU attends by plain products


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, each (B, n, C); under autocast, too, in float32 where it is by the kernel."""
    if not is_for_kernel(query, key, value):
        return plainly(query, key, value)
    given = query.float(), key.float(), value.float()
    return Attention.apply(*given) if wants_gradient(*given) else by_kernel(*given)


def is_for_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is here and takes these."""
    return (
        LIBRARY is not None
        and all(is_in_float32(each) for each in (query, key, value))
        and are_plain(query, key, value)
        and query.ndim == 3
        and query.shape == key.shape == value.shape
        and query.numel() > 0
        and query.shape[1] % LANES == query.shape[2] % LANES == 0
    )


def plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """By PyTorch's operators.

    Fused attention, which never holds the n * n scores, wants the channels of a place together. On a CPU plain products
    are as fast for few places, faster where gradients follow, and in bfloat16, which it computes at float32's rate.
    """
    if query.device.type == "cpu" and query.shape[1] <= PLAIN_PLACES:
        return by_products(query, key, value)
    parts = (part.contiguous()[:, None] for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts).squeeze(1)


def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The reference, which has gradients of every order."""
    scores = torch.bmm(query * query.shape[2] ** -0.5, key.mT)
    return torch.bmm(scores.softmax(dim=2), value)


class Attention(Function):
    """`by_kernel` with gradients."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return by_kernel(query, key, value)

    @staticmethod
    def backward(ctx, towards):
        if is_for_reference(towards):
            return tuple(gradients_by(by_products, ctx.saved_tensors, ctx.needs_input_grad, towards))
        return gradients_by_kernel(*ctx.saved_tensors, towards)


def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, each (B, n, C), n and C multiples of LANES."""
    sizes, threads = query.shape, torch.get_num_threads()
    result, room = empty(*sizes), WORKSPACE.of(run("attention_room", *sizes, threads))
    run("attention", *(each.contiguous() for each in (query, key, value)), result, *sizes, room, threads)
    return result


def gradients_by_kernel(query: Tensor, key: Tensor, value: Tensor, towards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query, key and value from that of the result, all (B, n, C)."""
    sizes, threads = query.shape, torch.get_num_threads()
    given, found = (each.contiguous() for each in (query, key, value, towards)), tuple(empty(*sizes) for _ in range(3))
    room = WORKSPACE.of(run("attention_gradients_room", *sizes[1:], threads))
    run("attention_gradients", *given, *found, *sizes, room, threads)
    return found
