"""From logits to tokens: guidance, temperature, top-k, top-p and the draw; pure functions on logits (B, V).

A setting that cannot be is a ValueError with the value, the rule and the way out.
"""

import math
from numbers import Real

import torch
from torch import Tensor


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """One token (B,) int64 from each row: temperature first, then top-k, then top-p of what is left, then the draw."""
    logits = with_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return draw(logits, uniforms)


def with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits of p^(1 / temperature), above 0: at 1 the distribution as it is, sharper below."""
    if not (isinstance(temperature, Real) and temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature={temperature!r} must be a finite number above 0; for the most likely token give top_k=1"
        )
    return logits / temperature


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """-inf for all but the top_k largest logits; those equal to the last one kept stay too."""
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k={top_k!r} must be a whole number of tokens, at least 1; None keeps all")
    largest = logits.topk(min(top_k, logits.shape[1])).values
    return logits.masked_fill(logits < largest[:, -1:], -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """-inf for all but the nucleus: the fewest largest logits with a total probability of at least top_p.

    Holtzman et al. 2019, arXiv:1904.09751, equation 2. Those equal to the last one kept stay too.
    """
    if not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r} must lie in (0, 1]; 1 or None keeps all")
    if top_p == 1:
        return logits  # rounding of the sum below could cut a tail
    ordered, _ = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities  # of the more likely ones; exactly 0 for the first
    smallest = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=1, keepdim=True)
    return logits.masked_fill(logits < smallest, -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token (B,) int64 at which the cumulative probability of each row first exceeds its uniform (B,) in [0, 1).

    One uniform per token is all the randomness there is, so that it can be drawn before the samples are split into
    batches (torch.multinomial and Gumbel noise take V numbers, in an order that depends on the batch). The sum runs in
    float64: in float32 a parallel sum over a large vocabulary is not monotone and could draw what was cut.
    """
    if logits.device.type == "mps":  # which has no float64
        return draw(logits.cpu(), uniforms).to(logits.device)
    cumulative = logits.float().softmax(dim=1).double().cumsum_(dim=1)  # in place: new memory takes longer
    targets = uniforms.to(cumulative) * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: logits without the class, moved `scale` times the way to those with it.

    Ho and Salimans 2022, arXiv:2207.12598, equation 6, where scale = 1 + w; on logits as in LlamaGen.
    """
    return null + scale * (conditional - null)


def guidance_scales(guidance_scale: float | tuple[float, float], num_positions: int) -> list[float]:
    """The scale at each position: one number, or a pair that it runs between in equal steps, first to last position.

    0 is the model without the class, 1 the model with it (no guidance); a rising pair, as the code of VAR has it
    (Tian et al. 2024, arXiv:2404.02905), leaves the first tokens varied.
    """
    pair = guidance_scale if isinstance(guidance_scale, (tuple, list)) else (guidance_scale, guidance_scale)
    if len(pair) != 2 or not all(isinstance(scale, Real) and scale >= 0 and math.isfinite(scale) for scale in pair):
        raise ValueError(
            f"guidance_scale={guidance_scale!r} must be one number or (first, last), finite and at least 0; "
            f"1 is no guidance"
        )
    first, last = pair
    return [first + (last - first) * position / max(1, num_positions - 1) for position in range(num_positions)]
