"""The transformer one position at a time: what its blocks compute for the newest input, given a cache of the others.

Generation passes here once per token, with a few rows at a time, so that its time is that of reading weights and cache
and of starting operations. What does not change from step to step is therefore computed once: matrices lie in the order
in which rows times matrix reads them, the weight of each norm is multiplied into the matrix or the angles after it.
Shapes: B batch, W width, H heads, d = W / H, T positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.products import product

from .transformer import NORM_EPS, Attention, Block, KVCache, RMSNorm, Transformer, rotary_angles


class Decoder:
    """A transformer and the linear layer that reads it off, the same up to rounding.

    Their weights are copied, those of a sharded one whole on every rank.
    """

    def __init__(self, transformer: Transformer, head: nn.Linear, coordinates: Tensor):
        angles = rotary_angles(coordinates, transformer.head_width)
        self.blocks = [DecoderBlock(block, angles) for block in transformer.blocks]
        self.head = matrix(weight_after(transformer.norm, head))
        self.capacity = len(coordinates)

    def caches(self, batch: int) -> list[KVCache]:
        """Empty ones, one per block, for a batch."""
        return [KVCache(self.capacity) for _ in self.blocks]

    def logits(self, hidden: Tensor, position: int, caches: list[KVCache]) -> Tensor:
        """The input (B, W) at a position, with caches of all before it, which it joins, to (B, V) float32."""
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block.step(hidden, position, cache)
        return product(normalised(hidden), self.head).float()


class DecoderBlock:
    """One block's weights as a step reads them."""

    def __init__(self, block: Block, angles: Tensor):
        attention, feed_forward = block.attention, block.feed_forward
        self.num_heads = attention.num_heads
        self.expand_attention = matrix(weight_after(block.attention_norm, attention.expand))
        self.project_attention = matrix(attention.project.weight)
        self.expand_feed_forward = matrix(weight_after(block.feed_forward_norm, feed_forward.expand))
        self.project_feed_forward = matrix(feed_forward.project.weight)
        self.straight, self.crossed = (factors[:, :, None] for factors in turning(attention, angles))  # (T, 2, 1, d)

    def step(self, hidden: Tensor, position: int, cache: KVCache) -> Tensor:
        """Inputs (B, W) at a position to outputs (B, W)."""
        parts = product(normalised(hidden), self.expand_attention).view(len(hidden), 3, self.num_heads, -1)
        queries, keys = self.rotated(parts[:, :2], position).unbind(dim=1)  # (B, H, d)
        cache.append(keys[:, :, None], parts[:, 2, :, None])
        attended = cache.attend(queries.flatten(0, 1)[:, None]).view_as(hidden)
        hidden = hidden + product(attended.type_as(hidden), self.project_attention)
        gate, value = product(normalised(hidden), self.expand_feed_forward).chunk(2, dim=1)
        return hidden + product(F.silu(gate) * value, self.project_feed_forward)

    def rotated(self, parts: Tensor, position: int) -> Tensor:
        """Queries and keys (B, 2, H, d) as float32, normalised and turned: `rotate` with both norms' weights in it."""
        unit = unit_rms(parts.float())
        swapped = unit.roll(unit.shape[3] // 2, 3)  # of a pair, each component where the other was
        return torch.addcmul(unit * self.straight[position], swapped, self.crossed[position])


def normalised(hidden: Tensor) -> Tensor:
    """RMSNorm without its weight."""
    return unit_rms(hidden.float()).type_as(hidden)


def unit_rms(vectors: Tensor) -> Tensor:
    return vectors * vectors.square().mean(dim=-1, keepdim=True).add_(NORM_EPS).rsqrt_()


def turning(attention: Attention, angles: Tensor) -> tuple[Tensor, Tensor]:
    """What rotation by angles (T, d / 2) multiplies normalised queries and keys by, and the other of each pair.

    Both (T, 2, d) float32, with both norms' weights and, of the queries, the scale of the scores.
    """
    half = angles.shape[1]
    query_norm, key_norm = (whole(norm.weight).float() for norm in (attention.query_norm, attention.key_norm))
    norms = torch.stack([query_norm * (2 * half) ** -0.5, key_norm])
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]  # (T, 1, d / 2)
    crossed = norms.roll(half, 1) * torch.cat([-sine, sine], dim=2)
    return norms * torch.cat([cosine, cosine], dim=2), crossed


def weight_after(norm: RMSNorm, linear: nn.Linear) -> Tensor:
    """The weight (out, in) of a linear layer, with that of the norm before it."""
    weight = whole(linear.weight)
    return (weight.float() * whole(norm.weight).float()).type_as(weight)


def matrix(weight: Tensor) -> Tensor:
    """A linear layer's weight (out, in) as a contiguous (in, out): up to four times as fast on a CPU for one row."""
    return whole(weight).t().contiguous()


def whole(weight: Tensor) -> Tensor:
    """A weight that fully_shard has spread over ranks, gathered; any other as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # DTensor's import takes half a second
