"""Exact nearest-code search in float32 and bounded memory.

Shapes: N vectors, K codes, D dimensions.
"""

import torch
from torch import Tensor

# Distances held at once: 2^20 (4 MB) stay in a CPU's cache, a GPU wants more work per kernel.
DISTANCES_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}


def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code by squared Euclidean distance, the lowest index on a tie.

    `vectors` (N, D) and `codes` (K, D), both float32; returns (N,) int64. ||v||^2 is left out: it moves no minimum.
    """
    half_norms = codes.square().sum(1) / 2  # (K,)
    transposed, chunk_rows = codes.t(), rows_per_chunk(codes)
    return torch.cat(
        [torch.addmm(half_norms, rows, transposed, alpha=-1).argmin(1) for rows in vectors.split(chunk_rows)]
    )


def rows_per_chunk(codes: Tensor) -> int:
    """How many vectors may be compared with all codes (K, D) at once."""
    return max(1, DISTANCES_PER_CHUNK.get(codes.device.type, 2**26) // len(codes))
