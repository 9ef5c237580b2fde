"""Nearest training images, by which memorising would show.

A prior that repeats its training images draws pictures nearer to them than unseen images are.
Shapes: Q queries, R references, k neighbours, C channels, S side in pixels.
"""

import torch
from torch import Tensor

CHUNK = 5000  # references compared at once


def nearest(queries: Tensor, references: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest references of each query by L2 distance on the [0, 1] scale, both uint8 (., C, S, S).

    Returns distances (Q, k), rising, float32, and indices (Q, k) int64 into the references.
    """
    points = as_points(queries)
    best, found = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(references), CHUNK):
        distances = torch.cdist(points, as_points(references[start : start + CHUNK]))  # (Q, chunk)
        indices = torch.arange(start, start + distances.shape[1]).expand(len(queries), -1)
        distances, indices = torch.cat([best, distances], dim=1), torch.cat([found, indices], dim=1)
        best, order = distances.topk(min(count, distances.shape[1]), largest=False)
        found = indices.gather(1, order)
    # Again without the cancellation in cdist's matrix product: a copy has distance 0.
    exact = (points[:, None] - as_points(references[found.flatten()]).view(*found.shape, -1)).norm(dim=2)
    distances, order = exact.sort(dim=1)
    return distances, found.gather(1, order)


def as_points(pixels: Tensor) -> Tensor:
    """uint8 (N, C, S, S) to float32 (N, C * S * S) in [0, 1]."""
    return pixels.flatten(1).float() / 255


def distances_of(queries: Tensor, references: Tensor) -> dict[str, float]:
    """Median, and the percentile that a few copies would move, of the distances to the nearest reference."""
    distances, _ = nearest(queries, references, 1)
    return {"median": distances.median().item(), "percentile_1": distances.quantile(0.01).item()}
