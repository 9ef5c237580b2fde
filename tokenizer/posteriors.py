"""Posteriors: what an encoder says of an image's latents as a distribution q(z|x), and what that costs against N(0, I).

Variational autoencoder: Kingma and Welling 2013, arXiv:1312.6114.
Shapes: B batch, D latent_dim, h w grid sides. All figures are in nats per image of the size that came in.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .quantizers.ranks import sum_over_ranks

LOG_VARIANCES = -30.0, 20.0  # beyond, the clamp keeps variances finite in float32
MULTIPLIER_RATE = 0.1  # most that the logarithm of a learned multiplier moves in a step
LOG_MULTIPLIERS = -14.0, 14.0


@dataclass
class PosteriorOutput:
    latents: Tensor  # (B, D, h, w) float32: drawn from q(z|x) in training, its mean in eval mode
    mean: Tensor  # (B, D, h, w) float32
    log_variance: Tensor  # (B, D, h, w) float32
    losses: dict[str, Tensor]  # named scalars, already weighted, means over the batch


class Posterior(nn.Module, ABC):
    """`Posterior(latent_dim, **hyperparameters)`, every hyperparameter with a default.

    As with quantizers, a training loop calls `step(progress)` once after each optimizer step that was really taken, on
    every rank, or `discard()` after one that was skipped.
    """

    num_moments: ClassVar[int]  # numbers that the encoder gives for each component of a latent

    @abstractmethod
    def forward(self, encoded: Tensor) -> PosteriorOutput:
        """What the encoder gave, (B, num_moments * D, h, w) of any float type; all arithmetic is in float32."""

    @abstractmethod
    def moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), (B, D, h, w) float32 each."""

    @abstractmethod
    def step(self, progress: float = 1.0) -> bool:
        """Apply what the forward passes since the last call have gathered; returns False, as nothing ever jumps.

        `progress` in [0, 1], the share of the run that is done, drives annealing; at the default nothing is annealed.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget what the forward passes since the last `step` have gathered: the optimizer step was skipped."""


class GaussianPosterior(Posterior):
    """Independent normal distributions, whose KL to N(0, I) is weighted in one of two ways.

    Given: by `beta` (beta-VAE, Higgins et al. 2017; 1 is the ELBO), after a linear `warmup` from 0 (Bowman et al. 2015,
    arXiv:1511.06349), and charged for a channel only above `free_bits` (Kingma et al. 2016, arXiv:1606.04934, appendix;
    a group is a channel with all its positions). Learned: with `kl_target` the weight is the multiplier of the
    constraint KL = kl_target and follows log(KL / kl_target), as GECO's follows its constraint on the reconstruction
    (Rezende and Viola 2018, arXiv:1810.00597).

    Departure: which channels are charged, and the multiplier, follow from the step before, over the batches of all
    ranks; so ranks and accumulated batches equal one batch, and a skipped step leaves no trace.
    """

    num_moments = 2

    def __init__(
        self,
        latent_dim: int,
        beta: float = 1.0,  # weight of the KL; above 1 for fewer, more independent latents, below 1 for more detail
        warmup: float = 0.0,  # share of the run in which the weight rises from 0; against early collapse
        free_bits: float = 0.0,  # nats per channel and image that cost nothing; keeps every channel in use
        kl_target: float | None = None,  # nats per image at which the KL is held by a learned weight; null: none
    ):
        super().__init__()
        check_hyperparameters(latent_dim, beta, warmup, free_bits, kl_target)
        self.beta, self.warmup, self.free_bits, self.kl_target = beta, warmup, free_bits, kl_target
        self.register_buffer("kl_weight", torch.tensor(0.0 if warmup else beta))
        self.register_buffer("charged", torch.ones(latent_dim, dtype=torch.uint8))  # 1: a channel's KL costs something
        # Not buffers: DistributedDataParallel would overwrite every rank's statistics with those of rank 0.
        self.pending_kl: Tensor | None = None  # (D,) sum over the batches since the last step
        self.num_pending = 0  # of these batches

    def forward(self, encoded: Tensor) -> PosteriorOutput:
        with torch.autocast(encoded.device.type, enabled=False):
            mean, log_variance = self.moments(encoded)
            kl = gaussian_kl(mean, log_variance).sum((2, 3)).mean(0)  # (D,) nats per image
            if self.training:
                self.gather(kl.detach())
            charged = torch.where(self.charged > 0, kl, self.free_bits)
            latents = mean
            if self.training:  # the reparameterisation, section 2.4 of the paper
                latents = mean + (0.5 * log_variance).exp() * draw_noise(mean)
        return PosteriorOutput(latents, mean, log_variance, {"kl": self.kl_weight * charged.sum()})

    def moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = encoded.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCES)

    def gather(self, kl: Tensor) -> None:
        """Add the KL (D,) of a batch to the pending statistics."""
        if torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: activation checkpointing runs the forward again, already counted
        self.pending_kl = kl if self.pending_kl is None else self.pending_kl + kl
        self.num_pending += 1

    def discard(self) -> None:
        self.pending_kl, self.num_pending = None, 0

    @torch.no_grad()
    def step(self, progress: float = 1.0) -> bool:
        """Reduce the pending KL over the ranks, in one call, and renew the weight and what is charged by it."""
        if self.pending_kl is None:
            return False
        total, number = sum_over_ranks(self.pending_kl, self.pending_kl.new_tensor(self.num_pending))
        kl = total / number  # (D,)
        self.discard()
        if self.kl_target is not None:
            error = (kl.sum() / self.kl_target).log().clamp(-1, 1)
            log_weight = self.kl_weight.log() + MULTIPLIER_RATE * error
            self.kl_weight.copy_(log_weight.clamp(*LOG_MULTIPLIERS).exp())
        else:
            self.kl_weight.fill_(self.beta * min(1.0, progress / self.warmup) if self.warmup else self.beta)
            if self.free_bits:
                self.charged.copy_(kl > self.free_bits)
        return False


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mean, variance) to N(0, 1) in nats, elementwise (Kingma and Welling 2013, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def gaussian_log_density(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the density of N(mean, variance), in nats, elementwise."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (values - mean).square() * (-log_variance).exp())


def draw_noise(like: Tensor) -> Tensor:
    """Standard normal noise for this rank's part (B, ...) of a batch that all ranks share.

    Ranks start from one seed and draw in step: each draws the noise of all of them and keeps its own part, so that
    they have different noise, and together that of one rank with the whole batch.
    """
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    noise = torch.randn(num_ranks * len(like), *like.shape[1:], device=like.device)
    return noise[rank * len(like) : (rank + 1) * len(like)]


def check_hyperparameters(
    latent_dim: int, beta: float, warmup: float, free_bits: float, kl_target: float | None
) -> None:
    """Raise a ValueError that names the value and the rule."""
    if latent_dim < 1:
        raise ValueError(f"latent_dim={latent_dim} must be at least 1")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta={beta} must be above 0: without the KL nothing can be sampled")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup} must lie in [0, 1]: it is a share of the run")
    if free_bits < 0:
        raise ValueError(f"free_bits={free_bits} must not be negative: they are nats per channel and image")
    if kl_target is not None and kl_target <= 0:
        raise ValueError(f"kl_target={kl_target} must be above 0 nats per image, or null to give beta")
    if kl_target is not None and (beta != 1 or warmup or free_bits):
        raise ValueError(
            f"kl_target={kl_target} learns the weight of the KL by itself; leave out beta={beta}, warmup={warmup} and "
            f"free_bits={free_bits}, or give kl_target=null"
        )


POSTERIORS = {"gaussian": GaussianPosterior}
