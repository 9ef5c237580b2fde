"""Muon: steps that move every direction of a matrix alike, for networks that must learn much in few steps.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the step's size as in Liu et al. 2025, arXiv:2502.16982,
equation 4, so that learning rates are those of AdamW. On a CPU all weights move by one call of kernels/muon.c where it
was built; the same by PyTorch's operators is its reference, and for accelerators and all else that it does not take.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from tokenizer.kernels import LIBRARY, run
from tokenizer.kernels.memory import WORKSPACE
from tokenizer.processor import are_plain

A, B, C = 3.4445, -4.7750, 2.0315  # of the quintic that draws singular values towards 1, to within 0.7 and 1.2
NUM_ITERATIONS = 5  # which kernels/muon.c has too, like the line above and the one below
MOMENTUM = 0.95
RMS_OF_ADAMW = 0.2  # of a typical AdamW step at learning rate 1
ORDERS = torch.contiguous_format, torch.channels_last  # of weights for the kernel: output channels are outermost


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups with `orthogonal=True`, whose parameters have two dimensions or more; AdamW for the others.

    A convolution's weight counts as the matrix (out_channels, all else). Weight decay is decoupled in both.
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
            moved = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
            increment_version(moved)  # which a fused step does not
        finally:
            self.param_groups = groups
        for_kernel = []
        for group in groups:
            for weight in group["params"] if group.get("orthogonal") else ():
                if weight.grad is not None:
                    given = weight, weight.grad, self.momentum(weight), group["lr"], group["weight_decay"]
                    if is_for_kernel(*given[:3]):
                        for_kernel.append(given)
                    else:
                        move(*given)
        if for_kernel:
            move_by_kernel(for_kernel)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """That of any run, whose weights may have lain otherwise: a fused step takes all as the weight lies.

        Gradients do by themselves, as autograd sees to it.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["fused"] = self.defaults["fused"]
        for weight, state in self.state.items():
            for name, value in state.items():
                if value.shape == weight.shape:
                    state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)

    def momentum(self, weight: Tensor) -> Tensor:
        """That of a weight which is about to move."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
            state["momentum"] = torch.zeros_like(weight)
        state["step"] += 1
        return state["momentum"]


def move(weight: Tensor, gradient: Tensor, momentum: Tensor, learning_rate: float, weight_decay: float) -> None:
    """One step of a weight (out_channels, ...) and of its momentum."""
    momentum.lerp_(gradient, 1 - MOMENTUM)
    direction = orthogonalized(gradient.lerp(momentum, MOMENTUM).flatten(1))  # Nesterov's look ahead
    weight.mul_(1 - learning_rate * weight_decay)
    weight.add_(direction.view_as(weight), alpha=-learning_rate * size_of_step(weight))


def size_of_step(weight: Tensor) -> float:
    """What a direction with singular values of 1 is multiplied by at learning rate 1."""
    return RMS_OF_ADAMW * max(sides(weight)) ** 0.5


def sides(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrix that it counts as."""
    return len(weight), weight.shape[1:].numel()


def is_for_kernel(weight: Tensor, gradient: Tensor, momentum: Tensor) -> bool:
    """Whether the kernel is here and takes these: dense, with their numbers in the same order."""
    given = weight, gradient, momentum
    return (
        LIBRARY is not None
        and weight.numel() > 0
        and weight.shape == gradient.shape == momentum.shape
        and weight.dtype == gradient.dtype == momentum.dtype == torch.float32
        and any(all(each.is_contiguous(memory_format=order) for each in given) for order in ORDERS)
        and are_plain(*given)
    )


class Move(ctypes.Structure):
    """`move` in kernels/muon.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "momentum")),
        *((name, ctypes.c_ssize_t) for name in ("rows", "columns")),
        *((name, ctypes.c_double) for name in ("kept", "moved")),
    )


def move_by_kernel(given: list[tuple[Tensor, Tensor, Tensor, float, float]]) -> None:
    """`move` for each, all of which `is_for_kernel` accepts, at once.

    Columns stand in the matrix as they lie in memory: in another order they would move by the same.
    """
    moves, threads = (Move * len(given))(), torch.get_num_threads()
    for each, (weight, gradient, momentum, learning_rate, weight_decay) in zip(moves, given, strict=True):
        each.weight, each.gradient, each.momentum = weight.data_ptr(), gradient.data_ptr(), momentum.data_ptr()
        each.rows, each.columns = sides(weight)
        each.kept, each.moved = 1 - learning_rate * weight_decay, learning_rate * size_of_step(weight)
    room = WORKSPACE.of(run("muon_room", moves, len(given), threads))
    run("muon_step", moves, len(given), room, threads)
    increment_version([tensor for weight, _, momentum, *_ in given for tensor in (weight, momentum)])


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
        result = whole_factor(wide @ wide.T) @ wide
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
    step = whole = factor(gram)
    for _ in range(NUM_ITERATIONS - 1):
        gram = step @ gram @ step
        step = factor(gram)
        whole = step @ whole
    return whole


def factor(gram: Tensor) -> Tensor:
    """What one iteration multiplies a matrix by (m, m)."""
    result = (gram @ gram).mul_(C).add_(gram, alpha=B)
    result.diagonal().add_(A)
    return result
