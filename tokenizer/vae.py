"""ImageVAE: images -> a distribution over continuous latents -> images; the sibling of ImageTokenizer without tokens.

Shapes: B batch, C image channels, H W image sides in pixels, D latent_dim, h w grid sides (H / downsample_factor).
"""

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .choices import build
from .config import VAEConfig
from .image_model import ImageModel
from .images import Images
from .labels import Labels
from .posteriors import POSTERIORS, Posterior, PosteriorOutput
from .posteriors.normal import Level, Noise, noise_of

USAGE = """
from PIL import Image
from tokenizer import ImageVAE

vae = ImageVAE.from_pretrained("{source}")
latents = vae.encode(Image.open("picture.jpg")LABELS)  # float (1, D, h, w)
pictures = vae.decode(latentsLABELS)  # float (1, C, H, W) in [0, 1]
drawn = vae.sample(4, image_size=pictures.shape[2:]LABELS)  # float (4, C, H, W) in [0, 1]
"""


@dataclass
class VAEOutput(PosteriorOutput):
    """That of the posterior, with its losses in nats per dimension (channel of a pixel)."""

    reconstructions: Tensor  # (B, C, H, W) float32 on the [0, 1] scale, not clamped


class ImageVAE(ImageModel):
    """VAE (Kingma and Welling 2013, arXiv:1312.6114) on a grid of latents: encoder, posterior, its prior, decoder.

    The prior is N(0, I), or with a posterior of several levels that of the level above; the latents here are those of
    the lowest level, which alone are decoded.

    The decoder gives the mean of p(x|z); its deviation belongs to the likelihood and so to the training loss. In nats
    per dimension, that loss and `losses` with a KL weight of 1 are together the negative ELBO.

    With `num_classes` it is a conditional VAE (Sohn et al. 2015): encoder and decoder are told the class y of each
    image, `labels` (B,), or one number for all. The prior is N(0, I) for every class, as in model M2 of Kingma et al.
    2014, arXiv:1406.5298, and the ELBO bounds log p(x|y).
    """

    config_class = VAEConfig
    card_caption = "originals above, reconstructions below, then samples of the prior"
    card_tags: ClassVar[list[str]] = ["variational-autoencoder", "vae"]

    def __init__(self, config: VAEConfig):
        num_moments = POSTERIORS[config.posterior["name"]].num_moments
        super().__init__(config, config.latent_dim, num_moments=num_moments)
        self.posterior = build(POSTERIORS, config.posterior, config.latent_dim)

    @property
    def bottleneck(self) -> Posterior:
        return self.posterior

    @property
    def card_usage(self) -> str:
        return USAGE.replace("LABELS", ", labels=0" if self.config.num_classes else "")

    def forward(self, images: Tensor, labels: Labels | None = None) -> VAEOutput:
        """Float images (B, C, H, W) in [0, 1], sides divisible by the factor; values are not checked, for speed."""
        self.check_forward(images)
        classes = self.classes(labels, len(images))
        found = self.posterior(self.encode_latents(images, classes))
        losses = {name: loss / images[0].numel() for name, loss in found.losses.items()}
        return VAEOutput(found.levels, losses, self.decode_latents(found.latents, classes))

    @torch.no_grad()
    def levels(
        self,
        images: Images,
        noise: Noise = torch.zeros_like,
        resize: int | Literal["config"] | None = "config",
        labels: Labels | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> list[Level]:
        """Every level of latents under q(z|x), the decoder's first, of whatever `encode` takes.

        `noise` is asked for the standard normal noise of each level, by default nought, so that latents are means.
        """
        tiles = self.tiles(tile_size, tile_overlap)
        batch = self.prepared(images, resize)
        classes = self.classes(labels, len(batch))
        with self.evaluating():
            return self.posterior.infer(self.encode_latents(batch, classes, tiles), noise)

    def moments(
        self, images: Images, resize: int | Literal["config"] | None = "config", labels: Labels | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), (B, D, h, w) float32 each, of whatever `encode` takes.

        With several levels, those given the means of the levels above.
        """
        lowest = self.levels(images, resize=resize, labels=labels)[0]
        return lowest.mean, lowest.log_variance

    def encode(
        self,
        images: Images,
        sample: bool = False,
        resize: int | Literal["config"] | None = "config",
        generator: torch.Generator | None = None,
        labels: Labels | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """Images to latents (B, D, h, w) float32 on the model's device: the mean of q(z|x), or with `sample` a draw.

        With several levels they are those of the lowest, given the means, or draws, of the levels above.
        Takes what `ImageTokenizer.encode` takes and prepares it alike; ValueError for anything else. `generator`, of
        the CPU, makes the draw repeatable. A conditional model needs `labels` (B,), an unconditional one refuses them.
        With `tile_size` a large picture is encoded in tiles, as by `ImageTokenizer.encode`; the noise is as without.
        """
        noise = noise_of(generator) if sample else torch.zeros_like
        return self.levels(images, noise, resize, labels, tile_size, tile_overlap)[0].latents

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        labels: Labels | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """Latents (B, D, h, w), or (D, h, w) for one picture, to float32 images (B, C, H, W) in [0, 1].

        They are the mean of p(x|z), clamped. A conditional model needs `labels` (B,), of the same class or another.
        With `tile_size` a large picture is decoded in tiles, as by `ImageTokenizer.decode`. Raises ValueError for
        latents of another shape or type, or not finite.
        """
        tiles = self.tiles(tile_size, tile_overlap)
        dim = self.config.latent_dim
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents of {kind}; the rule is a float tensor (B, {dim}, h, w), as encode returns it")
        batch = latents[None] if latents.ndim == 3 else latents
        if batch.ndim != 4 or batch.shape[1] != dim or batch.numel() == 0:
            shape = tuple(latents.shape)
            raise ValueError(f"latents of shape {shape}; the rule is (B, {dim}, h, w) or ({dim}, h, w), none of them 0")
        if not batch.isfinite().all():
            raise ValueError("latents hold NaN or infinity; the rule is finite numbers, as encode returns them")
        with self.evaluating():
            classes = self.classes(labels, len(batch))
            return self.decode_latents(batch.to(self.device), classes, tiles).clamp_(0, 1)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        image_size: int | tuple[int, int],
        generator: torch.Generator | None = None,
        labels: Labels | None = None,
    ) -> Tensor:
        """Images (num_samples, C, H, W) in [0, 1] of (H, W) pixels, or square ones, from latents drawn from the prior.

        They are means of p(x|z), without its noise. `generator`, of the CPU, makes them repeatable. A conditional model
        needs `labels` (num_samples,). Raises ValueError for a size that the factor does not divide.
        """
        if not isinstance(num_samples, Integral) or num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r} must be a whole number, at least 1")
        grid_size = self.grid_size(image_size)
        with self.evaluating():
            return self.decode(self.posterior.draw(num_samples, grid_size, noise_of(generator)), labels)
