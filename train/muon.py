"""Muon: steps that move every direction of a matrix alike, for networks that must learn much in few steps.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the step's size as in Liu et al. 2025, arXiv:2502.16982,
equation 4, so that learning rates are those of AdamW.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenizer.products import product

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic that draws singular values towards 1, to within 0.7 and 1.2
NUM_ITERATIONS = 5
MOMENTUM = 0.95
SMALL = 64  # rows of gram matrices for which PyTorch's own product is the faster
RMS_OF_ADAMW = 0.2  # of a typical AdamW step at learning rate 1


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups with `orthogonal=True`, whose parameters have two dimensions or more; AdamW for the others.

    A kernel counts as the matrix (out_channels, all else). Weight decay is decoupled in both.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss, groups = None, self.param_groups
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self.param_groups = [group for group in groups if not group.get("orthogonal")]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group.get("orthogonal") else ():
                if weight.grad is not None:
                    self.move(weight, group["lr"], group["weight_decay"])
        return loss

    def move(self, weight: Tensor, learning_rate: float, weight_decay: float) -> None:
        """One step of a weight by its gradient."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        momentum = state["momentum"]
        momentum.lerp_(weight.grad, 1 - MOMENTUM)
        direction = orthogonalized(weight.grad.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's look ahead
        size = RMS_OF_ADAMW * max(direction.shape) ** 0.5
        weight.mul_(1 - learning_rate * weight_decay)
        weight.add_(direction.view_as(weight), alpha=-learning_rate * size)


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix with its singular vectors and singular values near 1, by Newton-Schulz iterations.

    In bfloat16 on accelerators, which is enough for it. In float32 on a CPU and there by `whole_factor`: kernels are
    wide matrices, of which that takes less than half the products.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)  # no singular value above 1
    if matrix.device.type == "cpu":
        wide = wide.float()
        result = product(whole_factor(product(wide, wide.T)), wide)
    else:
        result = iterated(wide.bfloat16())
    return (result.T if tall else result).to(matrix.dtype)


def iterated(matrix: Tensor) -> Tensor:
    """The iterations one by one, of a matrix (m, n)."""
    for _ in range(NUM_ITERATIONS):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=B, alpha=C), matrix, beta=A)
    return matrix


def whole_factor(gram: Tensor) -> Tensor:
    """What all iterations multiply a matrix by (m, m), from its gram matrix alone.

    The next gram matrix is the one before between the factor twice. In bfloat16 its small eigenvalues would be lost.
    """
    times = torch.mm if len(gram) <= SMALL else product
    step = whole = factor(gram, times)
    for _ in range(NUM_ITERATIONS - 1):
        gram = times(times(step, gram), step)
        step = factor(gram, times)
        whole = times(step, whole)
    return whole


def factor(gram: Tensor, times: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What one iteration multiplies a matrix by (m, m)."""
    result = times(gram, gram).mul_(C).add_(gram, alpha=B)
    result.diagonal().add_(A)
    return result
