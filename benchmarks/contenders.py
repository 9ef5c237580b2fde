"""What benchmarks/reconstruction.py compares: saved tokenizers, and picture codecs at one quality each.

A contender reconstructs batch after batch. `sums` is what it counted meanwhile, to be added up over the ranks; `row`
makes figures of the whole. Shapes: B pictures, C channels, S side in pixels, uint8 all of them.
"""

import copy
import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from diffusers_peer import DiffusersTokenizer, is_vq_model
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from PIL import Image, features
from recording import num_parameters
from torch import Tensor

from tokenizer import ImageTokenizer
from tokenizer.images import tensor_to_pil
from tokenizer.metrics import bits_per_pixel
from tokenizer.pretrained import CARD_NAME
from train.checkpoint import SETTINGS_NAME
from train.counting import LARGEST_WITH_USAGE, TOKENS_WITHOUT_USAGE, TokenCounts

ON_THE_CPU = "on the CPU"
NUM_REENCODED = 256  # pictures whose tokens are compared between precisions, batch sizes and devices
CODECS = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}}  # as small as the codec can, at any quality
QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)  # as Pillow numbers them
LADDERS = {"JPEG": QUALITIES, "WEBP": (0, *QUALITIES)}  # a JPEG of quality 0 is that of 1

Sums = dict[str, Tensor | TokenCounts]


class SavedTokenizer:
    """A tokenizer of a folder or a repo id, or diffusers' VQModel of a folder.

    Raises ValueError or FileNotFoundError where there is none.
    """

    def __init__(self, name: str, device: torch.device):
        self.name = name
        self.tokenizer = (DiffusersTokenizer if is_vq_model(name) else ImageTokenizer.from_pretrained)(name).to(device)
        if self.tokenizer.config.num_classes:
            raise ValueError(f"{name} must be told the class of each picture, and here pictures are all it is given")
        self.perceptual_loss = perceptual_loss_of(name)
        self.counts = TokenCounts(self.tokenizer.quantizer.num_codes)
        self.num_images, self.seconds = 0, {"encoded": 0.0, "decoded": 0.0}
        ways = [way for way in REENCODINGS if way != ON_THE_CPU or device.type != "cpu"]
        self.compared, self.changed = 0, dict.fromkeys(ways, 0)

    @property
    def channels(self) -> int:
        return self.tokenizer.config.image_channels

    def reconstruct(self, first: int, pictures: Tensor) -> Tensor:
        """decode(encode(pictures)), rounded to 8 bits; `first` is the number of the first picture."""
        if not self.num_images:
            self.tokenizer.decode(self.tokenizer.encode(pictures[:1]))  # the first call of a network prepares itself
        tokens = self.timed("encoded", self.tokenizer.encode, pictures)
        decoded = self.timed("decoded", self.tokenizer.decode, tokens)
        if not decoded.isfinite().all():
            raise ValueError(f"{self.name} decodes to NaN; its weights are spoilt: train or download it again")
        self.num_images += len(pictures)
        counted = tokens[: self.num_still_counted(first, tokens[0].numel())]
        height, width = (side // self.tokenizer.downsample_factor for side in pictures.shape[2:])
        self.counts.add(self.tokenizer.quantizer.code_numbers(counted, (height, width)))
        self.reencode(pictures[: max(0, NUM_REENCODED - first)], tokens)
        return (decoded * 255).round().to(torch.uint8)

    def num_still_counted(self, first: int, tokens_per_image: int) -> int | None:
        """From picture number `first` on, how many have their tokens counted; None: all of them.

        Codes that are too many for a usage are counted in so many of the first pictures as memory has room for.
        """
        if self.tokenizer.vocab_size <= LARGEST_WITH_USAGE:
            return None
        return max(0, TOKENS_WITHOUT_USAGE // tokens_per_image - first)

    def timed(self, what: str, convert: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """What `convert` makes of the inputs, on the CPU."""
        begun = time.perf_counter()
        made = convert(inputs).cpu()
        self.seconds[what] += time.perf_counter() - begun
        return made

    def reencode(self, pictures: Tensor, tokens: Tensor) -> None:
        """Count the tokens that come out otherwise in each of the other ways."""
        tokens = tokens[: len(pictures)]
        if not len(pictures):
            return
        self.compared += tokens.numel()
        for way in self.changed:
            self.changed[way] += (REENCODINGS[way](self.tokenizer, pictures).cpu() != tokens).sum().item()

    def sums(self) -> Sums:
        """What is added up over the ranks."""
        speeds = {f"{what}_per_second": self.num_images / (seconds or 1) for what, seconds in self.seconds.items()}
        figures = {"compared": self.compared, **self.changed, **speeds}
        return {"counts": self.counts} | {name: torch.tensor(value).double() for name, value in figures.items()}

    def row(self, sums: Sums, num_images: int, side: int) -> dict[str, object]:
        """The figures that need no judge, from the sums of all ranks."""
        tokenizer, size = self.tokenizer, (side, side)
        return {
            "name": self.name,
            "fingerprint": tokenizer.fingerprint,
            "decoder_fingerprint": tokenizer.decoder_fingerprint,
            "perceptual_loss": self.perceptual_loss,
            "parameters": num_parameters(tokenizer),
            "vocab_size": tokenizer.vocab_size,
            "bits_per_pixel": bits_per_pixel(tokenizer.vocab_size, tokenizer.tokens_per_image(side), size),
            **sums["counts"].figures(),
            "encoded_per_second": sums["encoded_per_second"].item(),
            "decoded_per_second": sums["decoded_per_second"].item(),
            "changed_tokens": {way: (sums[way] / sums["compared"]).item() for way in self.changed},
        }


def in_bf16(tokenizer: ImageTokenizer, pictures: Tensor) -> Tensor:
    """Tokens under bf16 autocast."""
    with torch.autocast(next(tokenizer.parameters()).device.type, torch.bfloat16):
        return tokenizer.encode(pictures)


def one_by_one(tokenizer: ImageTokenizer, pictures: Tensor) -> Tensor:
    """Tokens of batches of one."""
    return torch.cat([tokenizer.encode(picture) for picture in pictures.split(1)])


def on_the_cpu(tokenizer: ImageTokenizer, pictures: Tensor) -> Tensor:
    """Tokens of a copy on the CPU."""
    return copy.deepcopy(tokenizer).to("cpu").encode(pictures)


REENCODINGS = {"bf16": in_bf16, "one picture at a time": one_by_one, ON_THE_CPU: on_the_cpu}


def perceptual_loss_of(name: str) -> str | None:
    """The network by whose LPIPS a tokenizer was trained, None if by none; "unknown" where nobody has written it down.

    A run's folder has its settings in run.yaml, what was published has them in its model card.
    """
    settings = Path(name, SETTINGS_NAME)
    if settings.is_file():
        text = settings.read_text(encoding="utf-8")
    else:
        found = re.search(r"^## Settings\n\n```yaml\n(.*?)^```", card_of(name), re.M | re.S)
        text = found.group(1) if found else ""
    loss = (yaml.safe_load(text) or {}).get("loss")
    return loss.get("perceptual", "unknown") if loss else "unknown"


def card_of(name: str) -> str:
    """The model card of a folder or a repo id; empty where there is none."""
    path = Path(name, CARD_NAME)
    if not Path(name).is_dir():
        try:
            path = Path(hf_hub_download(name, CARD_NAME))
        except (HTTPError, EntryNotFoundError, OSError):
            return ""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


class Codec:
    """A codec of Pillow at one quality; its bits are those of whole files, headers and all."""

    def __init__(self, name: str, quality: int):
        self.name, self.quality, self.num_bytes = name, quality, 0

    def reconstruct(self, first: int, pictures: Tensor) -> Tensor:
        """The pictures stored and read again."""
        return torch.stack([self.stored(picture) for picture in pictures])

    def stored(self, picture: Tensor) -> Tensor:
        """One picture (C, S, S) stored and read again."""
        file, image = io.BytesIO(), tensor_to_pil(picture / 255)
        image.save(file, format=self.name, quality=self.quality, **CODECS[self.name])
        self.num_bytes += file.tell()
        decoded = np.array(Image.open(file).convert(image.mode))
        return torch.from_numpy(decoded.reshape(*picture.shape[1:], -1)).movedim(-1, 0)

    def sums(self) -> Sums:
        """What is added up over the ranks."""
        return {"bytes": torch.tensor(self.num_bytes)}

    def row(self, sums: Sums, num_images: int, side: int) -> dict[str, object]:
        """The figures that need no judge, from the sums of all ranks."""
        bits = 8 * sums["bytes"].item() / (num_images * side**2)
        return {"name": self.name, "quality": self.quality, "bits_per_pixel": bits}


def codec_versions() -> dict[str, str | None]:
    """The libraries that Pillow stores pictures by."""
    return {name: features.version(library) for name, library in (("JPEG", "libjpeg_turbo"), ("WEBP", "webp"))}
