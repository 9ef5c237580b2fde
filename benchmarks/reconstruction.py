"""Measure tokenizers beside picture codecs: python benchmarks/reconstruction.py NAME [key=value ...].

Every tokenizer named reconstructs the same test pictures; JPEG and WebP store them at a ladder of qualities. Of each:
bits per pixel, PSNR, SSIM, MS-SSIM where the sides allow it and LPIPS, each a mean over pictures with the 95% interval
of a bootstrap; of tokenizers also usage and perplexity of the codes, speed, and the share of tokens that another
precision or batch size changes. Writes results/reconstruction_NAME.json, docs/NAME_reconstructions.png (pictures,
reconstructions, errors) and docs/NAME_rate_distortion.png; --help prints the settings.
"""

import io
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from labelled_images import content_hash, read_pictures
from PIL import Image
from rate_distortion import at_same_bits, plot
from recording import ROOT, command_line, num_parameters, record, refusals, tell
from torch import Tensor

from tokenizer import ImageTokenizer
from tokenizer.images import tensor_to_pil
from tokenizer.metrics import MS_SSIM_WEIGHTS, SSIM_WINDOW, bits_per_pixel, ms_ssim, perplexity, psnr, ssim, usage
from train.config import UserError, launch
from train.features import PerceptualDistance, weights_hash
from train.progress import save_sheet
from train.settings import SMALLEST_PERCEPTUAL, SourceSettings, at_least_one, require
from train.sources import open_splits, reading

QUALITIES = (1, 5, 10, 20, 35, 50, 65, 80, 90, 95)  # of a codec, as Pillow numbers them
NUM_RESAMPLES = 1000  # of the bootstrap
NUM_SHOWN = 8  # pictures on the sheet
ERROR_GAIN = 4  # of the errors on the sheet, around grey
NUM_REENCODED = 256  # pictures whose tokens are compared between precisions and batch sizes

Scores = dict[str, Tensor]  # one value per picture (N,), by the measure's name
Judge = Callable[[Tensor, Tensor], Scores]  # of uint8 reconstructions and pictures (B, C, S, S)


@dataclass
class ReconstructionRun:
    """Settings of benchmarks/reconstruction.py."""

    tokenizers: list[str] = field(default_factory=lambda: ["runs/vqvae"])  # folders or repo ids
    data: str = "uoft-cs/cifar10"  # as for train/vqvae.py
    named: str | None = None  # the Hub id of `data` where that is a path; stands in the record in its place
    split: str = "train"  # split that the tokenizers were trained on; held out from where there is no other
    eval_split: str | None = None  # split to measure on; default: validation, else test, else a seeded 2% held out
    image_size: int = 32  # pixels; short sides are brought to it and the centred square cut out
    num_images: int = 10_000  # at most, the first ones
    codecs: bool = True  # JPEG and WebP beside the tokenizers
    perceptual: Literal["vgg", "alex", "squeeze"] | None = "alex"  # LPIPS by that network, downloaded when first used
    batch_size: int = 100  # pictures at once
    seed: int = 0  # of the bootstrap and of what is held out
    data_options: SourceSettings = field(default_factory=SourceSettings)

    streaming: ClassVar[bool] = False  # all pictures are held in memory

    def __post_init__(self) -> None:
        at_least_one(self, "num_images", "batch_size")
        smallest = max(SSIM_WINDOW, SMALLEST_PERCEPTUAL.get(self.perceptual, 1))
        require(self.image_size >= smallest, f"image_size={self.image_size}", f"be >= {smallest} for SSIM and LPIPS")

    def public(self) -> dict[str, object]:
        """The settings for the record, the data by its public name."""
        settings = asdict(self)
        return settings | {"data": settings.pop("named") or self.data}


def main(name: str, config: ReconstructionRun, root: Path = ROOT) -> None:
    """Measure, and write the record and the pictures into their folders under `root`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    perceptual = PerceptualDistance(config.perceptual).to(device) if config.perceptual else None
    with refusals():
        tokenizers = {path: ImageTokenizer.from_pretrained(path).to(device) for path in config.tokenizers}
    channels = {tokenizer.config.image_channels for tokenizer in tokenizers.values()}
    if len(channels) != 1:
        raise UserError(f"tokenizers={config.tokenizers} must be one or more, all for grey or all for colour pictures")
    tell(f"reading {config.data}")
    with reading(config.data):
        pictures = read_pictures(open_splits(config)[1], channels.pop(), config.image_size, config.num_images)

    judge = partial(scores_of, perceptual, device)
    rows, shown = [], [[*(pictures[:NUM_SHOWN] / 255)]]
    for path, tokenizer in tokenizers.items():
        tell(f"measuring {path}")
        with refusals():
            row, reconstructions = measured_tokenizer(path, tokenizer, pictures, judge, config)
        rows.append(row)
        shown += sheet_rows(pictures[:NUM_SHOWN], reconstructions[:NUM_SHOWN])
    for codec in ("JPEG", "WEBP") if config.codecs else ():
        tell(f"measuring {codec}")
        rows += [measured_codec(codec, quality, pictures, judge, config) for quality in QUALITIES]
    for row in rows[: len(tokenizers)]:
        row["codecs_at_the_same_bits"] = at_same_bits(row["bits_per_pixel"], rows[len(tokenizers) :])
    save_sheet(root / "docs" / f"{name}_reconstructions.png", shown)
    plot(root / "docs" / f"{name}_rate_distortion.png", rows)
    protocol = protocol_of(config, pictures, perceptual)
    figures = {"command": command_of(name, config), "protocol": protocol, "rows": rows}
    record(f"reconstruction_{name}", figures, root)


def measured_tokenizer(
    path: str, tokenizer: ImageTokenizer, pictures: Tensor, judge: Judge, config: ReconstructionRun
) -> tuple[dict[str, object], Tensor]:
    """The row of a tokenizer, and its reconstructions, uint8 (N, C, S, S)."""
    tokens, encoded_per_second = timed(tokenizer.encode, pictures, config.batch_size)
    decoded, decoded_per_second = timed(tokenizer.decode, tokens, config.batch_size)
    reconstructions = (decoded * 255).round().to(torch.uint8)
    counts = torch.bincount(tokens.flatten(), minlength=tokenizer.vocab_size)
    side = pictures.shape[-1]
    row = {
        "name": path,
        "fingerprint": tokenizer.fingerprint,
        "decoder_fingerprint": tokenizer.decoder_fingerprint,
        "parameters": num_parameters(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "bits_per_pixel": bits_per_pixel(tokenizer.vocab_size, tokens[0].numel(), (side, side)),
        **summary(judged(judge, reconstructions, pictures, config.batch_size), config.seed),
        "usage": usage(counts),
        "perplexity": perplexity(counts),
        "tokens_per_code": counts.sum().item() / tokenizer.vocab_size,
        "encoded_per_second": encoded_per_second,
        "decoded_per_second": decoded_per_second,
        "changed_tokens": changed_tokens(tokenizer, pictures[:NUM_REENCODED], tokens[:NUM_REENCODED]),
    }
    return row, reconstructions


def timed(convert: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """What `convert` makes of the inputs, a batch at a time, on the CPU, and how many it makes a second."""
    convert(inputs[:1])  # the first call of a network prepares itself
    begun = time.perf_counter()
    made = torch.cat([convert(part).cpu() for part in inputs.split(batch_size)])
    return made, len(inputs) / (time.perf_counter() - begun)


def changed_tokens(tokenizer: ImageTokenizer, pictures: Tensor, tokens: Tensor) -> dict[str, float]:
    """Share of the tokens that come out otherwise under bf16 autocast, one picture at a time, and on the CPU."""
    device = next(tokenizer.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        other = {"bf16": tokenizer.encode(pictures).cpu()}
    other["one picture at a time"] = torch.cat([tokenizer.encode(picture).cpu() for picture in pictures.split(1)])
    if device.type != "cpu":
        other["on the CPU"] = tokenizer.to("cpu").encode(pictures)
        tokenizer.to(device)
    return {what: (each != tokens).double().mean().item() for what, each in other.items()}


def measured_codec(
    codec: str, quality: int, pictures: Tensor, judge: Judge, config: ReconstructionRun
) -> dict[str, object]:
    """The row of a codec at one quality; the bits are those of whole files, headers and all."""
    num_bytes, decoded = 0, []
    for picture in pictures:
        file = io.BytesIO()
        image = tensor_to_pil(picture / 255)
        image.save(file, format=codec, quality=quality, **({"method": 6} if codec == "WEBP" else {"optimize": True}))
        num_bytes += file.tell()
        decoded.append(np.asarray(Image.open(file).convert(image.mode)).reshape(*picture.shape[1:], -1))
    reconstructions = torch.from_numpy(np.stack(decoded)).movedim(-1, 1)
    bits = 8 * num_bytes / (len(pictures) * pictures.shape[-1] ** 2)
    scores = judged(judge, reconstructions, pictures, config.batch_size)
    return {"name": codec, "quality": quality, "bits_per_pixel": bits, **summary(scores, config.seed)}


def judged(judge: Judge, reconstructions: Tensor, pictures: Tensor, batch_size: int) -> Scores:
    """The scores of all pictures, measured a batch at a time."""
    pairs = zip(reconstructions.split(batch_size), pictures.split(batch_size), strict=True)
    batches = [judge(*pair) for pair in pairs]
    return {measure: torch.cat([batch[measure] for batch in batches]) for measure in batches[0]}


@torch.no_grad()
def scores_of(
    perceptual: PerceptualDistance | None, device: torch.device, reconstructions: Tensor, pictures: Tensor
) -> Scores:
    """Every measure that the pictures allow, of uint8 reconstructions and pictures (B, C, S, S)."""
    pair = [batch.to(device).float() / 255 for batch in (reconstructions, pictures)]
    scores = {"psnr": psnr(*pair), "ssim": ssim(*pair)}
    if pictures.shape[-1] >= SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1):
        scores["ms_ssim"] = ms_ssim(*pair)
    if perceptual is not None:
        scores["lpips"] = perceptual(*pair)
    return {measure: values.double().cpu() for measure, values in scores.items()}


def summary(scores: Scores, seed: int) -> dict[str, dict[str, float]]:
    """Mean of each measure over the pictures, and the ends of its 95% interval (bootstrap of the pictures)."""
    return {measure: interval(values, seed) for measure, values in scores.items()}


def interval(values: Tensor, seed: int) -> dict[str, float]:
    """Mean of (N,) values, and the 2.5% and 97.5% quantiles of the means of resampled values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(NUM_RESAMPLES))
    means = torch.stack([values[each].mean() for each in drawn])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return {"mean": values.mean().item(), "low": low, "high": high}


def sheet_rows(pictures: Tensor, reconstructions: Tensor) -> list[list[Tensor]]:
    """Two rows of the sheet: reconstructions, and their errors around grey."""
    errors = 0.5 + ERROR_GAIN * (reconstructions.float() - pictures.float()) / 255
    return [[*(reconstructions / 255)], [*errors.clamp(0, 1)]]


def protocol_of(
    config: ReconstructionRun, pictures: Tensor, perceptual: PerceptualDistance | None
) -> dict[str, object]:
    """What the figures were measured with: pictures, how they were cut, judges."""
    return {
        "settings": config.public(),
        "images": len(pictures),
        "sha256": content_hash(pictures),
        "preparation": f"short side to {config.image_size} bicubic, centred square, 8 bits",
        "value_range": "reconstructions clamped to [0, 1] and rounded to 8 bits, then both as float in [0, 1]",
        "lpips": None if perceptual is None else {"network": config.perceptual, "sha256": weights_hash(perceptual)},
        "intervals": f"95%, bootstrap of the pictures, {NUM_RESAMPLES} times",
        "bits": "log2(vocab_size) a token; of codecs the whole file, headers and all",
    }


def command_of(name: str, config: ReconstructionRun) -> str:
    """The command that measures the same."""
    always = ("tokenizers", "data", "image_size")
    return command_line("reconstruction", name, config.public(), ReconstructionRun().public(), always)


if __name__ == "__main__":
    if "--help" not in sys.argv and (len(sys.argv) < 2 or "=" in sys.argv[1]):
        sys.exit(__doc__)
    name = "" if "--help" in sys.argv else sys.argv.pop(1)
    launch(partial(main, name), ReconstructionRun)
