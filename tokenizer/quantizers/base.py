"""The contract of every quantizer.

Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

MAX_BITS = 62  # of an index, an int64, so that vocab_size is one too


@dataclass
class QuantizerOutput:
    quantized: Tensor  # (B, D, h, w) float32; in training the gradient passes straight through what has none
    indices: Tensor  # (B, h, w) int64 in [0, vocab_size)
    losses: dict[str, Tensor]  # named scalars, already weighted; empty where the method has none


class Quantizer(nn.Module, ABC):
    """`Quantizer(codebook_dim, **hyperparameters)`, every hyperparameter with a default.

    A training loop calls `step(progress)` once after each optimizer step that was really taken, on every rank, or
    `discard()` after one that was skipped. Quantizers whose codes move by gradient alone inherit both as no-ops.
    """

    vocab_size: int  # number of different indices

    @abstractmethod
    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Latents (B, D, h, w) of any float type to the nearest codes; the search runs in float32."""

    @abstractmethod
    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) int64 in [0, vocab_size) to codes (B, D, h, w) float32."""

    def step(self, progress: float = 1.0) -> bool:
        """Apply what the forward passes since the last call have gathered.

        `progress` in [0, 1], the share of the run that is done, drives annealing; at the default nothing is annealed.
        Returns whether the codes jumped, so that averages of weights must start anew.
        """
        return False

    def discard(self) -> None:
        """Forget what the forward passes since the last `step` have gathered: the optimizer step was skipped."""
