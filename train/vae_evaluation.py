"""What a training run tells of a VAE: the ELBO, what the latents know of their images, and collapse as it happens."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from tokenizer import ImageVAE, VAEOutput
from tokenizer.collapse import active_units, kl_per_channel, mutual_information
from tokenizer.posteriors.normal import Level, Noise

from .evaluation import Examiner, likelihood
from .settings import VAERun

log = logging.getLogger(__name__)

NUM_CROPS = 256  # at least, over all ranks, on which collapse is measured
LEVELS = (
    " Level 1 is what the decoder takes and each further one stands above the one before: its channels come after, and "
    "its units are active where the mean differs from that of its prior, given the level above, by as much; the "
    "information is that of the topmost."
)
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
        """KL in nats per crop, in all and by level, its weight in the next step, and the ELBO of the last batch."""
        kl = [level.kl.detach().sum((1, 2, 3)).mean().item() for level in output.levels]
        nats = self.reconstruction_loss.nats(output.reconstructions, images).mean().item()
        weighted = {"kl_nats": sum(kl), "kl_weight": self.posterior.kl_weight.item()}
        return weighted | by_level("kl_nats", kl) | self.elbo(nats, sum(kl) / images[0].numel())

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
            levels = model.levels(images, self.same_noise(), labels=labels)
            with model.evaluating():  # p(x|z) as it was trained: its mean is not clamped, as pictures are
                means = model.decode_latents(levels[0].latents, model.classes(labels, len(images))).cpu()
            coded = model.decode(model.encode(images, labels=labels), labels).cpu()
            kl = sum(level.kl.sum((1, 2, 3)) for level in levels) / originals[0].numel()
            scores, nats = self.psnr_of(coded, originals), self.reconstruction_loss.nats(means, originals)
            totals += torch.tensor([scores.sum(), nats.sum(), kl.sum(), len(scores)], device=device)
        mean_psnr, nats, kl = self.mean_over_pictures(totals)
        return {"psnr": mean_psnr} | self.elbo(nats, kl) | self.knowledge(model)

    def elbo(self, nats: float, kl: float) -> dict[str, float]:
        """Distortion, rate and their sum, the negative ELBO, from nats per dimension (a channel of a pixel) of both."""
        figures = likelihood(nats, kl / math.log(2), self.reconstruction_loss)
        return figures | {"elbo_nats_per_dimension": -(nats + kl)}

    def knowledge(self, model: ImageVAE) -> dict[str, float]:
        """What the latents know of training crops: KL, of each channel and level too, active units, information."""
        crops, parts, number = self.crops(), [], 0
        while number < NUM_CROPS:
            batch = next(crops)
            levels = model.levels(batch.crops, self.same_noise(), labels=batch.labels)
            parts.append([self.gathered(level) for level in levels])
            number += len(parts[-1][0])
        told = [torch.cat(level).cpu().unbind(1) for level in zip(*parts, strict=True)]
        channels = [kl_per_channel(kl) for _, _, _, kl in told]
        # What a level knows beyond the one above: where q is that level's p for every image, its latents are idle.
        active = [active_units(mean - prior_mean) for mean, _, prior_mean, _ in told]
        num_active, num_units = [int(each.sum()) for each in active], [each.numel() for each in active]
        figures = {
            "kl_nats": sum(each.sum().item() for each in channels),
            "active_units": sum(num_active),
            "num_units": sum(num_units),
            "mutual_information": self.information(*told[-1][:2]),
            "num_crops": number,
        }
        figures |= by_level("kl_nats", [each.sum().item() for each in channels])
        figures |= by_level("active_units", num_active) | by_level("num_units", num_units)
        return figures | {f"kl_nats_channel_{index}": nats for index, nats in enumerate(torch.cat(channels).tolist())}

    def gathered(self, level: Level) -> Tensor:
        """Mean, log-variance, mean of the prior and KL of every rank's pictures, (B, 4, D, h, w)."""
        return self.accelerator.gather(torch.stack([level.mean, level.log_variance, level.prior_mean, level.kl], dim=1))

    def information(self, mean: Tensor, log_variance: Tensor) -> float:
        """Of crops and the topmost latents, whose q alone depends on no draw of others."""
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(self.config.seed))
        return mutual_information(mean, log_variance, mean + (0.5 * log_variance).exp() * noise)

    def same_noise(self) -> Noise:
        """One draw for all pictures of a size, anew from the seed: so no figure depends on which rank has which."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return lambda like: torch.randn(1, *like.shape[1:], generator=generator).to(like.device)

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        """Say so where most latents, or most of a level, are the same for every image."""
        if step < self.config.steps / 4:
            return
        levels = [key.removeprefix("active_units") for key in metrics if key.startswith("active_units_level")]
        for level in levels or [""]:
            share = metrics[f"active_units{level}"] / metrics[f"num_units{level}"]
            if share < COLLAPSE:
                log.warning(
                    "posterior collapse at step %d: only %.0f%% of the latents%s differ from image to image; lower "
                    "model.posterior.beta, or give model.posterior.kl_target or free_bits in nats, or a warmup",
                    step,
                    100 * share,
                    level.replace("_level_", " of level "),
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
            f"log(`num_crops`).{LEVELS if 'kl_nats_level_1' in metrics else ''}"
        )


def by_level(name: str, values: list[float]) -> dict[str, float]:
    """A figure of each level from the decoder's upward, where there are several."""
    return {f"{name}_level_{index}": value for index, value in enumerate(values, 1)} if len(values) > 1 else {}
