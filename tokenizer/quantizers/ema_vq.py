"""Vector quantization with a codebook that follows the latents by exponential moving averages.

EMA update: van den Oord et al. 2017, arXiv:1711.00937, appendix A.1; smoothing: Sonnet's VectorQuantizerEMA.
k-means is a special case: with `decay=0` and the whole data as one batch, a step is one step of Lloyd's algorithm.
Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors, M candidates.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .base import Quantizer, QuantizerOutput
from .gradients import GRADIENTS
from .search import nearest_codes

SMOOTHING = 1e-5  # Laplace pseudo-count of a code (Sonnet's epsilon)
KMEANS_ITERATIONS = 10
MAX_PLACEMENT_VECTORS = 65536  # for k-means, unless there are more codes
MAX_REVIVALS_PER_STEP = 256  # bounds what the ranks exchange


@dataclass
class PendingStatistics:
    """What the forward passes since the last step have seen on this rank; float32, never part of a checkpoint."""

    count: Tensor  # (K,) vectors assigned to each code
    sum: Tensor  # (K, D) their sums
    vectors: Tensor  # (N, D) those of the last forward pass, from which new codes are drawn


class EMAVectorQuantizer(Quantizer):
    """VQ-VAE's quantizer: each code is the running mean of the latents that chose it, and no gradient reaches it.

    The first step at or after `placement` places the codes by k-means on the latents of its batch; until then training
    passes the latents on as they are, so that the codes start among latents that already mean something. Later steps
    move a code that hardly any latent chooses onto a latent of the batch (revival). With `normalize`, latents and codes
    are compared, returned and stored on the unit sphere (ViT-VQGAN, Yu et al. 2021, arXiv:2110.04627, section 3.2).
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        decay: float = 0.99,  # of the moving averages, per optimizer step; it rises to this, see `step`
        commitment_weight: float = 0.25,  # beta in equation 3 of the paper
        normalize: bool = False,  # latents and codes on the unit sphere
        placement: float = 0.1,  # share of the run that is done when the codes are placed
        revival_threshold: float = 0.05,  # a code used less than this share of the mean is moved; 0 never moves one
        gradient: Literal["straight_through", "rotation"] = "straight_through",  # estimator, see gradients.py
    ):
        super().__init__()
        check_hyperparameters(codebook_dim, codebook_size, decay, commitment_weight, placement, revival_threshold)
        self.vocab_size = codebook_size
        self.decay = decay
        self.commitment_weight = commitment_weight
        self.normalize = normalize
        self.placement = placement
        self.revival_threshold = revival_threshold
        self.estimator = GRADIENTS[gradient]
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.register_buffer("ema_sum", torch.randn(codebook_size, codebook_dim))
        # Not a buffer: DistributedDataParallel would overwrite every rank's statistics with those of rank 0.
        self.pending: PendingStatistics | None = None

    @property
    def placed(self) -> bool:
        return bool(self.num_steps > 0)

    @property
    def codebook(self) -> Tensor:
        """(K, D) float32, derived from the averages at each use, so that the two can never disagree."""
        if self.normalize:
            return F.normalize(self.ema_sum.float(), dim=1)
        return self.ema_sum.float() / smoothed(self.ema_count.float())[:, None]

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.normalize:
                latents = F.normalize(latents, dim=1)
            vectors = rearrange(latents.detach(), "b d h w -> (b h w) d")
            codebook = self.codebook
            nearest = nearest_codes(vectors, codebook)  # (N,)
            if self.training:
                self.gather(vectors, nearest)
            indices = nearest.view(latents.shape[0], *latents.shape[2:])
            codes = codebook[indices].movedim(-1, 1)  # (B, D, h, w)
            if self.training:
                codes = torch.where(self.num_steps > 0, codes, latents.detach())  # no codes placed yet
            commitment = self.commitment_weight * F.mse_loss(latents, codes)
            quantized = self.estimator(latents, codes)
        return QuantizerOutput(quantized, indices, {"commitment": commitment})

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self.codebook[indices].movedim(-1, 1)

    def gather(self, vectors: Tensor, nearest: Tensor) -> None:
        """Add this batch to the pending statistics."""
        if torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: activation checkpointing runs the forward again, already counted
        if self.pending is None:
            self.pending = PendingStatistics(
                torch.zeros_like(self.ema_count, dtype=torch.float32),
                torch.zeros_like(self.ema_sum, dtype=torch.float32),
                vectors,
            )
        self.pending.count += torch.bincount(nearest, minlength=self.vocab_size)
        self.pending.sum.index_add_(0, nearest, vectors)
        self.pending.vectors = vectors

    def discard(self) -> None:
        self.pending = None

    @torch.no_grad()
    def step(self, progress: float = 1.0) -> bool:
        """Reduce the pending statistics over the ranks, in one call, and move the codebook by them."""
        pending, self.pending = self.pending, None
        num_steps = int(self.num_steps)
        if pending is None or (num_steps == 0 and progress < self.placement):
            return False
        generator = torch.Generator().manual_seed(num_steps)  # the same on every rank and after a resume
        if num_steps == 0:
            num_candidates = max(self.vocab_size, min(8 * self.vocab_size, MAX_PLACEMENT_VECTORS))
        else:
            num_candidates = min(self.vocab_size, MAX_REVIVALS_PER_STEP)
        candidates = draw_vectors(pending.vectors, num_candidates, generator)
        count, total, candidates = sum_over_ranks(pending.count, pending.sum, candidates)
        if num_steps == 0:
            codes, sizes = kmeans(candidates, self.vocab_size, self.normalize)
            self.ema_count.copy_(sizes * (count.sum() / len(candidates)))
            self.ema_sum.copy_(codes * smoothed(self.ema_count)[:, None])
        else:
            # The averages look back over about a tenth of the steps since placement: early latents move fast.
            decay = min(self.decay, 1 - 1 / (10 + num_steps / 10))
            self.ema_count.lerp_(count, 1 - decay)
            self.ema_sum.lerp_(total, 1 - decay)
            self.revive(candidates)
        self.num_steps += 1
        return num_steps == 0

    def revive(self, candidates: Tensor) -> None:
        """Move the codes that hardly any latent chooses onto candidates (M, D), with the weight of a mean code."""
        mean_count = self.ema_count.mean()
        dead = (self.ema_count < self.revival_threshold * mean_count).nonzero().flatten()[: len(candidates)]
        self.ema_count[dead] = mean_count
        self.ema_sum[dead] = candidates[: len(dead)] * smoothed(self.ema_count)[dead, None]


def smoothed(count: Tensor) -> Tensor:
    """Counts (K,) with Laplace smoothing, their total unchanged."""
    total = count.sum()
    return (count + SMOOTHING) / (total + len(count) * SMOOTHING) * total


def draw_vectors(vectors: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """This rank's part of `num_draws` vectors drawn with replacement from the (N, D) of every rank.

    Every rank draws the same positions in the concatenation over ranks and fills in the rows that it holds; the others
    are zero, so that the sum over ranks is what one rank with the whole batch would have drawn.
    """
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    positions = torch.randint(num_ranks * len(vectors), (num_draws,), generator=generator).to(vectors.device)
    positions = positions - rank * len(vectors)
    held = (positions >= 0) & (positions < len(vectors))
    return torch.where(held[:, None], vectors[positions.clamp(0, len(vectors) - 1)], 0.0)


def sum_over_ranks(*tensors: Tensor) -> list[Tensor]:
    """The sum of each tensor over all ranks, in one collective call; asks now whether there are ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def kmeans(vectors: Tensor, num_codes: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on (M, D), M >= num_codes, from the first vectors: centroids (K, D), cluster sizes (K,)."""
    centroids = vectors[:num_codes].clone()
    for _ in range(KMEANS_ITERATIONS):
        nearest = nearest_codes(vectors, centroids)
        sizes = torch.bincount(nearest, minlength=num_codes).float()
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        means = sums / sizes.clamp(min=1)[:, None]
        centroids = torch.where(sizes[:, None] > 0, means, centroids)
        if normalize:
            centroids = F.normalize(centroids, dim=1)
    return centroids, sizes


def check_hyperparameters(
    codebook_dim: int,
    codebook_size: int,
    decay: float,
    commitment_weight: float,
    placement: float,
    revival_threshold: float,
) -> None:
    """Raise a ValueError that names the value and the rule."""
    if codebook_dim < 1:
        raise ValueError(f"codebook_dim={codebook_dim} must be at least 1")
    if codebook_size < 2:
        raise ValueError(f"codebook_size={codebook_size} must be at least 2: one code carries no information")
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1): at 1 the codebook would never move")
    if commitment_weight < 0:
        raise ValueError(f"commitment_weight={commitment_weight} must not be negative")
    if not 0 <= placement <= 1:
        raise ValueError(f"placement={placement} must lie in [0, 1]: it is a share of the run")
    if not 0 <= revival_threshold < 1:
        raise ValueError(f"revival_threshold={revival_threshold} must lie in [0, 1): it is a share of the mean count")
