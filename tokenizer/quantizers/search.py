"""Exact nearest-code search in float32 and bounded memory.

The nearest code by squared Euclidean distance is the one of the greatest score v.c - |c|^2 / 2: |v|^2 moves no maximum.
Shapes: N vectors, K codes, D dimensions, n vectors and k rows of a part.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..products import product

# On a CPU a tile of scores is 2 MB, which stay in the cache from the product to the maximum.
SCORES_PER_TILE = 2**19
CODES_PER_TILE = 2048
CODES_PER_WINDOW = 512  # whose maximum is one piece of work: threads share windows out
SMALLEST_PRODUCT = 16  # vectors; a product of fewer rounds in another way, and tokens would depend on their number

# Numbers held at once where all codes are compared: on a GPU, which wants much work per kernel, and in training.
DISTANCES_PER_CHUNK = {"cpu": 2**20, "cuda": 2**26}


def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code by squared Euclidean distance, the lowest index on a tie.

    `vectors` (N, D) and `codes` (K, D), both float32 and without a gradient; returns (N,) int64.
    """
    if vectors.device.type != "cpu":
        half_norms, chunks = codes.square().sum(1) / 2, vectors.split(rows_per_chunk(codes))
        return torch.cat([torch.addmm(half_norms, each, codes.t(), alpha=-1).argmin(1) for each in chunks])
    half_norms = [part.square().sum(1, keepdim=True) / 2 for part in codes.split(CODES_PER_TILE)]  # (k, 1) of each part
    num_vectors = SCORES_PER_TILE // min(CODES_PER_TILE, len(codes))  # never by N, on which no rounding may depend
    return torch.cat([nearest_by_tiles(each, codes, half_norms) for each in vectors.split(num_vectors)])


def nearest_by_tiles(vectors: Tensor, codes: Tensor, half_norms: list[Tensor]) -> Tensor:
    """The same of a few vectors (n, D), the scores of one part of the codes after the other."""
    num_vectors = len(vectors)
    padding = max(0, SMALLEST_PRODUCT - num_vectors)
    # A component more takes the norms into the product: (v, -1) . (c, |c|^2 / 2).
    columns = F.pad(F.pad(vectors, (0, 1), value=-1.0), (0, 0, 0, padding)).t()
    maxima, indices = [], []
    for number, parts in enumerate(zip(codes.split(CODES_PER_TILE), half_norms, strict=True)):
        lengthened = torch.cat(parts, dim=1)  # (k, D + 1)
        values, rows = first_maxima(product(lengthened, columns), CODES_PER_WINDOW)
        maxima.append(values)
        indices.append(rows + number * CODES_PER_TILE)
    maxima, indices = torch.cat(maxima), torch.cat(indices)  # (windows, n)
    _, winner = first_maxima(maxima, len(maxima))
    return indices.gather(0, winner)[0, :num_vectors]


def first_maxima(scores: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Of each `window` rows of scores (k, n), and of what remains, the maxima and the first rows that hold them.

    Both are (windows, n). It is max pooling of a picture k high and one wide whose n channels lie side by side in
    memory: PyTorch's one maximum with its place that uses a CPU's vector instructions; argmax takes several times
    as long as the product.
    """
    picture = scores.view(1, len(scores), 1, -1).permute(0, 3, 1, 2)  # (1, n, k, 1)
    pooled = F.max_pool2d(picture, (min(window, len(scores)), 1), ceil_mode=True, return_indices=True)
    values, rows = (each.permute(0, 2, 3, 1).flatten(0, 2) for each in pooled)
    return values, rows


def rows_per_chunk(codes: Tensor) -> int:
    """How many vectors may be compared with all codes (K, D) at once."""
    return max(1, DISTANCES_PER_CHUNK.get(codes.device.type, 2**26) // len(codes))
