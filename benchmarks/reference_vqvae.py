"""The best-known VQ-VAE example beside ours: python benchmarks/reference_vqvae.py NAME [key=value ...]; --help.

The example is the notebook vqvae_example.ipynb of DeepMind's Sonnet 2: CIFAR-10, 8 x 8 tokens of 512 codes, batches of
32, 10,000 steps, here written anew from its published settings. Ours are what train/vqvae.py makes of the arguments.
Every model reconstructs the same test pictures, clamped to [0, 1]; NMSE is their mean squared error over the variance
of the training pixels. A finished model is kept in runs/NAME/ and not trained again: the same command goes on.
Writes results/reference_vqvae_NAME.json. Shapes: B batch, N vectors, K codes, D components of a code.
"""

import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from recording import ROOT, circumstances, command_line, launch_named, num_parameters, public_settings, record
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from trained_tokenizers import (
    Pictures,
    TrainedRun,
    check_unconditional,
    figures_of_all,
    measured,
    read_pictures,
    summaries,
    train_ours,
)

from tokenizer.metrics import perplexity
from train.config import UserError
from train.settings import require

SIDE = 32  # pixels
NUM_TRAIN = 40_000  # pictures that the example trains on
HIDDEN, RESIDUAL_HIDDEN, NUM_RESIDUAL = 128, 32, 2  # channels, channels inside a residual layer, residual layers
NUM_CODES, CODE_DIM = 512, 64  # K, D
DECAY, EPSILON, COMMITMENT = 0.99, 1e-5, 0.25
LEARNING_RATE, BATCH_SIZE, STEPS = 3e-4, 32, 10_000  # Adam, constant
REFERENCE = "reference"  # its row in the record
PUBLISHED = {"train_nmse": 0.056, "train_perplexity": 326.0}  # means of the last 100 batches, in the notebook


@dataclass
class ReferenceRun(TrainedRun):
    """Settings of benchmarks/reference_vqvae.py NAME."""

    models: list[str] = field(default_factory=lambda: ["train/presets/cifar10/vqvae.yaml"])  # for train/vqvae.py each
    steps: int = STEPS  # of the example; 0 leaves it out

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps >= 0, f"steps={self.steps}", "be >= 0")
        require(bool(self.steps or self.models), "models=[] steps=0", "name a model, or leave the example in")


class ReferenceQuantizer(nn.Module):
    """The example's codebook: bias-corrected moving averages, random at first, no code ever moved."""

    def __init__(self):
        super().__init__()
        limit = math.sqrt(3 / CODE_DIM)  # Sonnet's variance scaling, uniform
        self.register_buffer("codes", torch.empty(NUM_CODES, CODE_DIM).uniform_(-limit, limit))
        self.register_buffer("hidden_count", torch.zeros(NUM_CODES))
        self.register_buffer("hidden_sum", torch.zeros(NUM_CODES, CODE_DIM))
        self.register_buffer("num_updates", torch.zeros(()))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, D, h, w) to quantized ones, indices (B, h, w) and the commitment loss."""
        vectors = latents.movedim(1, -1).flatten(0, 2)  # (N, D)
        distances = vectors.square().sum(1, keepdim=True) - 2 * vectors @ self.codes.T + self.codes.square().sum(1)
        indices = distances.argmin(1)  # (N,)
        quantized = self.codes[indices].view_as(latents.movedim(1, -1)).movedim(-1, 1)
        if self.training:
            self.update(vectors.detach(), indices)
        commitment = COMMITMENT * F.mse_loss(latents, quantized)
        passed = latents + (quantized - latents).detach()
        return passed, indices.view(latents.shape[0], *latents.shape[2:]), commitment

    @torch.no_grad()
    def update(self, vectors: Tensor, indices: Tensor) -> None:
        chosen = F.one_hot(indices, NUM_CODES).float()  # (N, K)
        self.num_updates += 1
        self.hidden_count.lerp_(chosen.sum(0), 1 - DECAY)
        self.hidden_sum.lerp_(chosen.T @ vectors, 1 - DECAY)
        correction = 1 - DECAY**self.num_updates
        count, total = self.hidden_count / correction, self.hidden_sum / correction
        smoothed = (count + EPSILON) / (count.sum() + NUM_CODES * EPSILON) * count.sum()
        self.codes.copy_(total / smoothed[:, None])


class ResidualStack(nn.Module):
    """ReLU, 3x3 to RESIDUAL_HIDDEN, ReLU, 1x1 back, added to the input; twice, then ReLU."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(HIDDEN, RESIDUAL_HIDDEN, 3, padding=1),
                nn.ReLU(), nn.Conv2d(RESIDUAL_HIDDEN, HIDDEN, 1),
            )
            for _ in range(NUM_RESIDUAL)
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = features + layer(features)
        return F.relu(features)


class ReferenceVQVAE(nn.Module):
    """The example's network, on pixels in [-0.5, 0.5]."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, HIDDEN // 2, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(HIDDEN // 2, HIDDEN, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1), ResidualStack(),
            nn.Conv2d(HIDDEN, CODE_DIM, 1),
        )  # fmt: skip
        self.quantizer = ReferenceQuantizer()
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_DIM, HIDDEN, 3, padding=1), ResidualStack(),
            nn.ConvTranspose2d(HIDDEN, HIDDEN // 2, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(HIDDEN // 2, 3, 4, stride=2, padding=1),
        )  # fmt: skip
        self.apply(initialize)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, 32, 32) in [0, 1] to reconstructions on that scale, indices (B, 8, 8), the commitment loss."""
        quantized, indices, commitment = self.quantizer(self.encoder(images - 0.5))
        return self.decoder(quantized) + 0.5, indices, commitment


def initialize(module: nn.Module) -> None:
    """Sonnet's default: a normal of deviation 1 / sqrt(fan in), cut at two deviations; biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        inputs = module.in_channels * math.prod(module.kernel_size)
        deviation = 1 / math.sqrt(inputs)
        nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(module.bias)


def main(name: str, config: ReferenceRun, root: Path = ROOT) -> None:
    """Train what is not trained yet, measure everything, and write the record under `root`."""
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    for model in config.models:
        check_unconditional(model)
    pictures = read_pictures(config, channels=3, side=SIDE)
    if len(pictures.train) < BATCH_SIZE:
        raise UserError(f"data={config.data} has {len(pictures.train)} pictures, fewer than a batch of {BATCH_SIZE}")
    example = REFERENCE if config.steps == STEPS else f"{REFERENCE} steps={config.steps}"
    makers = {example: partial(train_reference, pictures, config.steps)} if config.steps else {}
    makers |= {model: partial(train_ours, model, pictures, config) for model in config.models}
    rows = figures_of_all(root / "runs" / name, makers, config.seeds, pictures)
    protocol = pictures.protocol(config) | {"published": PUBLISHED}
    figures = {"command": command_of(name, config), "protocol": protocol, "models": summaries(rows)}
    record(f"reference_vqvae_{name}", figures, root)


def train_reference(pictures: Pictures, steps: int, path: Path, seed: int) -> dict[str, Any]:
    """Train the example with a seed; its figures."""
    torch.manual_seed(seed)
    model, train = ReferenceVQVAE(), pictures.train[:NUM_TRAIN]
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    order = batches(len(train), steps)
    last, begun = [], time.perf_counter()
    for indices in tqdm(order, desc="reference", unit="step", mininterval=5):
        images = train[indices].float() / 255
        reconstructions, tokens, commitment = model(images)
        nmse = F.mse_loss(reconstructions, images) / pictures.variance
        optimizer.zero_grad()
        (nmse + commitment).backward()
        optimizer.step()
        counts = torch.bincount(tokens.flatten(), minlength=NUM_CODES)
        last = [*last[-99:], (nmse.item(), perplexity(counts))]  # as the notebook's figures: of single batches
    seconds = time.perf_counter() - begun
    model.eval()

    def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
        return model(images)[:2]

    nmses, perplexities = zip(*last, strict=True)
    path.mkdir(parents=True, exist_ok=True)
    return {
        **measured(reconstruct, pictures, NUM_CODES),
        "parameters": num_parameters(model),
        "train_nmse": mean(nmses),
        "train_perplexity": mean(perplexities),
        "seconds": round(seconds, 1),
        "made_with": circumstances(),
    }


def batches(num_images: int, steps: int) -> list[Tensor]:
    """The indices of each batch, epoch after epoch in a new order, a rest too small for a batch left out."""
    per_epoch = num_images // BATCH_SIZE
    epochs = [torch.randperm(num_images)[: per_epoch * BATCH_SIZE] for _ in range(-(-steps // per_epoch))]
    return list(torch.cat(epochs).split(BATCH_SIZE))[:steps]


def command_of(name: str, config: ReferenceRun) -> str:
    """The command that measures the same."""
    return command_line("reference_vqvae", name, public_settings(config), public_settings(ReferenceRun()), ("data",))


if __name__ == "__main__":
    launch_named(main, ReferenceRun, __doc__)
