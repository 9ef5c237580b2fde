"""Measure tokenizers beside picture codecs: accelerate launch benchmarks/reconstruction.py NAME [key=value ...].

Every tokenizer named reconstructs the same test pictures; JPEG and WebP store them at a ladder of qualities. Of each:
bits per pixel, PSNR, SSIM, MS-SSIM where the sides allow it and LPIPS, each a mean over pictures with the 95% interval
of a bootstrap; of tokenizers also rFID and distances in other features, usage and perplexity of the codes, speed, and
the share of tokens that another precision, batch size or device changes. Pictures are read a batch at a time, and dealt
out to the ranks. Writes results/reconstruction_NAME.json and .md (the table), docs/NAME_reconstructions.png (pictures,
reconstructions, errors) and docs/NAME_rate_distortion.png; --help prints the settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from comparison_sheet import NUM_SHOWN, save_comparison
from contenders import LADDERS, Codec, SavedTokenizer, Sums, codec_versions
from judges import Judges, Tally
from labelled_images import picture_batches
from rate_distortion import at_same_bits, plot
from recording import ROOT, command_line, launch_named, public_settings, record, refusals, tell
from tables import markdown, reconstruction_rows
from torch import Tensor

from tokenizer.distances import NUM_RESAMPLES
from tokenizer.metrics import SSIM_WINDOW
from tokenizer.pretrained import written_whole
from train.config import UserError
from train.cpu import tune_for_cpu
from train.settings import SMALLEST_PERCEPTUAL, SourceSettings, ThreadSettings, at_least_one, require
from train.sources import ImageSource, open_measured, reading

Contender = SavedTokenizer | Codec


@dataclass
class ReconstructionRun:
    """Settings of benchmarks/reconstruction.py NAME."""

    tokenizers: list[str] = field(default_factory=lambda: ["runs/vqvae"])  # folders or repo ids
    data: str = "uoft-cs/cifar10"  # as for train/vqvae.py
    named: str | None = None  # the Hub id of `data` where that is a path; stands in the record in its place
    split: str = "train"  # split that the tokenizers were trained on; held out from where there is no other
    eval_split: str | None = None  # split to measure on; default: validation, else test, else 2% held out of `split`
    streaming: bool = False  # read the data as it comes, never the whole of it on disk
    image_size: int = 32  # pixels; short sides are brought to it and the centred square cut out
    num_images: int = 50_000  # at most, the first ones
    codecs: bool = True  # JPEG and WebP beside the tokenizers
    perceptual: Literal["vgg", "alex", "squeeze"] | None = "alex"  # LPIPS by that network, downloaded when first used
    inception: bool = True  # rFID, by the standard Inception features, downloaded when first used
    mobilenet: str | None = None  # file of a MobileNetV2 (TensorFlow 2's weights, torchvision's names): its distances
    batch_size: int = 100  # pictures at once
    seed: int = 0  # of the bootstrap and of what is held out
    output_dir: str | None = None  # gets benchmarks/results/ and docs/; default: the repository of this file
    data_options: SourceSettings = field(default_factory=SourceSettings)
    speed: ThreadSettings = field(default_factory=ThreadSettings)

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size")
        require(self.num_images >= 2, f"num_images={self.num_images}", "be >= 2")
        smallest = max(SSIM_WINDOW, SMALLEST_PERCEPTUAL.get(self.perceptual, 1))
        require(self.image_size >= smallest, f"image_size={self.image_size}", f"be >= {smallest} for SSIM and LPIPS")

    def public(self) -> dict[str, object]:
        """The settings for the record: the data by its public name, of the judge's file its own, no folder of ours."""
        settings = public_settings(self)
        del settings["output_dir"]
        return settings | {"mobilenet": Path(self.mobilenet).name if self.mobilenet else None}


def main(name: str, config: ReconstructionRun) -> None:
    """Measure, and write the record, the table and the pictures."""
    root = Path(config.output_dir or ROOT)
    accelerator = Accelerator()
    tune_for_cpu(accelerator, config.speed)
    with accelerator.local_main_process_first(), refusals():  # it alone downloads
        judges = Judges(config.perceptual, config.inception, config.mobilenet, accelerator.device)
        tokenizers = open_tokenizers(config, accelerator.device)
        with reading(config.data):
            source = open_measured(config)
    codecs = [Codec(codec, quality) for codec, ladder in LADDERS.items() for quality in ladder if config.codecs]
    contenders = [*tokenizers, *codecs]
    pictures = batches(config, source, tokenizers[0].channels, accelerator)
    with refusals():
        tallies, reference, shown = measure(pictures, contenders, judges)
    gathered = [over_ranks(tally, each.sums()) for tally, each in zip(tallies, contenders, strict=True)]
    reference, _ = over_ranks(reference, {})
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    tell(f"distances and intervals over {reference.num_images} pictures")
    if not reference.num_images:
        raise UserError(f"data={config.data} has no picture to measure on; name a split that has: eval_split=...")
    with refusals():
        rows = [row_of(each, *of_each, reference, config) for each, of_each in zip(contenders, gathered, strict=True)]
    tokenizer_rows, codec_rows = rows[: len(tokenizers)], rows[len(tokenizers) :]
    for row in tokenizer_rows:
        row["codecs_at_the_same_bits"] = at_same_bits(row["bits_per_pixel"], codec_rows)
    save_comparison(root / "docs" / f"{name}_reconstructions.png", shown, rows)
    plot(root / "docs" / f"{name}_rate_distortion.png", rows)
    protocol = protocol_of(config, source, reference, judges) | {"ranks": accelerator.num_processes}
    figures = {"command": command_of(name, config), "protocol": protocol, "rows": rows}
    record(f"reconstruction_{name}", figures, root)
    table = markdown(reconstruction_rows(figures))
    with written_whole(root / "benchmarks" / "results" / f"reconstruction_{name}.md") as part:
        part.write_text(table + "\n")
    print(table)


def open_tokenizers(config: ReconstructionRun, device: torch.device) -> list[SavedTokenizer]:
    """The tokenizers; UserError unless all take the same pictures, ValueError where one does not take that size."""
    tokenizers = [SavedTokenizer(name, device) for name in config.tokenizers]
    if len({tokenizer.channels for tokenizer in tokenizers}) != 1:
        raise UserError(f"tokenizers={config.tokenizers} must be one or more, all for grey or all for colour pictures")
    for tokenizer in tokenizers:
        tokenizer.tokenizer.grid_size(config.image_size)
    return tokenizers


def batches(
    config: ReconstructionRun, source: ImageSource, channels: int, accelerator: Accelerator
) -> Iterator[tuple[int, Tensor]]:
    """This rank's batches, with the number of the first picture of each; UserError where they cannot be read."""
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    with reading(config.data):
        for first, batch in picture_batches(
            source, channels, config.image_size, config.num_images, config.batch_size, rank, num_ranks
        ):
            yield first, batch
            if accelerator.is_main_process:
                tell(f"{first + len(batch):,} pictures measured")


def measure(
    pictures: Iterator[tuple[int, Tensor]], contenders: list[Contender], judges: Judges
) -> tuple[list[Tally], Tally, list[Tensor]]:
    """A tally for each contender, one of the pictures themselves, and what the sheet shows.

    That is the first pictures and what became of them, uint8, on the main rank, which has the first batch.
    """
    tallies, reference, shown = [Tally() for _ in contenders], Tally(), []
    for first, batch in pictures:
        reference.add(first, {}, judges.features(batch))
        reference.add_hashes(first, batch)
        reconstructed = [contender.reconstruct(first, batch) for contender in contenders]
        for contender, tally, reconstructions in zip(contenders, tallies, reconstructed, strict=True):
            judged = judges.features(reconstructions) if isinstance(contender, SavedTokenizer) else {}
            tally.add(first, judges.scores(reconstructions, batch), judged)
        if first == 0:
            shown = [each[:NUM_SHOWN] for each in (batch, *reconstructed)]
    return tallies, reference, shown


def over_ranks(tally: Tally, sums: Sums) -> tuple[Tally, Sums]:
    """What all ranks kept and counted, on each of them."""
    parts = gather_object([(tally, sums)])
    total = {name: reduce(add, (each[name] for _, each in parts)) for name in sums}
    return Tally.of_all(part for part, _ in parts), total


def row_of(
    contender: Contender, tally: Tally, sums: Sums, reference: Tally, config: ReconstructionRun
) -> dict[str, Any]:
    """The figures of a contender."""
    row = contender.row(sums, reference.num_images, config.image_size)
    row |= tally.estimates(config.seed) | tally.distances(reference, config.seed)
    if config.perceptual and isinstance(contender, SavedTokenizer):
        seen = contender.perceptual_loss
        trained_on = "unknown" if seen == "unknown" else seen == config.perceptual
        row["lpips"] |= {"network": config.perceptual, "trained_on": trained_on}
    return row


def protocol_of(config: ReconstructionRun, source: ImageSource, reference: Tally, judges: Judges) -> dict[str, object]:
    """What the figures were measured with: pictures, how they were cut, judges."""
    split = str(source.rows.split or config.eval_split or "validation")  # the embedded photographs bear no name
    return {
        "settings": config.public(),
        "split": split if config.eval_split or split != config.split else f"held out of {split}, seed {config.seed}",
        "images": reference.num_images,
        "sha256": reference.content_hash(),
        "preparation": f"short side to {config.image_size} bicubic, antialiased, centred square, 8 bits",
        "value_range": "reconstructions clamped to [0, 1] and rounded to 8 bits, then both as float in [0, 1]",
        **judges.protocol(),
        "intervals": f"95%, bootstrap of the pictures, {NUM_RESAMPLES} times; a Frechet distance has none",
        "bits": "log2(vocab_size) a token; of codecs the whole file, headers and all",
        "codecs": codec_versions(),
    }


def command_of(name: str, config: ReconstructionRun) -> str:
    """The command that measures the same."""
    always = ("tokenizers", "data", "image_size")
    return command_line("reconstruction", name, config.public(), ReconstructionRun().public(), always)


if __name__ == "__main__":
    launch_named(main, ReconstructionRun, __doc__)
