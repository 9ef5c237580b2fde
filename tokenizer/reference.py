"""Gradients of what a kernel computes where those of the reference must do: of every order, for many at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .processor import are_plain


def is_for_reference(towards: Tensor) -> bool:
    """Whether gradients of gradients are wanted, or many at once: no kernel gives those."""
    return torch.is_grad_enabled() or not are_plain(towards)


def gradients_by(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], towards: Tensor
) -> list[Tensor | None]:
    """Of the inputs that are wanted, in float32 under autocast too; they have gradients where these are enabled."""
    again = torch.is_grad_enabled()
    if again:  # each a tensor of its own: one may be another or depend on it, which is the outer graph's concern
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    else:
        inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        for tensor, want in zip(inputs, wanted, strict=True):
            if want:
                tensor.requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        result = reference(*inputs)
    chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(result, chosen, towards, create_graph=again))
    return [next(found) if want else None for want in wanted]
