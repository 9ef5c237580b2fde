"""What train/vqvae.py makes of some arguments, measured on test pictures; a finished model is never trained again.

Every model reconstructs the same pictures, clamped to [0, 1]; NMSE is their mean squared error over the variance of the
training pixels. Shapes: N pictures, C channels, S side in pixels, B pictures at once.
"""

import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, ClassVar

import torch
import yaml
from labelled_images import content_hash, picture_batches
from recording import ROOT, as_yaml, circumstances, num_parameters, public_settings, refusals, tell
from torch import Tensor

from tokenizer import ImageTokenizer
from tokenizer.pretrained import written_whole
from train.checkpoint import SETTINGS_NAME
from train.config import UserError, differences, parse
from train.counting import TokenCounts
from train.progress import METRICS_NAME
from train.settings import SourceSettings, ThreadSettings, TokenizerRun, require
from train.sources import load_splits, open_splits, reading

CODES_IN_USE = ("usage", "codes_seen", "num_tokens", "perplexity", "tokens_per_code")  # what TokenCounts may tell

Maker = Callable[[Path, int], dict[str, Any]]  # a folder and a seed to the figures of the model trained there


@dataclass
class TrainedRun:
    """The settings of a program that trains models and compares them on test pictures."""

    data: str = "uoft-cs/cifar10"  # as for train/vqvae.py
    named: str | None = None  # the Hub id of `data` where that is a path; stands in the record in its place
    split: str = "train"
    eval_split: str | None = None  # split to measure on; default: validation, else test
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data_options: SourceSettings = field(default_factory=SourceSettings)
    speed: ThreadSettings = field(default_factory=ThreadSettings)

    streaming: ClassVar[bool] = False  # all pictures are held in memory
    seed: ClassVar[int] = 0  # nothing is held out

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds=[]", "hold at least one number")


@dataclass
class Pictures:
    train: Tensor  # uint8 (N, C, S, S)
    test: Tensor  # uint8 (N, C, S, S)
    variance: float  # of the training pixels on the [0, 1] scale

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 (hex) of each split."""
        return {"train": content_hash(self.train), "test": content_hash(self.test)}

    def protocol(self, config: TrainedRun) -> dict[str, Any]:
        """What stands in the record about the measuring."""
        return {
            "settings": public_settings(config),
            "train": {"images": len(self.train), "sha256": self.hashes["train"], "variance": self.variance},
            "test": {"images": len(self.test), "sha256": self.hashes["test"]},
            "nmse": "mean squared error of test pictures, clamped to [0, 1], over the variance of training pixels",
        }


def read_pictures(config: TrainedRun, channels: int, side: int) -> Pictures:
    """Every picture of both splits; UserError where there is one alone.

    Each seed of a training program would hold out others from it, and train on those that are measured here.
    """
    tell(f"reading {config.data}")
    options = {"channels": channels, "side": side, "limit": None, "batch_size": 1000, "rank": 0, "num_ranks": 1}
    with reading(config.data):
        if load_splits(config)[1] is None:
            raise UserError(
                f"data={config.data} has no split but {config.split}; name one to measure on: eval_split=..."
            )
        train, test = (
            torch.cat([batch for _, batch in picture_batches(source, **options)]) for source in open_splits(config)
        )
    return Pictures(train, test, (train.double() / 255).var(correction=0).item())


def figures_of_all(
    folder: Path, makers: dict[str, Maker], seeds: list[int], pictures: Pictures
) -> dict[str, list[dict[str, Any]]]:
    """The figures of each model, a mapping for each seed; what a finished model left under `folder` is read from there.

    All models of one seed, then the next: a run that is cut short still compares. UserError for what was measured on
    other pictures.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for model, make in makers.items():
            path = folder / f"{folder_name(model)}_{seed}"
            if not (path / "figures.json").is_file():
                tell(f"{model}, seed {seed}")
                figures = make(path, seed) | {"pictures": pictures.hashes}
                with written_whole(path / "figures.json") as part:
                    part.write_text(json.dumps(figures))
            figures = json.loads((path / "figures.json").read_text())
            if figures.get("pictures") != pictures.hashes:
                raise UserError(f"{path} was trained and measured on other pictures; another NAME, or move it away")
            rows.setdefault(model, []).append(figures)
    return rows


def folder_name(model: str) -> str:
    """What tells the arguments of a model from all others, as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "_", model.removeprefix("train/presets/"))


def check_unconditional(arguments: str) -> None:
    """Raise UserError where the arguments ask for a model that must be told classes, which nothing here tells it."""
    num_classes = parse(TokenizerRun, shlex.split(arguments)).model.num_classes
    if num_classes:
        raise UserError(f"{arguments}: model.num_classes={num_classes} must be 0: pictures are measured without labels")


def train_ours(arguments: str, pictures: Pictures, config: TrainedRun, path: Path, seed: int) -> dict[str, Any]:
    """Train by the training program with a seed, or go on with it; its figures."""
    changed = differences(asdict(config.data_options), asdict(SourceSettings()), "data_options.")
    given = {key: value for key, (value, _) in changed.items()}
    given |= {"data": config.data, "split": config.split, "seed": seed, "output_dir": str(path / "run")}
    if config.speed.threads:
        given["speed.threads"] = config.speed.threads
    words = [f"{key}={as_yaml(value)}" for key, value in given.items()]
    path.mkdir(parents=True, exist_ok=True)
    exit_code, spent = launched(["accelerate", "launch", "train/vqvae.py", *shlex.split(arguments), *words], path)
    if exit_code:
        raise UserError(f"{arguments} could not be trained (exit code {exit_code}); its own words stand above")
    with refusals():
        tokenizer = ImageTokenizer.from_pretrained(path / "run")
    return {
        **measured(partial(reconstructed, tokenizer), pictures, tokenizer.vocab_size),
        "parameters": num_parameters(tokenizer),
        "quantizer": tokenizer.config.quantizer["name"],
        "seconds": round(spent["seconds"], 1),
        "training_crops": counted_on_crops(path / "run"),
        "steps_per_second": steps_per_second(path / "run"),
        "peak_memory": spent["peak_memory"],  # bytes, of the largest process
        "memory_of_scores": memory_of_scores(path / "run", tokenizer),
        "made_with": circumstances(),
    }


def launched(command: list[str], path: Path) -> tuple[int, dict[str, Any]]:
    """The exit code of a command, and the seconds and the most memory of all its launches for this folder.

    A launch that is killed with this program is not among them.
    """
    kept, spent = path / "spent.json", {"seconds": 0.0, "peak_memory": 0}
    if kept.is_file():
        spent = json.loads(kept.read_text())
    begun = time.perf_counter()
    watched = [sys.executable, "benchmarks/peak_memory.py", str(path / "peak_memory")]
    done = subprocess.run([*watched, *command], cwd=ROOT)
    spent["seconds"] += time.perf_counter() - begun
    spent["peak_memory"] = max(spent["peak_memory"], int((path / "peak_memory").read_text()))
    with written_whole(kept) as part:
        part.write_text(json.dumps(spent))
    return done.returncode, spent


def reconstructed(tokenizer: ImageTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """decode(encode(images)) of (B, C, S, S) in [0, 1], and the tokens."""
    tokens = tokenizer.encode(images)
    return tokenizer.decode(tokens), tokens


def steps_per_second(run: Path) -> float:
    """The median over the log of a finished run, which leaves out evaluations."""
    settings = settings_of(run)
    speeds = [record["images_per_second"] for record in log_of(run) if "images_per_second" in record]
    return median(speeds) / (settings["batch_size"] * settings["optimizer"]["accumulation_steps"])


def counted_on_crops(run: Path) -> dict[str, float]:
    """The codes in use that the last evaluation of a finished run counted over crops of training pictures."""
    (*_, last) = [record for record in log_of(run) if "tokens_per_code" in record]
    return {key: last[key] for key in CODES_IN_USE if key in last}


def memory_of_scores(run: Path, tokenizer: ImageTokenizer) -> int:
    """Bytes that the scores of a batch's tokens against all codes would take in float32, N x K."""
    settings = settings_of(run)
    num_tokens = settings["batch_size"] * tokenizer.tokens_per_image(settings["image_size"])
    return 4 * num_tokens * tokenizer.vocab_size


def settings_of(run: Path) -> dict[str, Any]:
    """Every setting of a run."""
    return yaml.safe_load((run / SETTINGS_NAME).read_text())


def log_of(run: Path) -> list[dict[str, Any]]:
    """The records of a finished run, in order."""
    return [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]


@torch.no_grad()
def measured(
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]], pictures: Pictures, vocab_size: int
) -> dict[str, float]:
    """NMSE and PSNR of all test pictures (as one), codes in use and perplexity of their tokens, and their bits."""
    squared_error, counts = 0.0, TokenCounts(vocab_size)
    for part in pictures.test.split(250):
        images = part.float() / 255
        reconstructions, tokens = reconstruct(images)
        squared_error += (reconstructions.clamp(0, 1) - images).double().square().sum().item()
        counts.add(tokens)
    mse = squared_error / pictures.test.numel()
    return {
        "test_nmse": mse / pictures.variance,
        "test_psnr": -10 * math.log10(mse),
        **counts.figures(),
        "bits_per_image": tokens[0].numel() * math.log2(vocab_size),
    }


def summaries(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each model the mean and the spread over seeds of its test NMSE, against the first one's, and all its runs."""
    means = {model: mean(run["test_nmse"] for run in runs) for model, runs in rows.items()}
    first = next(iter(means.values()))
    return [
        {
            "model": model,
            "test_nmse": means[model],
            "deviation": stdev(run["test_nmse"] for run in runs) if len(runs) > 1 else None,
            "under_the_first": 1 - means[model] / first,
            "runs": runs,
        }
        for model, runs in rows.items()
    ]
