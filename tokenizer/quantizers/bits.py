"""Codes of bits: bits <-> indices, and the entropies of soft bits in memory that does not grow with the codes.

A soft bit is 1 with probability sigmoid(logit), independently of the others, so that a code has the product of the
probabilities of its bits. Softmax over all 2^D codes is exactly that where the distance to a code is a sum over bits.
Shapes: B batch, D bits, h w grid sides, N vectors, g bits of a group.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ranks import mean_over_ranks


def bits_to_indices(bits: Tensor) -> Tensor:
    """Bits (B, D, h, w) bool to indices (B, h, w) int64; channel 0 is the least significant bit."""
    places = torch.arange(bits.shape[1], device=bits.device).view(-1, 1, 1)
    return (bits.long() << places).sum(1)


def indices_to_bits(indices: Tensor, num_bits: int) -> Tensor:
    """Indices (B, h, w) int64 to bits (B, D, h, w) bool."""
    places = torch.arange(num_bits, device=indices.device)
    return ((indices[..., None] >> places) & 1).bool().movedim(-1, 1)


def sample_entropy(logits: Tensor) -> Tensor:
    """Mean over vectors of the entropy of their codes, in nats: logits (N, D) to a scalar.

    Exact for any D: the entropy of independent bits is the sum of theirs.
    """
    size = logits.abs()  # the entropy of a bit does not depend on the sign, and so rounds well at both ends
    return (F.softplus(-size) + size * torch.sigmoid(-size)).sum(1).mean()


def batch_entropy(logits: Tensor, bits_per_group: int) -> Tensor:
    """Entropy of the mean over vectors (of all ranks) of the codes' probabilities, in nats: logits (N, D) to a scalar.

    Exact where D <= bits_per_group. Otherwise the sum of the entropies of consecutive groups of bits: an upper bound,
    reached where the groups are independent over the batch, and never above the exact one by more than the sum less
    the largest of its terms.
    """
    means = [group_mean(group) for group in logits.split(bits_per_group, dim=1)]
    return torch.stack([entropy(mean_over_ranks(mean)) for mean in means]).sum()


def group_mean(logits: Tensor) -> Tensor:
    """Mean over vectors of the probabilities of the 2^g codes of a few bits: logits (N, g) to (2^(g - g//2), 2^(g//2)).

    The probability of a code is that of its lower bits times that of its upper ones, so that the mean is a product of
    two matrices with N x 2^(g/2) entries each, and no N x 2^g is ever held.
    """
    num_lower = logits.shape[1] // 2
    lower, upper = code_probabilities(logits[:, :num_lower]), code_probabilities(logits[:, num_lower:])
    return upper.t() @ lower / len(logits)


def code_probabilities(logits: Tensor) -> Tensor:
    """Probabilities (N, 2^g) of all codes of a few bits, from their logits (N, g)."""
    num_bits = logits.shape[1]
    codes = torch.arange(2**num_bits, device=logits.device)
    patterns = (codes >> torch.arange(num_bits, device=logits.device)[:, None]) & 1  # (g, 2^g)
    return torch.softmax(logits @ patterns.to(logits.dtype), dim=1)


def entropy(probabilities: Tensor) -> Tensor:
    """In nats; a probability that underflows to 0 adds none, and no infinite gradient either."""
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum()
