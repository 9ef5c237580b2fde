"""A step of `Decoder` by one kernel in C: float32 and bfloat16 on an x86 processor, where the kernels were built.

The same up to rounding, and a row is the same to the bit whatever the others and the threads. In bfloat16 the stream
between the blocks and the cache are float32, and so are the weights where the processor has no dot products of that type.
Shapes: as in decoding.py; L blocks, V words.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.kernels import LIBRARY, WORKSPACE, address
from tokenizer.processor import multiplies_bfloat16, numbers_alone

from .decoding import Decoder, turning, weight_after
from .transformer import NORM_EPS, RMSNorm, Transformer, rotary_angles

PANEL = 64  # columns of a matrix that lie together,
GROUP = 16  # and positions of which the keys do: the widest vector
WIDEST_HEAD = 256


class Shape(ctypes.Structure):
    """`shape` in decoding.c."""

    NAMES = ("batch", "layers", "heads", "head_width", "inner", "vocab", "capacity", "halves")
    _fields_ = tuple((name, ctypes.c_ssize_t) for name in NAMES)


class FusedCaches:
    """Keys and values of all blocks, as the kernel reads them; of one block as what a pass over a prefix fills."""

    def __init__(self, num_blocks: int, rows: int, capacity: int, head_width: int):
        shape = num_blocks, -(-capacity // GROUP), rows, GROUP, filled(head_width, GROUP)
        self.keys, self.values = torch.empty(shape), torch.empty(shape)

    def __getitem__(self, block: int) -> "FusedCache":
        return FusedCache(self.keys[block], self.values[block])


class FusedCache:
    """Those of one block: keys (B * H, groups, d, GROUP) and values (B * H, T, d or more)."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """The first n positions, keys and values (B, H, n, d)."""
        length, width = keys.shape[2:]
        for held, new in ((self.keys, keys), (self.values, values)):
            for group, part in zip(held, new.flatten(0, 1).split(GROUP, dim=1)):
                group[:, :part.shape[1]] = F.pad(part, (0, held.shape[3] - width))


class FusedDecoder:
    """A `Decoder` for models that `is_for_kernel` accepts."""

    def __init__(self, transformer: Transformer, head: nn.Linear, coordinates: Tensor):
        self.dtype = head.weight.dtype if multiplies_bfloat16() else torch.float32
        layers = list(layers_of(transformer, head))
        word = 4 // self.dtype.itemsize  # numbers of it
        sizes = [filled(layer.out_features, PANEL) * layer.in_features // word for _, layer in layers]
        self.matrices = torch.empty(sum(sizes))
        for (norm, layer), matrix in zip(layers, self.matrices.split(sizes), strict=True):
            weight = (layer.weight if norm is None else weight_after(norm, layer)).to(self.dtype)
            LIBRARY.decoding_pack(address(weight), *numbers(layer.out_features, layer.in_features // word), address(matrix))
        angles = rotary_angles(coordinates, transformer.head_width)
        turns = [torch.stack(turning(block.attention, angles), dim=2) for block in transformer.blocks]
        self.turns = F.pad(torch.stack(turns, dim=1).flatten(), (0, GROUP))  # read in whole vectors
        self.vocab_size, self.capacity = len(head.weight), len(coordinates)
        self.shape = Shape(
            layers=len(transformer.blocks),
            heads=transformer.blocks[0].attention.num_heads,
            head_width=transformer.head_width,
            inner=transformer.blocks[0].feed_forward.project.in_features,
            vocab=self.vocab_size,
            capacity=self.capacity,
            halves=self.dtype == torch.bfloat16,
        )

    def caches(self, batch: int) -> FusedCaches:
        """Empty ones for a batch."""
        shape = self.shape
        return FusedCaches(shape.layers, batch * shape.heads, shape.capacity, shape.head_width)

    def logits(self, hidden: Tensor, position: int, caches: FusedCaches) -> Tensor:
        """As of a `Decoder`."""
        if position >= self.capacity:
            raise ValueError(f"{position + 1} positions are more than the cache was made for, {self.capacity}")
        stream = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        logits = torch.empty(len(hidden), filled(self.vocab_size, PANEL))
        threads = torch.get_num_threads()
        shape = self.shape
        shape.batch = len(hidden)
        room = WORKSPACE.of(LIBRARY.decoding_room(ctypes.byref(shape), ctypes.c_ssize_t(threads)))
        addresses = (address(each) for each in (self.matrices, self.turns, caches.keys, caches.values, stream, logits))
        LIBRARY.decoding_step(
            ctypes.byref(shape),
            *addresses,
            ctypes.c_ssize_t(position),
            ctypes.c_float(NORM_EPS),
            address(room),
            ctypes.c_ssize_t(threads),
        )
        return logits[:, : self.vocab_size]


def layers_of(transformer: Transformer, head: nn.Linear) -> Iterator[tuple[RMSNorm | None, nn.Linear]]:
    """The linear layers in the order in which a step takes them, each with the norm before it."""
    for block in transformer.blocks:
        yield block.attention_norm, block.attention.expand
        yield None, block.attention.project
        yield block.feed_forward_norm, block.feed_forward.expand
        yield None, block.feed_forward.project
    yield transformer.norm, head


def numbers(*values: int) -> Iterator[ctypes.c_ssize_t]:
    return map(ctypes.c_ssize_t, values)


def filled(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def decoder_of(transformer: Transformer, head: nn.Linear, coordinates: Tensor) -> Decoder | FusedDecoder:
    """The faster one of those that can."""
    kind = FusedDecoder if is_for_kernel(transformer, head) else Decoder
    return kind(transformer, head, coordinates)


def is_for_kernel(transformer: Transformer, head: nn.Linear) -> bool:
    weights = [*transformer.parameters(), *head.parameters()]
    return (
        LIBRARY is not None
        and {weight.dtype for weight in weights} in ({torch.float32}, {torch.bfloat16})
        and head.in_features % GROUP == 0
        and transformer.head_width <= WIDEST_HEAD
        and numbers_alone(*weights)
    )
