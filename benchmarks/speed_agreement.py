"""What the fast mode changes: its tokens and pictures beside those of float32, on photographs, with trained weights.

Beside `fast()` stands the model in bfloat16 throughout, which keeps fewer tokens and draws their pixels more exactly,
and in float64, which tells what float32 itself rounds.
Shapes: N photographs, C channels, S side in pixels.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from labelled_images import content_hash, validation_pictures
from recording import ROOT, command_line, num_parameters, public_settings, refusals, tell
from stopwatch import check_device, four, record_speed
from torch import Tensor

from tokenizer import ImageTokenizer
from train.settings import PHOTOGRAPHS, SourceSettings, at_least_one, require

MODES = {"fast": "fast", "bfloat16": "bfloat16", "float64": "double"}  # beside float32, and what makes a model so


@dataclass
class AgreementRun:
    """Settings of benchmarks/speed.py agreement."""

    tokenizers: list[str] = field(default_factory=lambda: ["runs/vqvae"])  # folders or repo ids, without classes
    data: str = PHOTOGRAPHS  # embedded ones; or as for train/vqvae.py
    named: str | None = None  # the Hub id of `data` where that is a path; stands in the record in its place
    split: str = "train"  # split that the tokenizers were trained on
    eval_split: str | None = None  # split of the photographs; default: validation, else test, else a seeded 2% held out
    image_size: int = 128  # S, pixels; short sides are brought to it
    images: int = 500  # N at most
    threads: int = 1
    device: str = "cpu"
    data_options: SourceSettings = field(default_factory=SourceSettings)

    streaming: ClassVar[bool] = False  # the photographs are held in memory
    seed: ClassVar[int] = 0  # nothing is random

    def __post_init__(self) -> None:
        at_least_one(self, "image_size", "images", "threads")
        check_device(self.device)
        require(bool(self.tokenizers), "tokenizers=[]", "name at least one")


def main(config: AgreementRun, root: Path = ROOT) -> None:
    """Measure every tokenizer and write results/speed_agreement.json under `root`."""
    torch.set_num_threads(config.threads)
    rows = []
    for name in config.tokenizers:
        tell(name)
        with refusals():
            tokenizer = ImageTokenizer.from_pretrained(name).to(config.device)
            tokenizer.grid_size(config.image_size)
        require(not tokenizer.config.num_classes, f"tokenizers={name}", "be models without classes")
        photographs = validation_pictures(config, tokenizer.config.image_channels, config.image_size, config.images)
        rows.append({"tokenizer": Path(name).name, **row_of(tokenizer, photographs)})
    settings = public_settings(config)
    command = command_line("speed", "agreement", settings, public_settings(AgreementRun()), ("tokenizers", "data"))
    record_speed("agreement", {"command": command, "settings": settings, "rows": rows}, root)


@torch.no_grad()
def row_of(tokenizer: ImageTokenizer, photographs: Tensor) -> dict[str, Any]:
    """Everything measured of one tokenizer on photographs (N, C, S, S) uint8."""
    tokens = tokenizer.encode(photographs)
    pictures = tokenizer.decode(tokens)
    row = {
        "fingerprint": tokenizer.fingerprint,
        "parameters": num_parameters(tokenizer),
        "codes": tokenizer.vocab_size,
        "images": len(photographs),
        "photographs_sha256": content_hash(photographs),
        "tokens": tokens.numel(),
        "difference_from_photographs": in_levels(pictures - photographs / 255),
    }
    for name, change in MODES.items():
        other = getattr(deepcopy(tokenizer), change)()
        row[name] = {
            "tokens_that_agree": four((other.encode(photographs) == tokens).double().mean().item()),
            "difference_of_pixels": in_levels(other.decode(tokens) - pictures),
        }
    return row


def in_levels(differences: Tensor) -> float:
    """The mean size of differences of pixels in [0, 1], in levels of 256."""
    return four(255 * differences.abs().mean().item())
