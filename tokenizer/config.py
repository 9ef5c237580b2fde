"""TokenizerConfig: exactly what a tokenizer's config.json holds, architecture and preprocessing."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .autoencoder import AUTOENCODERS
from .choices import complete
from .pretrained import PretrainedConfig
from .quantizers import QUANTIZERS


@dataclass
class TokenizerConfig(PretrainedConfig):
    """`autoencoder` and `quantizer` name a class of their table and its hyperparameters; absent ones are filled in."""

    format_version: ClassVar[int] = 2
    later_keys: ClassVar[dict[str, tuple[int, Any]]] = {"quantizer.ema_vq.gradient": (2, "straight_through")}

    image_channels: int = 3  # 3 RGB or 1 grey
    resize: int | None = None  # PIL images: short side in pixels, then the centred square; null keeps their size
    codebook_dim: int = 8  # D, components of a code
    autoencoder: dict[str, Any] = field(default_factory=lambda: {"name": "convolutional"})
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "ema_vq"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.autoencoder = complete("autoencoder", self.autoencoder, AUTOENCODERS)
        self.quantizer = complete("quantizer", self.quantizer, QUANTIZERS)
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels={self.image_channels} must be 3 (RGB) or 1 (grey)")
        if self.codebook_dim < 1:
            raise ValueError(f"codebook_dim={self.codebook_dim} must be at least 1")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize={self.resize} must be at least 1 pixel, or null to keep the size of the pictures")
