"""What every model of images shares, whatever lies between its encoder and its decoder: sizes, precision, identity.

Shapes: B batch, C image channels, H W image sides in pixels, D components of a latent, h w grid sides
(H / downsample_factor).
"""

from abc import abstractmethod
from numbers import Integral
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from .autoencoder import AUTOENCODERS
from .choices import build
from .config import ImageConfig
from .images import Images, check_shape, from_model_range, nearest_multiples, to_batch, to_model_range
from .labels import Labels, checked_labels
from .pretrained import PretrainedModel
from .processor import bfloat16_is_faster
from .rounding import by_parts, laid_out
from .tiles import Tiles, checked_tiles


class ImageModel(PretrainedModel):
    """An autoencoder of images with a bottleneck between encoder and decoder, which a subclass adds.

    The subclass's forward gives an output with `reconstructions` (B, C, H, W) float32 on the [0, 1] scale, not clamped,
    and `losses`, named scalars, already weighted.
    """

    config: ImageConfig

    def __init__(self, config: ImageConfig, latent_dim: int, **options: Any):
        """`options` are what the model, not its config, decides of the autoencoder."""
        super().__init__(config)
        if config.num_classes:  # an autoencoder need not know of classes
            options["num_classes"] = config.num_classes
        self.autoencoder = build(AUTOENCODERS, config.autoencoder, config.image_channels, latent_dim, **options)
        if config.resize is not None:
            self.check_resize(config.resize)

    @property
    @abstractmethod
    def bottleneck(self) -> nn.Module:
        """What lies between encoder and decoder: a training loop calls its `step` or `discard` after each step."""

    def classes(self, labels: Labels | None, num_images: int) -> Tensor | None:
        """Labels (B,) int64 on the model's device, None where it is unconditional; ValueError for any others."""
        checked = checked_labels(labels, self.config.num_classes, num_images, self.trusting)
        return None if checked is None else checked.to(self.device)

    def encode_latents(self, images: Tensor, classes: Tensor | None = None, tiles: Tiles | None = None) -> Tensor:
        """Float images (B, C, H, W) in [0, 1] to what the encoder gives (B, D, h, w), before the bottleneck.

        A conditional model takes what `classes` makes of the labels.
        In eval mode on a CPU the pictures go through one by one, so that none depends on those beside it.
        """
        if tiles is not None:
            return tiles.encoded(lambda tile: self.encode_latents(tile, classes), images)
        pixels = to_model_range(images.float(), *self.config.pixel_range)  # float32: bfloat16 rounds once
        encoder, given = self.autoencoder.encoder, [pixels] if classes is None else [pixels, classes]
        return by_parts(lambda part, *told: encoder(laid_out(part, encoder), *told), given, self.training)

    def decode_latents(self, latents: Tensor, classes: Tensor | None = None, tiles: Tiles | None = None) -> Tensor:
        """Codes or other latents (B, D, h, w) to float32 images (B, C, H, W) on the [0, 1] scale, not clamped.

        A conditional model takes what `classes` makes of the labels. The pictures beside one change its last bits.
        """
        if tiles is not None:
            return tiles.decoded(lambda tile: self.decode_latents(tile, classes), latents)
        decoder, told = self.autoencoder.decoder, [] if classes is None else [classes]
        pixels = decoder(laid_out(latents, decoder), *told).float()
        return from_model_range(pixels, *self.config.pixel_range)

    def tiles(self, tile_size: int | None, tile_overlap: int | None) -> Tiles | None:
        """The tiles that are asked for in pixels, None for none; ValueError for what the factor does not divide."""
        return checked_tiles(tile_size, tile_overlap, self.downsample_factor)

    def check_forward(self, images: Tensor) -> None:
        """Raise ValueError unless these are floats (B, C, H, W), sides divisible by the factor."""
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}; forward takes floats in [0, 1]: divide by 255, or call encode")
        check_shape(images.shape, self.config.image_channels, self.downsample_factor)

    def prepared(self, images: Images, resize: int | Literal["config"] | None) -> Tensor:
        """What `encode` takes as float32 (B, C, H, W) in [0, 1] on the model's device; ValueError for anything else."""
        if resize == "config":
            resize = self.config.resize
        elif resize is not None and isinstance(images, (np.ndarray, Tensor)):
            raise ValueError(
                f"resize={resize} is for PIL images; arrays and tensors are coded as they are, leave it out"
            )
        if resize is not None:
            self.check_resize(resize)
        return to_batch(images, self.config.image_channels, self.downsample_factor, resize).to(self.device)

    @property
    def downsample_factor(self) -> int:
        """Pixels of an image side per position of the grid."""
        return self.autoencoder.downsample_factor

    def grid_size(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the grid for an image of (H, W) pixels, or of a square one; ValueError where it does not divide."""
        pair = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if len(pair) != 2 or not all(isinstance(side, Integral) for side in pair):
            raise ValueError(f"image_size={image_size!r} must be a whole number of pixels, or the two of (H, W)")
        (height, width), factor = pair, self.downsample_factor
        if height < 1 or width < 1 or height % factor or width % factor:
            raise ValueError(
                f"image_size={image_size} must be a positive multiple of downsample_factor={factor}; the nearest "
                f"height is {nearest_multiples(height, factor)}, the nearest width {nearest_multiples(width, factor)}"
            )
        return height // factor, width // factor

    def check_resize(self, resize: int) -> None:
        """Raise ValueError unless `resize` is a side in pixels that the factor divides."""
        factor = self.downsample_factor
        if not isinstance(resize, Integral) or resize < 1 or resize % factor:
            raise ValueError(
                f"resize={resize!r} must be a side in pixels, a positive multiple of downsample_factor={factor}, "
                f"or None to keep the size"
            )

    def with_weights(self, tensors: dict[str, Tensor]) -> Self:
        """As any model's, but kernels lie as features do, channels last, or a convolution would copy them each time."""
        super().with_weights(tensors)
        self.autoencoder.to(memory_format=torch.channels_last)
        return self

    def fast(self) -> Self:
        """This model itself, changed for good so that it codes faster where it is, and moves hardly a token.

        It encodes in bfloat16 where that shows least, and decodes in it; its weights are rounded so, and the
        fingerprint is another. On a CPU where float32 is faster, which is what it starts with, nothing changes. The
        README (Speed) says what changes elsewhere.
        """
        if self.device.type != "cpu" or bfloat16_is_faster():
            self.autoencoder.fast(torch.bfloat16)
        return self

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over config and float32 weights of what encodes: preprocessing, encoder, bottleneck.

        Two models with one fingerprint make the same of the same images; token stores and priors carry it.
        """
        return self.hash_of(self.config.identity(), self.weights(of_decoder=False))

    @property
    def decoder_fingerprint(self) -> str:
        """sha256 (hex) over config and float32 weights of the decoder, which may be fine-tuned by itself."""
        identity = self.config.identity()
        decodes = {key: identity[key] for key in ("autoencoder", "pixel_range") if key in identity}
        return self.hash_of(decodes, self.weights(of_decoder=True))

    def weights(self, of_decoder: bool) -> dict[str, Tensor]:
        """The tensors of the decoder, or those of everything else."""
        tensors = self.state_dict()
        return {key: tensors[key] for key in tensors if key.startswith("autoencoder.decoder.") == of_decoder}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
