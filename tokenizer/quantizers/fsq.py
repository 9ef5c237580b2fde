"""Finite scalar quantization: each component of the latents is bounded and rounded; the codebook is never stored.

Mentzer et al. 2023, arXiv:2309.15505, section 3 and appendix A.1.
Shapes: B batch, D codebook_dim, h w grid sides, L levels of a component.
"""

import math

import torch
from torch import Tensor

from .base import MAX_BITS, Quantizer, QuantizerOutput
from .checks import check_codebook_dim
from .gradients import straight_through


class FiniteScalarQuantizer(Quantizer):
    """FSQ: L levels in each component, the codes their product; no loss, no code that could die.

    The index is written in mixed radix, component 0 the least significant digit. Codes lie in [-1, 1]: digits less
    L // 2, over L // 2, so that an even L has one level more below zero than above.
    Two departures from appendix A.1: its epsilon is left out, because the ends of tanh round to the outermost levels
    without it (and above 1000 levels would not with it), and the shift is atanh where it has tan, which agree to the
    third order, so that latents 0 are exactly the middle level.
    """

    def __init__(
        self,
        codebook_dim: int,
        levels: list[int] | int = 4,  # L of each component in turn, or of all of them; the paper advises 5 and more
    ):
        super().__init__()
        check_codebook_dim(codebook_dim)
        levels = [levels] * codebook_dim if isinstance(levels, int) else levels
        check_levels(codebook_dim, levels)
        self.vocab_size = math.prod(levels)
        # Lists and no buffers: they are no part of a checkpoint, and no cast to bfloat16 may round them.
        self.levels = levels
        self.place_values = [math.prod(levels[:number]) for number in range(codebook_dim)]
        self.refinement = float(min(levels))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bound(latents.float())
            rounded = bounded.detach().round()
            half_width = torch.tensor(self.levels, device=latents.device).view(-1, 1, 1) // 2  # (D, 1, 1)
            place_values = torch.tensor(self.place_values, device=latents.device).view(-1, 1, 1)
            digits = rounded.nan_to_num().long() + half_width  # (B, D, h, w) in [0, L), NaN in the middle
            indices = (digits * place_values).sum(1)
            quantized = straight_through(bounded, rounded) / half_width
        return QuantizerOutput(quantized, indices, {})

    def bound(self, latents: Tensor) -> Tensor:
        """Latents (B, D, h, w) into [-(L // 2), (L - 1) // 2], where rounding leaves L levels; 0 stays 0."""
        levels = torch.tensor(self.levels, device=latents.device).view(-1, 1, 1)
        half = (levels - 1) / 2
        offset = 0.5 * (levels % 2 == 0)  # an even L has no level in the middle of tanh's range: half a step down
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, device=indices.device)
        place_values = torch.tensor(self.place_values, device=indices.device)
        digits = indices[..., None] // place_values % levels  # (B, h, w, D)
        half_width = levels // 2
        return ((digits - half_width) / half_width).movedim(-1, 1)


def check_levels(codebook_dim: int, levels: list[int]) -> None:
    """Raise a ValueError that names the value, the rule and the way out."""
    if len(levels) != codebook_dim:
        raise ValueError(
            f"levels={levels} has {len(levels)} numbers and codebook_dim is {codebook_dim}; there must be one for each "
            f"component: set codebook_dim={len(levels)}, or give one number for all"
        )
    if min(levels) < 3:
        raise ValueError(f"levels={levels} must all be at least 3; components of two levels are lfq's and bsq's")
    if max(levels) > 2**16:
        raise ValueError(
            f"levels={levels} must all be at most 65536, so that float32 tells neighbours well apart; take fewer"
        )
    if math.prod(levels) > 2**MAX_BITS:
        raise ValueError(
            f"levels={levels} are {math.prod(levels):,} codes; an index has at most {MAX_BITS} bits: take fewer levels "
            f"or a smaller codebook_dim"
        )
