"""The contract of every quantizer.

Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors, q codebooks, L tokens in all.
Indices are (B, h, w); (B, h, w, q) where several codebooks describe a place; (B, L) where the grids differ in size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

MAX_BITS = 62  # of an index, an int64, so that vocab_size is one too


@dataclass
class QuantizerOutput:
    quantized: Tensor  # (B, D, h, w) float32; its gradient reaches the latents as the quantizer says
    indices: Tensor  # (B, h, w), (B, h, w, q) or (B, L), int64 in [0, vocab_size)
    losses: dict[str, Tensor]  # named scalars, already weighted; empty where the method has none


class Quantizer(nn.Module, ABC):
    """`Quantizer(codebook_dim, **hyperparameters)`, every hyperparameter with a default.

    A training loop calls `step(progress)` once after each optimizer step that was really taken, on every rank, or
    `discard()` after one that was skipped. Quantizers whose codes move by gradient alone inherit both as no-ops.
    """

    vocab_size: int  # number of different indices
    num_codebooks: int = 1  # q, indices of a place; above 1 they are the last axis
    multiscale: ClassVar[bool] = False  # indices are (B, L); `indices_to_codes` then takes grid_size=(h, w) too
    coarse_to_fine: ClassVar[bool] = False  # whether the first codebooks, or the first scales, decode without the rest
    has_parts: ClassVar[bool] = False  # whether it is built of other members of the table
    refinement: float = 1.0  # times finer that fixed codes must be for what they have left; 1 where codes learn to be

    @abstractmethod
    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) of any float type to codes; the choice among them is made in float32."""

    @abstractmethod
    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices as `forward` gives them, in [0, vocab_size), to codes (B, D, h, w) float32."""

    @property
    def placed(self) -> bool:
        """Whether the codes lie among the latents yet; until they do, training passes the latents on as they are."""
        return True

    @property
    def num_codes(self) -> int:
        """Number of different codes: `vocab_size`, times the codebooks where each has codes of its own."""
        return self.vocab_size

    def code_numbers(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Which of the `num_codes` codes each index stands for, in the same shape; what usage is counted by.

        `grid_size` (h, w) is that of the latents, which indices (B, L) do not tell.
        """
        return indices

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """The (h, w) of each grid of indices, in their order, for latents (B, D, height, width)."""
        return [(height, width)]

    def step(self, progress: float = 1.0) -> bool:
        """Apply what the forward passes since the last call have gathered.

        `progress` in [0, 1], the share of the run that is done, drives annealing; at the default nothing is annealed.
        Returns whether the codes jumped, so that averages of weights must start anew.
        """
        return False

    def discard(self) -> None:
        """Forget what the forward passes since the last `step` have gathered: the optimizer step was skipped."""
