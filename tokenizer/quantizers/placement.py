"""Where codes lie: k-means on the latents to begin with, and revival of those that hardly any latent chooses.

Shapes: D codebook_dim, K codebook_size, N vectors of a batch, M candidates.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ranks import own_rank_and_number, sum_over_ranks
from .checks import check_codebook, check_not_negative
from .nearest import NearestCodeQuantizer
from .search import nearest_codes

KMEANS_ITERATIONS = 10
MAX_PLACEMENT_VECTORS = 65536  # for k-means, unless there are more codes
MAX_REVIVALS_PER_STEP = 256  # bounds what the ranks exchange


@dataclass
class PendingStatistics:
    """What the forward passes since the last step have seen on this rank; float32, never part of a checkpoint."""

    sums: list[Tensor]  # over the passes, of what `statistics` returns
    vectors: Tensor  # (N, D) those of the last forward pass, from which new codes are drawn


class PlacedQuantizer(NearestCodeQuantizer):
    """A nearest-code quantizer that sees to it that its codes lie among the latents.

    The first step at or after `placement` places the codes by k-means on the latents of its batch; until then training
    passes the latents on as they are, so that the codes start among latents that already mean something. Later steps
    move a code that hardly any latent chooses onto a latent of the batch (revival).
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int,
        decay: float,
        placement: float,
        revival_threshold: float,
        commitment_weight: float,
        **comparison: str | bool | float,
    ):
        super().__init__(commitment_weight, **comparison)
        check_codebook(codebook_dim, codebook_size)
        check_not_negative(commitment_weight=commitment_weight)
        check_placement(decay, placement, revival_threshold)
        self.vocab_size = codebook_size
        self.decay = decay
        self.placement = placement
        self.revival_threshold = revival_threshold
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.was_placed = False
        self.register_load_state_dict_post_hook(ask_again)
        # Not a buffer: DistributedDataParallel would overwrite every rank's statistics with those of rank 0.
        self.pending: PendingStatistics | None = None

    @property
    def placed(self) -> bool:
        # Once it is, a GPU is not asked again: it would have to finish all that it was given before.
        self.was_placed = self.was_placed or bool(self.num_steps > 0)
        return self.was_placed

    @abstractmethod
    def put(self, codes: Tensor, which: Tensor | slice) -> None:
        """Let the codes (M, D) stand in the rows `which` of the codebook; `ema_count` is already that of the codes."""

    def statistics(self, vectors: Tensor, nearest: Tensor) -> list[Tensor]:
        """What `step` needs summed over batches and ranks, float32; first how many vectors chose each code (K,)."""
        return [vectors.new_zeros(self.vocab_size).index_add_(0, nearest, vectors.new_ones(len(nearest)))]

    def move(self, sums: list[Tensor], share: float) -> None:
        """Let a `share` of this step's `statistics` into the averages."""
        self.ema_count.lerp_(sums[0], share)

    def once_placed(self, codes: Tensor, latents: Tensor) -> Tensor:
        return torch.where(self.num_steps > 0, codes, latents) if self.training else codes

    def gather(self, vectors: Tensor, nearest: Tensor) -> None:
        """Add a training batch to the pending statistics."""
        if not self.training or torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: activation checkpointing runs the forward again, already counted
        sums = self.statistics(vectors, nearest)
        if self.pending is not None:
            sums = [old + new for old, new in zip(self.pending.sums, sums, strict=True)]
        self.pending = PendingStatistics(sums, vectors)

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
        *sums, candidates = sum_over_ranks(*pending.sums, candidates)
        if num_steps == 0:
            codes, sizes = kmeans(candidates, self.vocab_size, self.normalize)
            self.ema_count.copy_(sizes * (sums[0].sum() / len(candidates)))
            self.put(codes, slice(None))
        else:
            # The averages look back over about a tenth of the steps since placement: early latents move fast.
            self.move(sums, 1 - min(self.decay, 1 - 1 / (10 + num_steps / 10)))
            self.revive(candidates)
        self.num_steps += 1
        return num_steps == 0

    def revive(self, candidates: Tensor) -> None:
        """Move the codes that hardly any latent chooses onto candidates (M, D), with the weight of a mean code."""
        mean_count = self.ema_count.mean()
        dead = (self.ema_count < self.revival_threshold * mean_count).nonzero().flatten()[: len(candidates)]
        self.ema_count[dead] = mean_count
        self.put(candidates[: len(dead)], dead)


def ask_again(quantizer: PlacedQuantizer, _: object) -> None:
    """What is known of a quantizer is not known of the state that it was given."""
    quantizer.was_placed = False


def draw_vectors(vectors: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """This rank's part of `num_draws` vectors drawn with replacement from the (N, D) of every rank.

    Every rank draws the same positions in the concatenation over ranks and fills in the rows that it holds; the others
    are zero, so that the sum over ranks is what one rank with the whole batch would have drawn.
    """
    rank, num_ranks = own_rank_and_number()
    positions = torch.randint(num_ranks * len(vectors), (num_draws,), generator=generator).to(vectors.device)
    positions = positions - rank * len(vectors)
    held = (positions >= 0) & (positions < len(vectors))
    return torch.where(held[:, None], vectors[positions.clamp(0, len(vectors) - 1)], 0.0)


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


def check_placement(decay: float, placement: float, revival_threshold: float) -> None:
    """Raise a ValueError that names the value and the rule."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1): at 1 the codebook would never move")
    if not 0 <= placement <= 1:
        raise ValueError(f"placement={placement} must lie in [0, 1]: it is a share of the run")
    if not 0 <= revival_threshold < 1:
        raise ValueError(f"revival_threshold={revival_threshold} must lie in [0, 1): it is a share of the mean count")
