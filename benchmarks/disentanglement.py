"""The mutual information gap: whether each factor of the data lies in a latent dimension of its own.

Chen et al. 2018, arXiv:1802.04942, section 4. Shapes: N latents of D dimensions, K factors.
"""

import math

import torch
from torch import Tensor

NUM_BINS = 20  # of equal width, in which a dimension is discretised (Locatello et al. 2019, arXiv:1811.12359)


def mutual_information_gap(latents: Tensor, factors: Tensor) -> dict[str, object]:
    """MIG (equation 6) of latents (N, D >= 2) drawn from q(z|x) and the factors (N, K) int64 of their images.

    In [0, 1]: of each factor the information of the dimension that knows most of it less that of the next, over its
    entropy; `mig` is the mean. `information` (D, K) is in nats.
    """
    binned = torch.stack([discretised(each) for each in latents.T])  # (D, N)
    information = torch.tensor([[mutual_information(z, v) for v in factors.T] for z in binned], dtype=torch.float64)
    entropies = torch.tensor([entropy(torch.bincount(v)) for v in factors.T], dtype=torch.float64)
    first, second = information.topk(2, dim=0).values
    gaps = (first - second) / entropies
    return {"mig": gaps.mean().item(), "gaps": gaps.tolist(), "information": information.tolist()}


def discretised(values: Tensor) -> Tensor:
    """The bin (N,) int64 of each of the values (N,), all in the first where they are all the same."""
    low, high = values.aminmax()
    if low == high:
        return torch.zeros_like(values, dtype=torch.int64)
    return ((values - low) / (high - low) * NUM_BINS).long().clamp(max=NUM_BINS - 1)


def mutual_information(left: Tensor, right: Tensor) -> float:
    """In nats, of two columns (N,) of whole numbers from 0 on, by their frequencies."""
    num_right = int(right.max()) + 1
    joint = torch.bincount(left * num_right + right)
    return entropy(torch.bincount(left)) + entropy(torch.bincount(right)) - entropy(joint)


def entropy(counts: Tensor) -> float:
    """In nats, of the distribution that the counts make."""
    counts = counts[counts > 0].double()
    return math.log(counts.sum()) - (counts * counts.log()).sum().item() / counts.sum().item()
