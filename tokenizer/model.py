"""ImageTokenizer: images -> token grids -> images.

Shapes: B batch, C image channels, H W image sides in pixels, D codebook_dim, h w grid sides (H / downsample_factor).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .config import TokenizerConfig, build
from .image_model import ImageModel
from .images import Images
from .quantizers import QUANTIZERS, Quantizer

INTEGER_TYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)

USAGE = """
from PIL import Image
from tokenizer import ImageTokenizer

tokenizer = ImageTokenizer.from_pretrained("{source}")
tokens = tokenizer.encode(Image.open("picture.jpg"))  # int64 (1, h, w)
pictures = tokenizer.decode(tokens)  # float (1, C, H, W) in [0, 1]
"""


@dataclass
class TokenizerOutput:
    reconstructions: Tensor  # (B, C, H, W) float32 on the [0, 1] scale, not clamped
    tokens: Tensor  # (B, h, w) int64 in [0, vocab_size)
    losses: dict[str, Tensor]  # named scalars of the quantizer, already weighted


class ImageTokenizer(ImageModel):
    """VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937): encoder, quantizer and decoder, chosen by the config."""

    config_class = TokenizerConfig
    card_caption = "originals above, reconstructions below"
    card_tags: ClassVar[list[str]] = ["image-tokenizer", "vq-vae", "vector-quantization"]
    card_usage = USAGE

    def __init__(self, config: TokenizerConfig):
        super().__init__(config, config.codebook_dim)
        self.quantizer = build(QUANTIZERS, config.quantizer, config.codebook_dim)

    @property
    def bottleneck(self) -> Quantizer:
        return self.quantizer

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Float images (B, C, H, W) in [0, 1], sides divisible by the factor; values are not checked, for speed."""
        self.check_forward(images)
        quantized = self.quantizer(self.encode_latents(images))
        reconstructions = self.decode_latents(quantized.quantized)
        return TokenizerOutput(reconstructions, quantized.indices, quantized.losses)

    @torch.no_grad()
    def encode(self, images: Images, resize: int | Literal["config"] | None = "config") -> Tensor:
        """Images to tokens (B, h, w) int64 in [0, vocab_size), row-major, on the model's device.

        Takes a PIL image or a list of them, a uint8 array (H, W, C) or (B, H, W, C), or a tensor (C, H, W) or
        (B, C, H, W), uint8 or float in [0, 1]. PIL images are prepared as the config's `resize` says, or as the
        argument: the short side in pixels, then the centred square; None keeps the size and crops to a multiple of
        the factor. Arrays and tensors are never resized. Raises ValueError for anything else.
        """
        batch = self.prepared(images, resize)
        with self.evaluating():
            return self.quantizer(self.encode_latents(batch)).indices

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w), or (h, w) for one picture, to float32 images (B, C, H, W) in [0, 1].

        Raises ValueError for tokens that are not integers or lie outside [0, vocab_size).
        """
        with self.evaluating():
            return self.decode_latents(self.tokens_to_codes(tokens)).clamp(0, 1)

    def tokens_to_codes(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w), or (h, w) for one picture, to codes (B, D, h, w) float32; ValueError as in `decode`."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in INTEGER_TYPES:
            kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens of {kind}; the rule is an integer tensor (B, h, w), as encode returns it")
        if tokens.ndim not in (2, 3) or tokens.numel() == 0:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}; the rule is (B, h, w) or (h, w), none of them 0")
        tokens = tokens.to(torch.int64)
        low, high = (value.item() for value in torch.aminmax(tokens))
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"tokens run from {low} to {high}; they must lie in [0, {self.vocab_size})")
        grid = tokens if tokens.ndim == 3 else tokens[None]
        return self.quantizer.indices_to_codes(grid.to(self.device))

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; every token lies in [0, vocab_size)."""
        return self.quantizer.vocab_size

    def grids(self, image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """The (h, w) of each grid of tokens in order; one for a quantizer with a single scale."""
        return [self.grid_size(image_size)]

    def tokens_per_image(self, image_size: int | tuple[int, int]) -> int:
        """Number of tokens of an image of (H, W) pixels, or of a square one."""
        return sum(height * width for height, width in self.grids(image_size))
