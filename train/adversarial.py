"""The game between tokenizer and discriminator, after VQGAN (Esser et al. 2021, arXiv:2012.09841).

The discriminator learns to tell images from reconstructions, the tokenizer to make that hard. What both must know of a
whole step (mean logits, gradients) is summed over its batches, reduced over the ranks once the step has been taken, and
used in the next one, as the codebook's statistics are: so ranks and accumulated batches equal one batch, and a skipped
step leaves no trace.

Shapes: B batch, C channels, H W sides; logits (B, 1, h, w).
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.func import functional_call
from torch.nn import functional as F

from .optimization import Trainee
from .settings import AdversarialSettings

STABILIZER = 1e-6  # delta in VQGAN's equation 7


class Adversary:
    """What discriminator and tokenizer are told of each other, in float32, and the statistics that this needs.

    `last_kernel` is that of the decoder which makes the pixels.
    """

    def __init__(
        self, settings: AdversarialSettings, discriminator: Trainee, last_kernel: Tensor, accelerator: Accelerator
    ):
        self.settings, self.discriminator = settings, discriminator
        self.last_kernel, self.accelerator = last_kernel, accelerator
        self.of_discriminator, self.of_tokenizer = GAMES[settings.loss]
        self.num_steps = 0
        # Of images and of reconstructions; before anything is known 0, undecided.
        self.mean_logits = torch.zeros(2, device=accelerator.device)  # moving averages, LeCam's anchors
        self.logits = torch.zeros(2, device=accelerator.device)  # of the last step alone
        # Measured in one step, used in the next: the discriminator is a step ahead of what it asks.
        self.adaptive_weight = torch.tensor(0.0 if settings.adaptive else 1.0, device=accelerator.device)
        if settings.adaptive:  # a compiled tokenizer must keep its buffers: its graph is walked three times
            functorch_config.donated_buffer = False
        self.discard()
        accelerator.register_for_checkpointing(self)

    def plays(self, step: int) -> bool:
        """Whether there is a discriminator in a step yet."""
        return step > self.settings.start_step

    def ramp(self, step: int) -> float:
        """The share in [0, 1] of its weight that it has in a step."""
        return min(1.0, max(0, step - self.settings.start_step) / max(1, self.settings.ramp_steps))

    def tokenizer_loss(self, step: int, reconstructions: Tensor, reconstruction_loss: Tensor) -> dict[str, Tensor]:
        """The weighted term that draws reconstructions (B, C, H, W) towards what the discriminator takes for real.

        No gradient reaches the discriminator. `reconstruction_loss` is what the adaptive weight compares it with.
        """
        network = self.discriminator.network
        weights = {name: weight.detach() for name, weight in network.named_parameters()}
        loss = self.of_tokenizer(functional_call(network, weights, (reconstructions,)).float())
        if self.settings.adaptive:
            for total, term in zip(self.gradients, (reconstruction_loss, loss), strict=True):
                (gradient,) = torch.autograd.grad(term, self.last_kernel, retain_graph=True)
                total += gradient.flatten()
        return {"adversarial": self.settings.weight * self.ramp(step) * self.adaptive_weight * loss}

    def discriminator_losses(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """The terms from which the discriminator learns: (B, C, H, W) twice, and no gradient reaches the tokenizer."""
        real, fake = self.discriminator.model(torch.cat([images, reconstructions.detach()])).float().chunk(2)
        self.num_batches += 1
        self.batch_logits += torch.stack([real.mean(), fake.mean()]).detach()
        losses = {"discriminator": self.of_discriminator(real, fake)}
        if self.settings.lecam_weight:
            losses["lecam"] = self.settings.lecam_weight * lecam(real, fake, self.mean_logits)
        return losses

    @torch.no_grad()
    def step(self) -> None:
        """Reduce over the ranks what the batches of a taken step have left, in one call, and renew the statistics."""
        if self.num_batches == 0:
            return
        sums = torch.cat([self.batch_logits, self.gradients.flatten()])
        means = self.accelerator.reduce(sums / self.num_batches, "mean")
        self.logits, gradients = means[:2], means[2:].view_as(self.gradients)
        share = max(1 - self.settings.lecam_decay, 1 / (self.num_steps + 1))  # a plain mean at first
        self.mean_logits = self.mean_logits.lerp(self.logits, share)
        if self.settings.adaptive:
            self.adaptive_weight = adaptive_weight(*gradients, self.settings.max_adaptive_weight)
        self.num_steps += 1
        self.discard()

    def discard(self) -> None:
        """Forget the batches since the last step."""
        device, num_gradients = self.accelerator.device, self.last_kernel.numel() if self.settings.adaptive else 0
        self.num_batches = 0
        self.batch_logits = torch.zeros(2, device=device)
        self.gradients = torch.zeros(2, num_gradients, device=device)  # of both losses, at the last kernel

    @property
    def figures(self) -> dict[str, float]:
        """What the log says of the last step beside its losses; nothing before the first."""
        if self.num_steps == 0:
            return {}
        real, fake = self.logits.tolist()
        return {"real_logits": real, "fake_logits": fake, "adaptive_weight": self.adaptive_weight.item()}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_steps", "mean_logits", "logits", "adaptive_weight")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.accelerator.device) if isinstance(value, Tensor) else value)


def last_kernel(decoder: nn.Module) -> Tensor:
    """The last kernel or matrix that a decoder has registered, which makes the pixels."""
    return [weight for weight in decoder.parameters() if weight.ndim > 1][-1]


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, most: float) -> Tensor:
    """VQGAN's equation 7: the ratio of the norms of the two gradients at the last kernel, at most `most`."""
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + STABILIZER)
    return ratio.clamp(max=most)


def lecam(real: Tensor, fake: Tensor, mean_logits: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021, arXiv:2104.03310): squared distances from the other side's mean logit."""
    mean_real, mean_fake = mean_logits  # (2,)
    return (real - mean_fake).square().mean() + (fake - mean_real).square().mean()


def hinge_of_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Lim and Ye 2017, arXiv:1705.02894, halved as in taming-transformers: 1 where it cannot tell them apart."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_of_tokenizer(fake: Tensor) -> Tensor:
    return -fake.mean()


def cross_entropy_of_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Goodfellow et al. 2014, arXiv:1406.2661, equation 1, halved: log 2 where it cannot tell them apart."""
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def non_saturating_of_tokenizer(fake: Tensor) -> Tensor:
    """-log of the probability of being real (the same paper, end of section 3)."""
    return F.softplus(-fake).mean()


GAMES = {  # the discriminator's loss and the tokenizer's
    "hinge": (hinge_of_discriminator, hinge_of_tokenizer),
    "non_saturating": (cross_entropy_of_discriminator, non_saturating_of_tokenizer),
}
