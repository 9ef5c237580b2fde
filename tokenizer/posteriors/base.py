"""The contract of every posterior, and how its KL is weighted.

q(z|x) is what an encoder says of an image's latents as a distribution; its KL to the prior p(z) is what they cost.
Shapes: B batch, D latent_dim, h w grid sides, C channels of all levels. All figures are in nats per image of the size
that came in.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ranks import sum_over_ranks
from .normal import Level, Noise, draw_noise

MULTIPLIER_RATE = 0.1  # most that the logarithm of a learned multiplier moves in a step
LOG_MULTIPLIERS = -14.0, 14.0


@dataclass
class PosteriorOutput:
    levels: list[Level]  # the first is what the decoder takes, (B, D, h, w), each of the rest is above the one before
    losses: dict[str, Tensor]  # named scalars, already weighted, means over the batch

    @property
    def latents(self) -> Tensor:
        """What the decoder takes, (B, D, h, w) float32: drawn from q(z|x) in training, means in eval mode."""
        return self.levels[0].latents

    @property
    def mean(self) -> Tensor:
        """Of `latents`, (B, D, h, w) float32."""
        return self.levels[0].mean

    @property
    def log_variance(self) -> Tensor:
        """Of `latents`, (B, D, h, w) float32."""
        return self.levels[0].log_variance


class Posterior(nn.Module, ABC):
    """`Posterior(latent_dim, **hyperparameters)`, every hyperparameter with a default.

    As with quantizers, a training loop calls `step(progress)` once after each optimizer step that was really taken, on
    every rank, or `discard()` after one that was skipped.

    The KL is the sum over all levels, and weighted in one of two ways. Given: by `beta` (beta-VAE, Higgins et al. 2017;
    1 is the ELBO), after a linear `warmup` from 0 (Bowman et al. 2015, arXiv:1511.06349), and charged for a channel
    only above `free_bits` (the objective with free bits of Kingma et al. 2016, arXiv:1606.04934; a group is a channel
    with all its positions). Learned: with `kl_target` the weight is the multiplier of the constraint KL = kl_target
    and follows log(KL / kl_target), as GECO's follows its constraint on the reconstruction (Rezende and Viola 2018,
    arXiv:1810.00597).

    Departure: which channels are charged, and the multiplier, follow from the step before, over the batches of all
    ranks; so ranks and accumulated batches equal one batch, and a skipped step leaves no trace.
    """

    num_moments: ClassVar[int]  # numbers that the encoder gives for each component of a latent

    def __init__(self, num_channels: int, beta: float, warmup: float, free_bits: float, kl_target: float | None):
        """`num_channels` are those of all levels together."""
        super().__init__()
        check_weights(beta, warmup, free_bits, kl_target)
        self.beta, self.warmup, self.free_bits, self.kl_target = beta, warmup, free_bits, kl_target
        self.register_buffer("kl_weight", torch.tensor(0.0 if warmup else beta))
        self.register_buffer("charged", torch.ones(num_channels, dtype=torch.uint8))  # 1: its KL costs something
        # Not buffers: DistributedDataParallel would overwrite every rank's statistics with those of rank 0.
        self.pending_kl: Tensor | None = None  # (C,) sum over the batches since the last step
        self.num_pending = 0  # of these batches

    @abstractmethod
    def infer(self, encoded: Tensor, noise: Noise) -> list[Level]:
        """What the encoder gave, (B, num_moments * D, h, w) of any float type, to the levels of latents under q.

        A level's latents are its mean and `noise` times its deviation; those of the level above are given. The first
        level is what the decoder takes, (B, D, h, w).
        """

    @abstractmethod
    def draw(self, num_samples: int, grid_size: tuple[int, int], noise: Noise) -> Tensor:
        """What the decoder takes, (num_samples, D, h, w) float32, drawn from the prior."""

    def forward(self, encoded: Tensor) -> PosteriorOutput:
        """What the encoder gave, (B, num_moments * D, h, w) of any float type: a draw in training, else the means."""
        with torch.autocast(encoded.device.type, enabled=False):
            levels = self.infer(encoded, draw_noise if self.training else torch.zeros_like)
            kl = torch.cat([level.kl.sum((2, 3)).mean(0) for level in levels])  # (C,) nats per image
            if self.training:
                self.gather(kl.detach())
            charged = torch.where(self.charged > 0, kl, self.free_bits)
        return PosteriorOutput(levels, {"kl": self.kl_weight * charged.sum()})

    def gather(self, kl: Tensor) -> None:
        """Add the KL (C,) of a batch to the pending statistics."""
        if torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: activation checkpointing runs the forward again, already counted
        self.pending_kl = kl if self.pending_kl is None else self.pending_kl + kl
        self.num_pending += 1

    def discard(self) -> None:
        """Forget what the forward passes since the last `step` have gathered: the optimizer step was skipped."""
        self.pending_kl, self.num_pending = None, 0

    @torch.no_grad()
    def step(self, progress: float = 1.0) -> bool:
        """Reduce the pending KL over the ranks, in one call, and renew the weight and what is charged by it.

        `progress` in [0, 1], the share of the run that is done, drives the warm-up; at the default it is over. Returns
        False, as nothing ever jumps.
        """
        if self.pending_kl is None:
            return False
        if self.kl_target is not None or self.free_bits:  # without them nobody asks, and the ranks need no call
            total, number = sum_over_ranks(self.pending_kl, self.pending_kl.new_tensor(self.num_pending))
            kl = total / number  # (C,)
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


def check_latent_dim(latent_dim: int) -> None:
    """Raise a ValueError that names the value and the rule."""
    if latent_dim < 1:
        raise ValueError(f"latent_dim={latent_dim} must be at least 1")


def check_weights(beta: float, warmup: float, free_bits: float, kl_target: float | None) -> None:
    """Raise a ValueError that names the value and the rule."""
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
