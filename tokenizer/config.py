"""Exactly what the config.json of a model of images holds: architecture and preprocessing."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .autoencoder import AUTOENCODERS
from .choices import complete
from .posteriors import POSTERIORS
from .pretrained import PretrainedConfig
from .quantizers import QUANTIZERS


@dataclass
class ImageConfig(PretrainedConfig):
    """What every model of images has; `autoencoder` names a class of its table and its hyperparameters."""

    image_channels: int = 3  # 3 RGB or 1 grey
    resize: int | None = None  # PIL images: short side in pixels, then the centred square; null keeps their size
    autoencoder: dict[str, Any] = field(default_factory=lambda: {"name": "convolutional"})
    num_classes: int = 0  # of images, which encoder and decoder are told as labels=; 0: an unconditional model
    pixel_range: list[float] = field(default_factory=lambda: [-1.0, 1.0])  # black and white, as the network sees them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.autoencoder = complete("autoencoder", self.autoencoder, AUTOENCODERS)
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels={self.image_channels} must be 3 (RGB) or 1 (grey)")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize={self.resize} must be at least 1 pixel, or null to keep the size of the pictures")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be at least 1, or 0 for an unconditional model")
        if len(self.pixel_range) != 2 or not -math.inf < self.pixel_range[0] < self.pixel_range[1] < math.inf:
            raise ValueError(
                f"pixel_range={self.pixel_range} must be what black and white are, such as [-1, 1] or [0, 1]"
            )


@dataclass
class TokenizerConfig(ImageConfig):
    """`autoencoder` and `quantizer` name a class of their table and its hyperparameters; absent ones are filled in."""

    format_version: ClassVar[int] = 3
    later_keys: ClassVar[dict[str, tuple[int, Any]]] = {
        "quantizer.residual.refinement": (3, 1.0),
        "quantizer.ema_vq.gradient": (2, "straight_through"),
        "num_classes": (2, 0),
        "pixel_range": (2, [-1.0, 1.0]),
    }

    codebook_dim: int = 8  # D, components of a code
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "ema_vq"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantizer = complete("quantizer", self.quantizer, QUANTIZERS)
        if self.codebook_dim < 1:
            raise ValueError(f"codebook_dim={self.codebook_dim} must be at least 1")


@dataclass
class VAEConfig(ImageConfig):
    """`autoencoder` and `posterior` name a class of their table and its hyperparameters; absent ones are filled in."""

    latent_dim: int = 8  # D, components of a latent, the channels of the grid
    posterior: dict[str, Any] = field(default_factory=lambda: {"name": "gaussian"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.posterior = complete("posterior", self.posterior, POSTERIORS)
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim={self.latent_dim} must be at least 1")
