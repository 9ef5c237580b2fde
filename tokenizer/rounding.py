"""A batch in parts, in one type and one memory layout.

One picture at a time keeps rounding from the tokens: convolutions sum in another order for another size of the batch
and for another layout, and on a CPU one token in about 5000 would depend on the pictures beside it. Decoders, which
nothing rests upon, take the parts that are fastest. Shapes: B batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def by_parts(convert: Callable[..., Tensor], batches: Sequence[Tensor], training: bool, at_once: int = 1) -> Tensor:
    """`convert` of batches (B, ...) beside each other; on a CPU, unless it trains, of so many `at_once`."""
    if training or batches[0].device.type != "cpu":
        return convert(*batches)
    parts = [convert(*part) for part in zip(*(batch.split(at_once) for batch in batches), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def laid_out(features: Tensor, network: nn.Module) -> Tensor:
    """Features (B, D, h, w) in the type of the network's weights and one memory layout, channels last: the faster."""
    return features.to(next(network.parameters()).dtype).clone(memory_format=torch.channels_last)
