"""Judge what a class-conditional prior draws by a classifier: python benchmarks/generation.py NAME [key=value ...].

Draws `num_samples` pictures, as many of each class, and measures, on data with classes:
- recognised: how many of the first 100 of each class get that class from a classifier trained on real pictures;
- classification accuracy score (Ravuri and Vinyals 2019, arXiv:1905.10887): the accuracy on real test pictures of the
  same classifier trained on the samples alone, beside training on as many real pictures and on their reconstructions;
- neighbours: how near the samples are to training pictures, beside test pictures and their reconstructions.
Writes results/generation_NAME.json and docs/NAME_samples.png, docs/NAME_neighbours.png; --help prints the settings.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from classifier import DESCRIPTION, Classifier, accuracy, predict, train_classifier
from labelled_images import LabelledImages, read_images
from neighbours import distances_of, nearest
from recording import ROOT, command_line, launch_named, num_parameters, public_settings, record, refusals, tell
from torch import Tensor

from prior import AutoregressivePrior
from tokenizer import ImageTokenizer
from train.config import UserError
from train.progress import save_sheet
from train.settings import SourceSettings, at_least_one, require
from train.sources import open_splits, reading

RECOGNISED_PER_CLASS = 100  # samples of each class that the classifier is shown
NUM_COMPARED = 1000  # samples, and test pictures, whose nearest training picture is sought
SHEET_SIDE = 10  # classes, and samples of each; and samples above their neighbours
NUM_NEIGHBOURS = 5


@dataclass
class GenerationRun:
    """Settings of benchmarks/generation.py NAME."""

    prior: str = "runs/prior"  # folder or repo id of a prior with classes
    tokenizer: str = "runs/vqvae"  # folder or repo id of its tokenizer
    data: str = "ylecun/mnist"  # what the prior was trained on, with classes; as for train/vqvae.py
    named: str | None = None  # the Hub id of `data` where that is a path; stands in the record in its place
    split: str = "train"  # split that the prior was trained on
    eval_split: str | None = None  # split to test on; default: validation, else test, else a seeded 2% held out
    num_samples: int = 10_000  # a multiple of the number of classes
    temperature: float = 1.0  # 1: the model's own distribution
    top_k: int | None = None  # most likely tokens that are kept
    top_p: float | None = None  # share of the probability that is kept
    guidance_scale: float = 1.0  # 1: no guidance
    batch_size: int = 250  # grids drawn, and pictures decoded, at once
    classifier_steps: int = 1000  # batches of 128
    seed: int = 0  # of everything random
    data_options: SourceSettings = field(default_factory=SourceSettings)

    streaming: ClassVar[bool] = False  # all pictures are held in memory

    def __post_init__(self) -> None:
        at_least_one(self, "num_samples", "batch_size")
        require(self.classifier_steps >= 2, f"classifier_steps={self.classifier_steps}", "be >= 2")


def main(name: str, config: GenerationRun, root: Path = ROOT) -> None:
    """Measure, and write the record and the pictures into their folders under `root`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prior, tokenizer = load_models(config, device)
    class_names, train, test = load_data(config, prior, tokenizer)
    protocol = protocol_of(config, prior, tokenizer, train, test)
    train, test = train.shuffled(config.seed), test.shuffled(config.seed)
    tell(f"drawing {config.num_samples} samples")
    samples, speed = draw(prior, tokenizer, config)
    draw_sheets(root / "docs", name, samples, train, len(class_names))
    tell("reconstructing real pictures")
    rebuilt = reconstructed(tokenizer, train[: config.num_samples], config), reconstructed(tokenizer, test, config)
    figures = {
        "command": command_of(name, config),
        "protocol": protocol,
        **classified(config, class_names, samples, train, test, *rebuilt, device),
        "neighbours": neighbours(samples, train, test, rebuilt[1]),
        **speed,
    }
    record(f"generation_{name}", figures, root)


def load_models(config: GenerationRun, device: torch.device) -> tuple[AutoregressivePrior, ImageTokenizer]:
    """The two models; UserError where they do not belong together or the settings ask what they cannot."""
    with refusals():
        prior = AutoregressivePrior.from_pretrained(config.prior).to(device)
        tokenizer = ImageTokenizer.from_pretrained(config.tokenizer).to(device)
        prior.check_tokenizer(tokenizer.fingerprint)
    num_classes, (height, width) = prior.config.num_classes, prior.config.grid_size
    if not num_classes:
        raise UserError(f"prior={config.prior} has no classes, and what it draws is judged by its class")
    if height != width:
        raise UserError(f"prior={config.prior} draws grids of {height} x {width}, and only squares are measured here")
    if config.num_samples % num_classes:
        raise UserError(f"num_samples={config.num_samples} must be a multiple of the prior's {num_classes} classes")
    return prior, tokenizer


def load_data(
    config: GenerationRun, prior: AutoregressivePrior, tokenizer: ImageTokenizer
) -> tuple[list[str], LabelledImages, LabelledImages]:
    """The names of the classes, the training and the test pictures; UserError where the prior has other classes."""
    tell(f"reading {config.data}")
    sources = open_splits(config)
    class_names = sources[0].class_names
    if class_names is None or len(class_names) != prior.config.num_classes:
        found = f"{len(class_names)} classes" if class_names else "no column of classes"
        raise UserError(f"data={config.data} has {found} and the prior {prior.config.num_classes}; give its own data")
    for found, known in zip(class_names, prior.config.class_names, strict=False):  # no names: nothing to compare
        if found != known:
            told = f"a class {found!r} where the prior has {known!r}"
            raise UserError(f"data={config.data} has {told}; give its own data")
    side = prior.config.grid_size[0] * tokenizer.downsample_factor
    with reading(config.data):
        train, test = (read_images(source, tokenizer.config.image_channels, side) for source in sources)
    return class_names, train, test


def draw(
    prior: AutoregressivePrior, tokenizer: ImageTokenizer, config: GenerationRun
) -> tuple[LabelledImages, dict[str, float]]:
    """Samples of class 0, 1, ..., 0, 1, ... and how many are made a second, tokens alone and with their pictures."""
    labels = torch.arange(config.num_samples) % prior.config.num_classes
    settings = {key: getattr(config, key) for key in ("temperature", "top_k", "top_p", "guidance_scale", "batch_size")}
    generator = torch.Generator().manual_seed(config.seed)
    begun = time.perf_counter()
    with refusals():
        tokens = prior.generate(labels, **settings, generator=generator, progress=True)
    tokens = tokens.cpu()  # waits for the device
    drawn = time.perf_counter()
    pixels = in_batches(lambda part, told: tokenizer.decode(part, labels=told), tokens, labels, tokenizer, config)
    ended = time.perf_counter()
    speed = {
        "tokens_per_second": tokens.numel() / (drawn - begun),
        "samples_per_second": len(labels) / (ended - begun),
    }
    return LabelledImages(pixels, labels), speed


def in_batches(
    make_pictures: Callable[[Tensor, Tensor | None], Tensor],
    inputs: Tensor,
    labels: Tensor,
    tokenizer: ImageTokenizer,
    config: GenerationRun,
) -> Tensor:
    """Pictures in [0, 1], made a batch at a time, as uint8 (N, C, S, S) on the CPU; a conditional tokenizer is told.

    That is the labels (N,), a batch beside that of the inputs.
    """
    parts = zip(inputs.split(config.batch_size), labels.split(config.batch_size), strict=True)
    made = (make_pictures(part, told if tokenizer.config.num_classes else None) for part, told in parts)
    return torch.cat([(pictures * 255).round().to(torch.uint8).cpu() for pictures in made])


def reconstructed(tokenizer: ImageTokenizer, images: LabelledImages, config: GenerationRun) -> LabelledImages:
    """The pictures after decode(encode(picture)), with their classes."""

    def rebuild(pixels: Tensor, labels: Tensor | None) -> Tensor:
        return tokenizer.decode(tokenizer.encode(pixels, labels=labels), labels=labels)

    return LabelledImages(in_batches(rebuild, images.pixels, images.labels, tokenizer, config), images.labels)


def classified(
    config: GenerationRun,
    class_names: list[str],
    samples: LabelledImages,
    train: LabelledImages,
    test: LabelledImages,
    train_rebuilt: LabelledImages,
    test_rebuilt: LabelledImages,
    device: torch.device,
) -> dict[str, object]:
    """What classifiers say: one trained on all real pictures, and three on as many pictures as there are samples."""
    num_classes = len(class_names)

    def trained_on(what: str, images: LabelledImages) -> Classifier:
        tell(f"training a classifier on {len(images)} {what}")
        return train_classifier(images, num_classes, config.classifier_steps, config.seed, device)

    judge = trained_on("real pictures", train)
    alone = {"samples": samples, "real": train[: len(samples)], "reconstructions": train_rebuilt}
    return {
        "judge_accuracy": {
            "real": accuracy(judge, test),
            "reconstructions": accuracy(judge, test_rebuilt),
        },
        "recognised": recognised(judge, samples[: RECOGNISED_PER_CLASS * num_classes], class_names),
        "classification_accuracy_score": {what: accuracy(trained_on(what, each), test) for what, each in alone.items()},
        "score_images": {what: len(images) for what, images in alone.items()},
    }


def recognised(judge: Classifier, samples: LabelledImages, class_names: list[str]) -> dict[str, object]:
    """The share of samples that get the class asked for, with its 95% interval, of all and of each class."""
    hits = predict(judge, samples.pixels) == samples.labels
    per_class = {name: share(hits[samples.labels == number]) for number, name in enumerate(class_names)}
    return {"samples": len(samples), **share(hits), "per_class": per_class}


def share(hits: Tensor) -> dict[str, float]:
    """The share of True in (N,) bool, with the ends of its 95% interval (Wilson 1927)."""
    total, part, z = len(hits), hits.double().mean().item(), 1.96
    middle = (part + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(part * (1 - part) / total + z**2 / (4 * total**2))
    return {"share": part, "low": middle - half, "high": middle + half}


def neighbours(
    samples: LabelledImages, train: LabelledImages, test: LabelledImages, test_rebuilt: LabelledImages
) -> dict[str, object]:
    """Distances to the nearest training picture, and how the samples' median stands to those of unseen pictures.

    What a decoder has smoothed is nearer to everything, so reconstructions of test pictures are the fair comparison:
    a ratio far below 1 to them is memorising.
    """
    tell(f"seeking the nearest of {len(train)} training pictures")
    compared = {"samples": samples, "test": test, "test_reconstructions": test_rebuilt}
    found = {what: distances_of(images.pixels[:NUM_COMPARED], train.pixels) for what, images in compared.items()}
    ratios = {f"ratio_to_{what}": found["samples"]["median"] / found[what]["median"] for what in list(found)[1:]}
    num_compared = {what: min(NUM_COMPARED, len(images.pixels)) for what, images in compared.items()}
    return {"distance": "L2 over pixels in [0, 1]", "images": num_compared, **found, **ratios}


def draw_sheets(folder: Path, name: str, samples: LabelledImages, train: LabelledImages, num_classes: int) -> None:
    """NAME_samples.png, a row of samples per class; NAME_neighbours.png, samples above their nearest neighbours."""
    rows = [samples.pixels[number::num_classes][:SHEET_SIDE] for number in range(min(num_classes, SHEET_SIDE))]
    save_sheet(folder / f"{name}_samples.png", [[*(row / 255)] for row in rows])
    shown = samples.pixels[:SHEET_SIDE]
    _, indices = nearest(shown, train.pixels, NUM_NEIGHBOURS)
    rows = [shown, *(train.pixels[column] for column in indices.T)]
    save_sheet(folder / f"{name}_neighbours.png", [[*(row / 255)] for row in rows])


def protocol_of(
    config: GenerationRun,
    prior: AutoregressivePrior,
    tokenizer: ImageTokenizer,
    train: LabelledImages,
    test: LabelledImages,
) -> dict[str, object]:
    """What the figures were measured with: settings, models, pictures, classifier."""
    return {
        "settings": public_settings(config),
        "prior": {"fingerprint": prior.fingerprint, "parameters": num_parameters(prior)},
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "decoder_fingerprint": tokenizer.decoder_fingerprint,
            "parameters": num_parameters(tokenizer),
        },
        "train": {"images": len(train), "sha256": train.content_hash},
        "test": {"images": len(test), "sha256": test.content_hash},
        "classifier": f"{DESCRIPTION}; {config.classifier_steps} steps, one seed",
    }


def command_of(name: str, config: GenerationRun) -> str:
    """The command that measures the same."""
    always = ("prior", "tokenizer", "data")
    return command_line("generation", name, public_settings(config), public_settings(GenerationRun()), always)


if __name__ == "__main__":
    launch_named(main, GenerationRun, __doc__)
