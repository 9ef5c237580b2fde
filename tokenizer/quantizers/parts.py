"""What the quantizers that are built of others share: how parts are named, asked for their codes, placed and stepped.

Shapes: B batch, D codebook_dim, h w grid sides.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..choices import build, complete
from .base import Quantizer, QuantizerOutput

DEFAULT_PART = {"name": "ema_vq"}


class CompositeQuantizer(Quantizer):
    """A quantizer built of others: placed once all of them are, and stepped and discarded with them."""

    has_parts = True
    parts: Sequence[Quantizer]  # in the order in which they are placed

    @property
    def placed(self) -> bool:
        return all(part.placed for part in self.parts)

    @property
    def num_codes(self) -> int:
        return sum(part.num_codes for part in self.parts)

    def step(self, progress: float = 1.0) -> bool:
        jumps = [part.step(progress) for part in self.parts]
        return any(jumps)

    def discard(self) -> None:
        for part in self.parts:
            part.discard()


class SuccessiveQuantizer(CompositeQuantizer):
    """One whose parts see what the codes of others have left: all are placed in one step, on the same latents."""

    def __init__(self):
        super().__init__()
        self.last_latents: Tensor | None = None  # (B, D, h, w) of the last forward pass in training

    def remember(self, latents: Tensor) -> None:
        """Keep the latents (B, D, h, w) of a forward pass in training for `step`."""
        if self.training:
            self.last_latents = latents.detach()

    @abstractmethod
    def place(self, latents: Tensor, progress: float) -> bool:
        """Place the parts on latents (B, D, h, w), if it is not too early; whether the codes jumped."""

    def step(self, progress: float = 1.0) -> bool:
        latents, self.last_latents = self.last_latents, None
        if latents is None or self.placed:
            return super().step(progress)
        return self.place(latents, progress)

    def discard(self) -> None:
        self.last_latents = None
        super().discard()


def build_part(given: dict[str, Any], codebook_dim: int, owner: str, also: Sequence[str] = ()) -> Quantizer:
    """The member of the table that the hyperparameter `each` names, over `codebook_dim` components.

    Raises ValueError for one that is built of others itself, unless it stands in `also`, or cannot be built.
    """
    from . import QUANTIZERS  # now: the table holds the owner as well, and is whole once every file is imported

    chosen = complete("each", DEFAULT_PART | given, QUANTIZERS)
    allowed = [name for name, member in QUANTIZERS.items() if not member.has_parts or name in also]
    if chosen["name"] not in allowed:
        raise ValueError(
            f"each.name={chosen['name']!r} is built of other quantizers; "
            f"a part of {owner!r} must be one of {', '.join(sorted(allowed))}"
        )
    part = build(QUANTIZERS, chosen, codebook_dim)
    if part.num_codebooks != 1 and chosen["name"] not in also:
        raise ValueError(
            f"each.name={chosen['name']!r} gives {part.num_codebooks} indices for a place; a part of {owner!r} must "
            f"give one: set its hyperparameters so"
        )
    return part


@torch.no_grad()
def evaluated(part: Quantizer, latents: Tensor) -> QuantizerOutput:
    """What the part makes of latents (B, D, h, w) in eval mode: it gathers nothing, and nothing in it is random."""
    if not part.training:
        return part(latents)
    part.eval()
    try:
        return part(latents)
    finally:
        part.train()


@torch.no_grad()
def place_shared(part: Quantizer, guess: Tensor, inputs: Callable[[Quantizer], Tensor], progress: float) -> bool:
    """Place a codebook that serves several stages, whose inputs depend on the codes; whether its codes jumped.

    A copy is placed on the guess (B, D, h, w), and the part on `inputs(copy)`, what all stages give it then.
    """
    scout = copy.deepcopy(part)
    scout.discard()
    part.discard()
    scout(guess)
    scout.step(progress)
    if not scout.placed:  # it is too early
        return False
    part(inputs(scout))
    return part.step(progress)
