"""What the quantizers that are built of others share: how a part is named, asked for its codes, and placed."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..choices import build, complete
from .base import Quantizer, QuantizerOutput

DEFAULT_PART = {"name": "ema_vq"}


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


def step_all(parts: Iterable[Quantizer], progress: float) -> bool:
    """Step every part; whether the codes of any of them jumped."""
    jumps = [part.step(progress) for part in parts]
    return any(jumps)
