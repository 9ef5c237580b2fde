"""What keeps rounding from tokens and latents: a batch one by one, in one type and one memory layout.

Convolutions sum in another order for another size of the batch and for another layout; on a CPU one token in about
5000 would depend on the pictures beside it. Shapes: B batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def by_parts(convert: Callable[..., Tensor], batches: Sequence[Tensor], training: bool) -> Tensor:
    """`convert` of batches (B, ...) beside each other; on a CPU, unless it trains, of one at a time."""
    if training or batches[0].device.type != "cpu":
        return convert(*batches)
    return torch.cat([convert(*part) for part in zip(*(batch.split(1) for batch in batches), strict=True)])


def laid_out(features: Tensor, network: nn.Module) -> Tensor:
    """Features (B, D, h, w) in the type of the network's weights and one memory layout, channels last: the faster."""
    return features.to(next(network.parameters()).dtype).clone(memory_format=torch.channels_last)
