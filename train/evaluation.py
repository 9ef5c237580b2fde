"""What a training run tells of its model: figures of its steps, of its evaluations, samples, warnings, the card.

An examiner is all that the training loop of train/vqvae.py knows of one kind of model.
"""

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tokenizer import ImageTokenizer, ModelCard, TokenizerOutput
from tokenizer.image_model import ImageModel
from tokenizer.metrics import bits_per_pixel, psnr

from .checkpoint import RunFolder
from .config import RunError, public_yaml
from .counting import TokenCounts, num_counted, told_usage
from .data import Batch, evaluation_batches, training_batches
from .losses import ReconstructionLoss
from .progress import METRICS_NAME, UsageWindow, read_lines, save_sheet
from .settings import AutoencoderRun, TokenizerRun
from .sources import ImageSource, public_name

log = logging.getLogger(__name__)

COLLAPSE = 0.5  # a usage below this, past a quarter of the run, is warned of
NUM_SAMPLES = 8  # validation pictures drawn into samples/, as many as fit the sheet


class Examiner(ABC):
    """Examines the model of one run; `rows` are the validation pictures."""

    model_class: ClassVar[type[ImageModel]]

    def __init__(
        self,
        model: ImageModel,
        reconstruction_loss: ReconstructionLoss,
        config: AutoencoderRun,
        accelerator: Accelerator,
        source: ImageSource,
        rows: list[Any],
    ):
        self.reconstruction_loss, self.config, self.accelerator = reconstruction_loss, config, accelerator
        self.source, self.rows = source, rows

    @abstractmethod
    def add(self, output: Any) -> None:
        """Take in what the model gave for a training batch."""

    @abstractmethod
    def figures(self, output: Any, images: Tensor) -> dict[str, float]:
        """What the log says of the last training batch and of those before, beside losses and PSNR."""

    @abstractmethod
    def shown(self, values: dict[str, float]) -> dict[str, str]:
        """What stands beside the bar, after loss and PSNR."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, float]:
        """PSNR of validation pictures, `psnr`, and the figures of this kind of model; the same on every rank."""

    @abstractmethod
    def warn(self, step: int, metrics: dict[str, float]) -> None:
        """Say so where the last evaluation shows a collapse."""

    @abstractmethod
    def sample_rows(self, model: Any, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Rows of a sheet for a batch of validation pictures, uint8 (B, C, H, W): each (B, C, H, W) in [0, 1]."""

    @classmethod
    @abstractmethod
    def measured_on(cls, config: Any, metrics: dict[str, float]) -> str:
        """What the figures of an evaluation mean, for the card."""

    @staticmethod
    def pictures_of(config: Any) -> str:
        """What the figures of an evaluation are measured on, for the card."""
        name = config.card.data or public_name(config.data) or "local files"
        held_out = f"what is held out of {config.split}"
        split = config.eval_split or f"validation, else test, else {held_out}"
        return f"whole validation pictures ({held_out if split == config.split else split}, of `{name}`)"

    def pictures(self, model: ImageModel) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This rank's share of the validation pictures in batches, uint8 (B, C, H, W), and their labels or None."""
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        return evaluation_batches(self.source, self.rows[rank::num_ranks], self.config, model.downsample_factor)

    def crops(self) -> Iterator[Batch]:
        """This rank's share of training crops without end, other ones than the run's."""
        other = replace(self.config, seed=self.config.seed + 1)
        return training_batches(self.source, other, self.accelerator, 0, set())

    @staticmethod
    def psnr_of(decoded: Tensor, originals: Tensor) -> Tensor:
        """PSNR (B,) of pictures (B, C, H, W); RunError where the network gives no numbers any more."""
        if not decoded.isfinite().all():
            raise RunError(
                "validation pictures are decoded to NaN, the weights have grown too large; lower learning_rate or "
                "optimizer.max_grad_norm (in another output_dir)"
            )
        return psnr(decoded, originals)

    def mean_over_pictures(self, totals: Tensor) -> list[float]:
        """Sums over pictures, the last of them their number, reduced over the ranks and divided by it."""
        *sums, number = self.accelerator.reduce(totals, "sum").tolist()
        if number == 0:
            raise RunError(
                "no validation image can be read; the log names them: mend them or choose another eval_split"
            )
        return [each / number for each in sums]

    def draw_samples(self, model: ImageModel, folder: RunFolder, step: int) -> None:
        """samples/step_N.png, from the first validation pictures."""
        batches = evaluation_batches(self.source, self.rows[:NUM_SAMPLES], self.config, model.downsample_factor)
        rows = zip(*(self.sample_rows(model, *batch) for batch in batches), strict=True)
        save_sheet(folder.sample(step), [[picture for part in row for picture in part] for row in rows])


class TokenizerExaminer(Examiner):
    """Usage and perplexity of the codes, and what tokens and pixels cost."""

    model_class = ImageTokenizer
    config: TokenizerRun

    def __init__(self, model: ImageTokenizer, *arguments: Any):
        super().__init__(model, *arguments)
        self.window = UsageWindow(model.quantizer.num_codes)
        self.accelerator.register_for_checkpointing(self.window)
        self.code_numbers = partial(model.quantizer.code_numbers, grid_size=model.grid_size(self.config.image_size))
        self.vocab_size, self.tokens_per_image = model.vocab_size, model.tokens_per_image(self.config.image_size)

    def add(self, output: TokenizerOutput) -> None:
        self.window.add(self.code_numbers(output.tokens))

    def figures(self, output: TokenizerOutput, images: Tensor) -> dict[str, float]:
        nats = self.reconstruction_loss.nats(output.reconstructions, images).mean().item()
        return self.window.figures | self.likelihood(nats)

    def shown(self, values: dict[str, float]) -> dict[str, str]:
        """The usage of the last evaluation, before the first of the training batches."""
        if "running_usage" in values:
            values = {"usage": values["running_usage"]} | values
        return {"usage": told_usage(values) if values.keys() & {"usage", "codes_seen"} else "..."}

    @torch.no_grad()
    def evaluate(self, model: ImageTokenizer) -> dict[str, float]:
        """PSNR of decode(encode(x)) on whole validation pictures; usage and perplexity on training crops, codes frozen.

        And what the pictures cost, where the loss is a likelihood.
        """
        device = self.accelerator.device
        totals = torch.zeros(3, device=device)  # sums over the pictures: PSNR, nats, 1
        for images, labels in self.pictures(model):
            originals, size = images.float() / 255, tuple(images.shape[2:])
            reconstructions = model.decode(model.encode(images, labels=labels), size, labels).cpu()
            scores = self.psnr_of(reconstructions, originals)
            nats = self.reconstruction_loss.nats(reconstructions, originals)
            totals += torch.tensor([scores.sum(), nats.sum(), len(scores)], device=device)
        mean_psnr, mean_nats = self.mean_over_pictures(totals)
        num_codes, crops, num_tokens = model.quantizer.num_codes, self.crops(), 0
        counts = TokenCounts(num_codes)
        while num_tokens < num_counted(num_codes):
            batch = next(crops)
            tokens = model.encode(batch.crops, labels=batch.labels)
            counts.add(self.code_numbers(tokens))
            num_tokens += tokens.numel() * self.accelerator.num_processes
        counts = sum(gather_object([counts]), TokenCounts(num_codes))
        size = self.config.image_size
        return {
            "psnr": mean_psnr,
            **counts.figures(),
            "bits_per_pixel": bits_per_pixel(model.vocab_size, self.tokens_per_image, (size, size)),
        } | self.likelihood(mean_nats)

    def likelihood(self, nats: float) -> dict[str, float]:
        """What -log p(pixels | tokens) of so many nats per dimension, a channel of a pixel, comes to; {} without one.

        Distortion and rate, the tokens at a uniform code, are together the length of a code for the 8-bit pixels.
        """
        size = (self.config.image_size, self.config.image_size)
        rate = bits_per_pixel(self.vocab_size, self.tokens_per_image, size) / self.config.model.image_channels
        return likelihood(nats, rate, self.reconstruction_loss)

    def warn(self, step: int, metrics: dict[str, float]) -> None:
        """Say so where most codes are never used."""
        if metrics.get("usage", 1.0) < COLLAPSE and step >= self.config.steps / 4:
            log.warning(
                "codebook collapse at step %d: only %.0f%% of the codes are in use; lower learning_rate or the "
                "number of codes, or raise what model.quantizer has against it: revival_threshold or entropy_weight",
                step,
                100 * metrics["usage"],
            )

    def sample_rows(self, model: ImageTokenizer, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """The pictures above their reconstructions."""
        tokens = model.encode(images, labels=labels)
        return [images.float() / 255, model.decode(tokens, tuple(images.shape[2:]), labels)]

    @classmethod
    def measured_on(cls, config: TokenizerRun, metrics: dict[str, float]) -> str:
        costs = (
            " `distortion_bits_per_dimension`: -log2 p of the 8-bit pixels under a Gaussian of deviation `sigma` about "
            "decode(encode(x)), per channel of a pixel; `total_bits_per_dimension`: with the tokens at a uniform code."
        )
        seen = (
            "`usage` (share of codes seen)"
            if "usage" in metrics
            else "`codes_seen` (different codes among `num_tokens` tokens; the codes are too many to state a usage)"
        )
        return (
            f"`psnr`: dB, mean over {cls.pictures_of(config)}, of decode(encode(x)). {seen} and `perplexity`: on "
            f"training crops of {config.image_size} pixels, codebook frozen, over `tokens_per_code` tokens a code."
            f"{costs if 'sigma' in metrics else ''}"
        )


def likelihood(nats: float, rate: float, reconstruction_loss: ReconstructionLoss) -> dict[str, float]:
    """Distortion in nats and rate in bits, per dimension, as a run tells them; {} where the loss is no likelihood."""
    if reconstruction_loss.deviation is None:
        return {}
    return {
        "sigma": reconstruction_loss.deviation().item(),
        "distortion_nats_per_dimension": nats,
        "distortion_bits_per_dimension": nats / math.log(2),
        "rate_bits_per_dimension": rate,
        "total_bits_per_dimension": nats / math.log(2) + rate,
    }


def model_card(examiner: type[Examiner], config: AutoencoderRun, folder: RunFolder) -> ModelCard:
    """The card of a run whose last evaluation is in its metrics.jsonl."""
    records = map(json.loads, read_lines(folder.path / METRICS_NAME))
    metrics = [record for record in records if "psnr" in record][-1]
    step = metrics.pop("step")
    return ModelCard(
        license=config.card.license,
        data=config.card.data or public_name(config.data),
        data_license=config.card.data_license,
        metrics=metrics,
        evaluation=f"After {step} steps. {examiner.measured_on(config, metrics)}",
        settings=public_yaml(config),
        sample=folder.sample(step),
    )
