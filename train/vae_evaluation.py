"""What a training run tells of a VAE: the ELBO, what the latents know of their images, and collapse as it happens."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from tokenizer import ImageVAE, VAEOutput
from tokenizer.collapse import active_units, kl_per_channel, mutual_information
from tokenizer.metrics import psnr
from tokenizer.posteriors import gaussian_kl

from .evaluation import Examiner, likelihood
from .settings import VAERun

log = logging.getLogger(__name__)

NUM_CROPS = 256  # at least, over all ranks, on which collapse is measured
COLLAPSE = 0.1  # a share of active units below this, past a quarter of the run, is warned of


class VAEExaminer(Examiner):
    """The ELBO of validation pictures; KL, active units and mutual information on training crops."""

    model_class = ImageVAE
    config: VAERun

    def __init__(self, model: ImageVAE, *arguments: Any):
        super().__init__(model, *arguments)
        self.posterior = model.posterior

    def add(self, output: VAEOutput) -> None:
        """Nothing is counted over batches."""

    def figures(self, output: VAEOutput, images: Tensor) -> dict[str, float]:
        """KL in nats per crop, its weight in the next step, and the ELBO of the last batch."""
        kl = gaussian_kl(output.mean, output.log_variance).detach().sum((1, 2, 3)).mean().item()
        nats = self.reconstruction_loss.nats(output.reconstructions, images).mean().item()
        weight = self.posterior.kl_weight.item()
        return {"kl_nats": kl, "kl_weight": weight} | self.elbo(nats, kl / images[0].numel())

    def shown(self, values: dict[str, float]) -> dict[str, str]:
        """The KL of the last evaluation, before the first of the training batch, and the share of active units."""
        active = values["active_units"] / values["num_units"] if "active_units" in values else None
        return {"KL": f"{values['kl_nats']:.1f} nats", "active": "..." if active is None else f"{active:.0%}"}

    @torch.no_grad()
    def evaluate(self, model: ImageVAE) -> dict[str, float]:
        """PSNR of decode(encode(x)) and the ELBO on whole validation pictures; the latents on training crops."""
        device = self.accelerator.device
        totals = torch.zeros(4, device=device)  # sums over the pictures: PSNR, nats, nats of KL per dimension, 1
        for images, labels in self.pictures(model):
            originals = images.float() / 255
            mean, log_variance = model.moments(images, labels=labels)
            drawn = model.decode(mean + (0.5 * log_variance).exp() * self.same_noise(mean), labels).cpu()
            kl = gaussian_kl(mean, log_variance).sum((1, 2, 3)) / originals[0].numel()
            scores = psnr(model.decode(mean, labels).cpu(), originals)
            nats = self.reconstruction_loss.nats(drawn, originals)
            totals += torch.tensor([scores.sum(), nats.sum(), kl.sum(), len(scores)], device=device)
        mean_psnr, nats, kl = self.mean_over_pictures(totals)
        return {"psnr": mean_psnr} | self.elbo(nats, kl) | self.knowledge(model)

    def elbo(self, nats: float, kl: float) -> dict[str, float]:
        """Distortion, rate and their sum, the negative ELBO, from nats per dimension (a channel of a pixel) of both."""
        figures = likelihood(nats, kl / math.log(2), self.reconstruction_loss)
        return figures | {"elbo_nats_per_dimension": -(nats + kl)}

    def knowledge(self, model: ImageVAE) -> dict[str, float]:
        """What the latents know of training crops: KL, of each channel too, active units, mutual information."""
        crops, parts, number = self.crops(), [], 0
        while number < NUM_CROPS:
            batch = next(crops)
            both = torch.stack(model.moments(batch.crops, labels=batch.labels), dim=1)  # (B, 2, D, h, w)
            both = self.accelerator.gather(both)
            parts.append(both)
            number += len(both)
        mean, log_variance = torch.cat(parts).cpu().unbind(1)
        channels = kl_per_channel(mean, log_variance)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(self.config.seed))
        active = active_units(mean)
        return {
            "kl_nats": channels.sum().item(),
            "active_units": int(active.sum()),
            "num_units": active.numel(),
            "mutual_information": mutual_information(mean, log_variance, mean + (0.5 * log_variance).exp() * noise),
            "num_crops": number,
        } | {f"kl_nats_channel_{index}": nats for index, nats in enumerate(channels.tolist())}

    def same_noise(self, mean: Tensor) -> Tensor:
        """Noise (1, D, h, w), one draw for all pictures of a size: so no figure depends on which rank has which."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randn(1, *mean.shape[1:], generator=generator).to(mean.device)

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        """Say so where most latents are the same for every image."""
        share = metrics["active_units"] / metrics["num_units"]
        if share < COLLAPSE and step >= self.config.steps / 4:
            log.warning(
                "posterior collapse at step %d: only %.0f%% of the latents differ from image to image; lower "
                "model.posterior.beta, or give model.posterior.kl_target or free_bits in nats, or a warmup",
                step,
                100 * share,
            )

    def sample_rows(self, model: ImageVAE, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The pictures, their reconstructions, and two rows of samples of the prior, of the same classes."""
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = [model.sample(len(images), images.shape[2:], generator, labels) for _ in range(2)]
        return [images.float() / 255, model.decode(model.encode(images, labels=labels), labels), *drawn]

    @classmethod
    def measured_on(cls, config: VAERun, metrics: dict[str, float]) -> str:
        return (
            f"On {cls.pictures_of(config)}: `psnr`: dB, mean, of decode(encode(x)); `total_bits_per_dimension`: the "
            f"negative ELBO, for the 8-bit pixels under a Gaussian of deviation `sigma`, per channel of a pixel, by "
            f"one latent draw. On `num_crops` training crops of {config.image_size} pixels: `kl_nats` per crop, in "
            f"all and of each channel; `active_units`: latents whose posterior mean has a variance above 0.01, of "
            f"`num_units`; `mutual_information` of crop and latents in nats, which this estimate cannot show above "
            f"log(`num_crops`)."
        )
