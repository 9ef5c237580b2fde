"""The network of the priors: a Llama-like transformer over places in a plane.

Blocks that normalise before each branch, without biases (Touvron et al. 2023, arXiv:2302.13971), as LlamaGen has them
(Sun et al. 2024, arXiv:2406.06525), with query-key normalisation (Dehghani et al. 2023, arXiv:2302.05442, section 2).
Shapes: B batch, T positions, W width, n positions of a call, d = W / num_heads.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer.products import linear

ROTARY_BASE = 100.0  # text has 10,000; the sides of a grid are short (Heo et al. 2024, arXiv:2403.13298, section 3.2)
NORM_EPS = 1e-6  # added to mean squares
CACHE_GROWTH = 32  # positions
PLAIN_LENGTH = 256  # positions up to which plain products were seen to be faster
INITIAL_STD = 0.02  # of all weights but those of the projections (GPT-2)


class KVCache:
    """Keys and values of one attention layer for every position so far, at most `capacity`.

    What is read grows by CACHE_GROWTH positions at a time, though masked: rows that lie without gaps are read two to
    four times as fast as parts of longer ones, which pays for the copies. The memory is that of all positions from the
    start, since new memory takes longer than the copies. On a CPU it is float32: the products of a single query in
    bfloat16 take twice to nine times as long there.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # positions held

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add n positions, keys and values (B, heads, n, d); ValueError where they are more than the capacity."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.capacity:
            raise ValueError(f"{self.length} positions are more than the cache was made for, {self.capacity}")
        if start == 0:
            on_cpu = values.device.type == "cpu"
            dtype = torch.promote_types(values.dtype, torch.float32) if on_cpu else values.dtype
            rows, width = keys.shape[0] * keys.shape[1], keys.shape[3]
            self.memories = [keys.new_empty(rows * self.capacity * width, dtype=dtype) for _ in range(2)]
            self.keys = self.values = self.memories[0].view(rows, self.capacity, width)[:, :0]
        if self.length > self.keys.shape[1]:
            reserved = min(-(-self.length // CACHE_GROWTH) * CACHE_GROWTH, self.capacity)
            self.keys, self.values = (
                respread(held, reserved, memory)
                for held, memory in zip((self.keys, self.values), self.memories, strict=True)
            )
        self.keys[:, start : self.length] = keys.flatten(0, 1)
        self.values[:, start : self.length] = values.flatten(0, 1)

    def attend(self, queries: Tensor) -> Tensor:
        """Queries (B * heads, 1, d) of the newest position, already scaled, to weighted sums of values, same shape.

        Plain products: for a single query they are up to four times as fast on a CPU as the fused attention.
        """
        scores = torch.bmm(queries.type_as(self.keys), self.keys.mT)
        scores[:, :, self.length :] = -torch.inf
        return torch.bmm(scores.softmax(dim=2), self.values)


def respread(held: Tensor, reserved: int, memory: Tensor) -> Tensor:
    """What a cache holds, (rows, n, d), at the start of its memory with room for more positions, which are 0."""
    rows, length, width = held.shape
    spread = memory[: rows * reserved * width].view(rows, reserved, width)
    spread[:, :length] = held.clone()  # it lies in the same memory
    spread[:, length:] = 0
    return spread


def rotary_angles(coordinates: Tensor, head_width: int) -> Tensor:
    """Angles (n, d / 2) of the pairs of a head at coordinates (n, 2): a quarter of d turns by rows, one by columns.

    Rotary positions (Su et al. 2021, arXiv:2104.09864, equation 15), one axis per half of the head. They are computed
    at each use: a stored table would stay without values in a model that was built on the meta device.
    """
    num_frequencies = head_width // 4
    frequencies = ROTARY_BASE ** -(torch.arange(num_frequencies, device=coordinates.device) / num_frequencies)
    return (coordinates.float()[:, :, None] * frequencies).flatten(1)  # no einsum: autocast would round it to bf16


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Vectors (..., n, d) with component i and i + d / 2 turned as a pair, by angles (n, d / 2), in float32."""
    first, second = vectors.float().chunk(2, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1).type_as(vectors)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467, equation 4, in float32 whatever the type of the input."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), eps=NORM_EPS).type_as(hidden)


class Linear(nn.Linear):
    """Without a bias; in float32 on a CPU by the faster library."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight)


class Attention(nn.Module):
    """Causal self-attention with query-key normalisation and rotary positions."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.expand = Linear(width, 3 * width)
        self.query_norm = RMSNorm(width // num_heads)
        self.key_norm = RMSNorm(width // num_heads)
        self.project = Linear(width, width)

    def forward(self, hidden: Tensor, angles: Tensor, cache: KVCache | None) -> Tensor:
        parts = rearrange(self.expand(hidden), "b n (p heads d) -> p b heads n d", p=3, heads=self.num_heads)
        queries, keys, values = parts.unbind()
        queries, keys = rotate(self.query_norm(queries), angles), rotate(self.key_norm(keys), angles)
        if cache is not None:
            cache.append(keys, values)
        attended = attend(queries, keys, values)
        return self.project(rearrange(attended, "b heads n d -> b n (heads d)"))


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention, each (B, heads, n, d).

    A CPU's fused attention has no products in bfloat16: short sequences by plain ones take half to a seventh the time
    of its forward and backward pass.
    """
    length = queries.shape[2]
    if queries.device.type != "cpu" or queries.dtype != torch.bfloat16 or length > PLAIN_LENGTH:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    future = queries.new_full((length, length), -torch.inf).triu(1)
    rows = queries.flatten(0, 1), keys.flatten(0, 1).mT
    scores = torch.baddbmm(future, *rows, alpha=queries.shape[3] ** -0.5)
    return torch.bmm(scores.softmax(dim=2), values.flatten(0, 1)).view_as(queries)


def inner_width(width: int) -> int:
    """Of the feed-forward layers: 8/3 of the width (Llama), in multiples of 256 (LlamaGen)."""
    return -(-8 * width // (3 * 256)) * 256


class SwiGLU(nn.Module):
    """Shazeer 2020, arXiv:2002.05202, equation 6, `inner_width` wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = Linear(width, 2 * inner_width(width))
        self.project = Linear(inner_width(width), width)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, value = self.expand(hidden).chunk(2, dim=-1)
        return self.project(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, angles: Tensor, cache: KVCache | None) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), angles, cache))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


class Transformer(nn.Module):
    """Blocks and a last normalisation; what goes in and what is read off are its owner's.

    A training program may set `activation_checkpointing`: each block is then computed again in the backward pass,
    which takes a third more time and leaves only its input in memory (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(self, width: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        self.head_width = width // num_heads
        self.blocks = nn.ModuleList([Block(width, num_heads, dropout) for _ in range(num_layers)])
        self.norm = RMSNorm(width)
        self.activation_checkpointing = False
        self.apply(initialize)
        for block in self.blocks:  # each adds to the stream; so scaled, its variance does not grow with depth (GPT-2)
            for branch in (block.attention, block.feed_forward):
                nn.init.normal_(branch.project.weight, std=INITIAL_STD / (2 * num_layers) ** 0.5)

    def forward(self, hidden: Tensor, coordinates: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Inputs (B, n, W) at coordinates (n, 2), row and column, to (B, n, W); each sees itself and those before it.

        Empty caches, one per block, then hold these inputs for `Decoder` to go on from.
        """
        angles = rotary_angles(coordinates, self.head_width)
        for index, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                hidden = checkpoint(block, hidden, angles, None, use_reentrant=False)
            else:
                hidden = block(hidden, angles, caches[index] if caches else None)
        return self.norm(hidden)


def initialize(module: nn.Module) -> None:
    """Draw the weights of a linear layer or an embedding; for `nn.Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INITIAL_STD)
