"""ImageTokenizer: images -> token grids -> images.

Shapes: B batch, C image channels, H W image sides in pixels, D codebook_dim, h w grid sides (H / downsample_factor).
Tokens are (B, h, w), (B, h, w, q) or (B, L), as tokens.py says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from .choices import build
from .config import TokenizerConfig
from .diffusers_format import read_config, read_weights
from .image_model import ImageModel
from .images import Images
from .labels import Labels
from .quantizers import QUANTIZERS, Quantizer
from .tokens import checked_tokens, grid_of, num_places, rule_of, token_shape
from .unfilled import unfilled

USAGE = """
from PIL import Image
from tokenizer import ImageTokenizer

tokenizer = ImageTokenizer.from_pretrained("{source}")
tokens = tokenizer.encode(Image.open("picture.jpg")RESIZELABELS)  # int64 SHAPE
pictures = tokenizer.decode(tokensLABELS)  # float (1, C, H, W) in [0, 1]
"""


@dataclass
class TokenizerOutput:
    reconstructions: Tensor  # (B, C, H, W) float32 on the [0, 1] scale, not clamped
    tokens: Tensor  # (B, h, w), (B, h, w, q) or (B, L), int64 in [0, vocab_size)
    losses: dict[str, Tensor]  # named scalars of the quantizer, already weighted


class ImageTokenizer(ImageModel):
    """VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937): encoder, quantizer and decoder, chosen by the config.

    With `num_classes` encoder and decoder are told the class of each image, `labels` (B,), or one number for all.
    """

    config_class = TokenizerConfig
    card_caption = "originals above, reconstructions below"
    card_tags: ClassVar[list[str]] = ["image-tokenizer", "vq-vae", "vector-quantization"]

    def __init__(self, config: TokenizerConfig):
        super().__init__(config, config.codebook_dim)
        self.quantizer = build(QUANTIZERS, config.quantizer, config.codebook_dim)

    @classmethod
    def from_diffusers(cls, folder: str | Path, pixel_range: Sequence[float]) -> Self:
        """diffusers' `VQModel` from its folder (config.json, diffusion_pytorch_model.safetensors), in eval mode.

        Its files do not say what black and white are, so `pixel_range` does: (-1, 1) for models that come from taming
        and latent diffusion, (0, 1) for aMUSEd's and those of diffusers' own training example. Tokens are then those
        of its quantizer, pictures those of its decoder, and the losses in training those of its class.
        Raises FileNotFoundError where a file is missing, ValueError for another class, another architecture than ours
        or tensors that do not fit.
        """
        folder = Path(folder)
        config = read_config(folder, pixel_range)
        model = unfilled(lambda: cls(config))
        return model.with_weights(read_weights(folder, config, model.state_dict()))

    @property
    def bottleneck(self) -> Quantizer:
        return self.quantizer

    def forward(self, images: Tensor, labels: Labels | None = None) -> TokenizerOutput:
        """Float images (B, C, H, W) in [0, 1], sides divisible by the factor; values are not checked, for speed."""
        self.check_forward(images)
        classes = self.classes(labels, len(images))
        quantized = self.quantizer(self.encode_latents(images, classes))
        reconstructions = self.decode_latents(quantized.quantized, classes)
        return TokenizerOutput(reconstructions, quantized.indices, quantized.losses)

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        resize: int | Literal["config"] | None = "config",
        labels: Labels | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """Images to tokens int64 in [0, vocab_size), on the model's device.

        They are (B, h, w), row-major; (B, h, w, q) with q codebooks at each place; (B, L) where the grids differ in
        size, one after another as `grids` lists them.

        Takes a PIL image or a list of them, a uint8 array (H, W, C) or (B, H, W, C), or a tensor (C, H, W) or
        (B, C, H, W), uint8 or float in [0, 1]. PIL images are prepared as the config's `resize` says, or as the
        argument: the short side in pixels, then the centred square; None keeps the size and crops to a multiple of
        the factor. Arrays and tensors are never resized, to ask for it is an error. A conditional model needs `labels`
        (B,), an unconditional one refuses them. Raises ValueError for anything else.

        With `tile_size` a large picture is encoded in squares of so many pixels a side, of which neighbours share
        `tile_overlap` or more, by default a quarter: memory no longer grows with the network's layers times the
        picture. tiles.py says how near that is to the picture as a whole.
        """
        tiles = self.tiles(tile_size, tile_overlap)
        batch = self.prepared(images, resize)
        classes = self.classes(labels, len(batch))
        with self.evaluating():
            return self.quantizer(self.encode_latents(batch, classes, tiles)).indices

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        image_size: int | tuple[int, int] | None = None,
        labels: Labels | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
    ) -> Tensor:
        """Tokens as `encode` gives them, or those of one picture, to float32 images (B, C, H, W) in [0, 1].

        `image_size` (H, W) in pixels, or the side of a square, is needed for tokens (B, L) of pictures that are no
        squares. From coarse to fine a part decodes too: the first codebooks (B, h, w, k), or with `image_size` the
        first scales. A conditional model needs `labels` (B,), of the same class or another. Raises ValueError for
        tokens that are not integers, lie outside [0, vocab_size) or are no grid.

        With `tile_size` a large picture is decoded in tiles, as `encode` says, whatever it was encoded in.
        """
        tiles = self.tiles(tile_size, tile_overlap)
        with self.evaluating():
            codes = self.tokens_to_codes(tokens, image_size)
            return self.decode_latents(codes, self.classes(labels, len(codes)), tiles).clamp_(0, 1)

    def tokens_to_codes(self, tokens: Tensor, image_size: int | tuple[int, int] | None = None) -> Tensor:
        """Tokens to codes (B, D, h, w) float32; arguments and ValueError as in `decode`."""
        tokens = checked_tokens(tokens, self.quantizer)
        given = None if image_size is None else self.grid_size(image_size)
        grid_size = grid_of(tokens, self.quantizer, given)
        if self.quantizer.multiscale:
            return self.quantizer.indices_to_codes(tokens.to(self.device), grid_size)
        return self.quantizer.indices_to_codes(tokens.to(self.device))

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; every token lies in [0, vocab_size)."""
        return self.quantizer.vocab_size

    @property
    def num_codebooks(self) -> int:
        """Tokens at each place of a grid; above 1 they are the last axis."""
        return self.quantizer.num_codebooks

    def grids(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """The (h, w) of each grid of tokens in order; one for a quantizer with a single scale."""
        return self.quantizer.grids(*self.grid_size(image_size))

    def tokens_per_image(self, image_size: int | tuple[int, int]) -> int:
        """Number of tokens of an image of (H, W) pixels, or of a square one."""
        return num_places(self.quantizer, self.grid_size(image_size)) * self.num_codebooks

    def token_shape(self, image_size: int | tuple[int, int]) -> tuple[int, ...]:
        """The shape of the tokens of one image of (H, W) pixels, or of a square one: (h, w), (h, w, q) or (L,)."""
        return token_shape(self.quantizer, self.grid_size(image_size))

    @property
    def card_usage(self) -> str:
        # Of a square, since from tokens (B, L) alone no other size can be told.
        square = f", resize={16 * self.downsample_factor}" if self.quantizer.multiscale else ""
        usage = USAGE.replace("RESIZE", square).replace("SHAPE", rule_of(self.quantizer).replace("B", "1"))
        return usage.replace("LABELS", ", labels=0" if self.config.num_classes else "")
