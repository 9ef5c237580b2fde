"""A `VQModel` of diffusers as something that reads and writes tokens, to be measured as ours are.

diffusers' class returns latents and no tokens; here its own search and its own decoder are asked for them.
Shapes: B batch, C channels, H W image sides, h w grid sides.
"""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

CONFIG_NAME = "config.json"
CLASS_NAME = "VQModel"  # as its config.json says


def is_vq_model(folder: str) -> bool:
    """Whether a folder holds a VQModel as diffusers saves it."""
    path = Path(folder, CONFIG_NAME)
    return path.is_file() and json.loads(path.read_text()).get("_class_name") == CLASS_NAME


class DiffusersTokenizer(nn.Module):
    """The doors of ImageTokenizer that a measurement goes through, on a folder of diffusers' VQModel.

    Pixels are in [0, 1], as in diffusers' training example; its config does not say.
    """

    def __init__(self, folder: str):
        super().__init__()
        from diffusers import VQModel  # an extra: only those who measure it need it

        self.model = VQModel.from_pretrained(folder).eval()
        self.vocab_size = self.model.config.num_vq_embeddings
        self.downsample_factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        self.config = SimpleNamespace(image_channels=self.model.config.in_channels, num_classes=0)
        self.quantizer = SimpleNamespace(num_codes=self.vocab_size, code_numbers=lambda tokens, grid_size: tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) to tokens (B, h, w) int64."""
        latents = self.model.encode(images.to(self.device).float() / 255).latents
        _, _, (_, _, indices) = self.model.quantize(latents)
        return indices.view(len(images), *latents.shape[2:])

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w) to images (B, C, H, W) in [0, 1]."""
        codes = self.model.quantize.embedding(tokens.to(self.device)).movedim(-1, 1)
        return self.model.decode(codes, force_not_quantize=True).sample.float().clamp(0, 1)

    def grid_size(self, image_size: int) -> tuple[int, int]:
        """(h, w) of the grid of a square image of so many pixels a side; ValueError where it does not divide."""
        if image_size % self.downsample_factor:
            raise ValueError(f"image_size={image_size} must be a multiple of {self.downsample_factor}")
        return (image_size // self.downsample_factor,) * 2

    def tokens_per_image(self, image_size: int) -> int:
        """Number of tokens of a square image of so many pixels a side."""
        return math.prod(self.grid_size(image_size))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the weights of encoder and codebook."""
        return self.hash_of(("encoder.", "quant_conv.", "quantize."))

    @property
    def decoder_fingerprint(self) -> str:
        """sha256 (hex) over the other weights."""
        return self.hash_of(("decoder.", "post_quant_conv."))

    def hash_of(self, prefixes: tuple[str, ...]) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            if name.startswith(prefixes):
                digest.update(name.encode() + value.float().contiguous().numpy(force=True).tobytes())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
