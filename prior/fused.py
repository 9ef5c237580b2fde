"""A step of `Decoder` by one kernel in C, on x86 processors where it was built.

The same up to rounding, and a row is the same to the bit whatever the others and the threads. In bfloat16 the stream
between the blocks and the cache are float32, and so are the weights where nothing multiplies that type fast.
Shapes as in decoding.py; L blocks, V vocabulary.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.kernels import LIBRARY, filled, run
from tokenizer.kernels.memory import WORKSPACE, empty
from tokenizer.processor import numbers_alone

from .decoding import Decoder, turning, weight_after
from .transformer import NORM_EPS, RMSNorm, Transformer, rotary_angles

PANEL = 64  # columns of a matrix that lie together: as in decoding.c, like the next two
GROUP = 16  # floats of the widest vector, and positions of a cache that lie together
WIDEST_HEAD = 256


def decoder_of(transformer: Transformer, head: nn.Linear, coordinates: Tensor) -> "Decoder | FusedDecoder":
    """The faster one of those that can."""
    kind = FusedDecoder if is_for_kernel(transformer, head) else Decoder
    return kind(transformer, head, coordinates)


def is_for_kernel(transformer: Transformer, head: nn.Linear) -> bool:
    """Whether the kernel can decode by these."""
    weights = [*transformer.parameters(), *head.parameters()]
    return (
        LIBRARY is not None
        and {weight.dtype for weight in weights} in ({torch.float32}, {torch.bfloat16})
        and head.in_features % GROUP == 0
        and transformer.head_width <= WIDEST_HEAD
        and numbers_alone(*weights)
    )


class Shape(ctypes.Structure):
    """`shape` in decoding.c."""

    NAMES = ("batch", "layers", "heads", "head_width", "inner", "vocab", "capacity", "halves")
    _fields_ = tuple((name, ctypes.c_ssize_t) for name in NAMES)


class FusedDecoder:
    """What `Decoder` is, for models that `is_for_kernel` accepts."""

    def __init__(self, transformer: Transformer, head: nn.Linear, coordinates: Tensor):
        halves = head.weight.dtype == torch.bfloat16 and bool(run("decoding_multiplies_halves"))
        self.matrices = packed(list(layers_of(transformer, head)), torch.bfloat16 if halves else torch.float32)
        angles = rotary_angles(coordinates, transformer.head_width)
        turns = [torch.stack(turning(block.attention, angles), dim=2) for block in transformer.blocks]  # (T, 2, 2, d)
        self.turns = F.pad(torch.stack(turns, dim=1).flatten(), (0, GROUP))  # it is read in whole vectors
        first = transformer.blocks[0]
        self.shape = Shape(
            layers=len(transformer.blocks),
            heads=first.attention.num_heads,
            head_width=transformer.head_width,
            inner=first.feed_forward.project.in_features,
            vocab=head.out_features,
            capacity=len(coordinates),
            halves=halves,
        )

    def caches(self, batch: int) -> "FusedCaches":
        """Empty ones for a batch."""
        shape = self.shape
        return FusedCaches(shape.layers, shape.capacity, batch * shape.heads, shape.head_width)

    def logits(self, hidden: Tensor, position: int, caches: "FusedCaches") -> Tensor:
        """The input (B, W) at a position, with caches of all before it, which it joins, to (B, V) float32."""
        shape, threads = self.shape, torch.get_num_threads()
        if position >= shape.capacity:
            raise ValueError(f"{position + 1} positions are more than the cache was made for, {shape.capacity}")
        shape.batch = len(hidden)
        stream = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        logits = empty(len(hidden), filled(shape.vocab, PANEL))
        room = WORKSPACE.of(run("decoding_room", shape, threads))
        tensors = (self.matrices, self.turns, caches.keys, caches.values, stream, logits)
        run("decoding_step", shape, *tensors, position, NORM_EPS, room, threads)
        return logits[:, : shape.vocab]


class FusedCaches:
    """Keys and values of all blocks, (L, groups, B * H, GROUP, d) with d filled up to a multiple of GROUP."""

    def __init__(self, num_blocks: int, capacity: int, rows: int, head_width: int):
        shape = num_blocks, filled(capacity, GROUP) // GROUP, rows, GROUP, filled(head_width, GROUP)
        self.keys, self.values = empty(*shape), empty(*shape)

    def __getitem__(self, block: int) -> "FusedCache":
        return FusedCache(self.keys[block], self.values[block])


class FusedCache:
    """Keys and values of one block, to be begun with a prefix."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Hold the first n positions, keys and values (B, H, n, d)."""
        for held, given in ((self.keys, keys), (self.values, values)):
            given = F.pad(given.flatten(0, 1), (0, held.shape[3] - given.shape[3]))
            for group, positions in zip(held, given.split(GROUP, dim=1), strict=False):
                group[:, : positions.shape[1]] = positions


def layers_of(transformer: Transformer, head: nn.Linear) -> Iterator[tuple[RMSNorm | None, nn.Linear]]:
    """The linear layers in the order in which a step takes them, with the norm that only they follow."""
    for block in transformer.blocks:
        yield block.attention_norm, block.attention.expand
        yield None, block.attention.project
        yield block.feed_forward_norm, block.feed_forward.expand
        yield None, block.feed_forward.project
    yield transformer.norm, head


def packed(layers: list[tuple[RMSNorm | None, nn.Linear]], dtype: torch.dtype) -> Tensor:
    """Matrices of the layers as decoding.c describes them, one after another, flat, as words of 32 bits."""
    word = 4 // dtype.itemsize  # numbers of one
    lengths = [filled(layer.out_features, PANEL) * layer.in_features // word for _, layer in layers]
    matrices = empty(sum(lengths))
    for (norm, layer), matrix in zip(layers, matrices.split(lengths), strict=True):
        weight = layer.weight if norm is None else weight_after(norm, layer)
        weight = weight.to(dtype).contiguous()
        run("decoding_pack", weight, layer.out_features, layer.in_features // word, matrix)
    return matrices
