"""What quantizers and posteriors ask of the other ranks; each call finds out anew whether there are any."""

import torch
import torch.distributed as dist
from torch import Tensor


def own_rank_and_number() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """The sum of each tensor over all ranks, in one collective call."""
    if own_rank_and_number()[1] == 1:
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over all ranks, with the gradient of this rank's tensor alone.

    Data parallelism averages the ranks' gradients, which makes of them the gradient of the mean.
    """
    (total,) = sum_over_ranks(tensor.detach())
    return total / own_rank_and_number()[1] + (tensor - tensor.detach())
