"""Exactly what the config.json of a model of images holds: architecture and preprocessing."""

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .autoencoder import AUTOENCODERS
from .posteriors import POSTERIORS
from .pretrained import PretrainedConfig, checked, unknown_key
from .quantizers import QUANTIZERS


@dataclass
class ImageConfig(PretrainedConfig):
    """What every model of images has; `autoencoder` names a class of its table and its hyperparameters."""

    image_channels: int = 3  # 3 RGB or 1 grey
    resize: int | None = None  # PIL images: short side in pixels, then the centred square; null keeps their size
    autoencoder: dict[str, Any] = field(default_factory=lambda: {"name": "convolutional"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.autoencoder = complete("autoencoder", self.autoencoder, AUTOENCODERS)
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels={self.image_channels} must be 3 (RGB) or 1 (grey)")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"resize={self.resize} must be at least 1 pixel, or null to keep the size of the pictures")


@dataclass
class TokenizerConfig(ImageConfig):
    """`autoencoder` and `quantizer` name a class of their table and its hyperparameters; absent ones are filled in."""

    format_version: ClassVar[int] = 2
    later_keys: ClassVar[dict[str, tuple[int, Any]]] = {"quantizer.ema_vq.gradient": (2, "straight_through")}

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


def complete(part: str, given: dict[str, Any], table: dict[str, type]) -> dict[str, Any]:
    """`{name, **hyperparameters}` with every hyperparameter of the named class, in the order of its signature.

    Raises ValueError for a name that is not in the table, an unknown hyperparameter or a value of another type.
    """
    name = given.get("name")
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{part}.name={name!r} must be one of {', '.join(sorted(table))}")
    known = hyperparameters(table[name])
    for key in given:
        if key not in known and key != "name":
            raise unknown_key(key, known, f"{part} {name!r}")
    values = {
        key: checked(f"{part}.{key}", given.get(key, parameter.default), parameter.annotation)
        for key, parameter in known.items()
    }
    return {"name": name} | values


def hyperparameters(choice: type) -> dict[str, inspect.Parameter]:
    """The parameters of a class in a table that a config may set: those with a default that a position can give.

    A keyword-only one is for the model to decide, as the number of the encoder's outputs is.
    """
    signature = inspect.signature(choice).parameters
    return {
        key: parameter
        for key, parameter in signature.items()
        if parameter.default is not parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
    }


def build(table: dict[str, type], chosen: dict[str, Any], *arguments: Any, **options: Any) -> Any:
    """The class that a completed mapping names, made with its hyperparameters and what the model decides."""
    chosen = dict(chosen)
    return table[chosen.pop("name")](*arguments, **chosen, **options)
