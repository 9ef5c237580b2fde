"""Train diffusers' VQModel as its published example does: python benchmarks/reference_vqgan.py [key=value ...]; --help.

The example is examples/vqgan/train_vqgan.py of diffusers, its loop written anew from its published settings: generator
and discriminator take turns, a step each; AdamW at a constant 1e-4 with weight decay 0.01; mean squared error, the
commitment loss as VQModel gives it, a perceptual loss and a hinge loss under an adaptive weight from the first step
on; a discriminator (Paella's) with spectral and instance norms, a sigmoid at its end and a gradient penalty.
Departures: LPIPS in place of timm's VGG-19, so that it and ours train on one perceptual loss; our crops and batches;
the widths of the network, where `block_out_channels` says so. Ends in a folder that diffusers reads and that
benchmarks/reconstruction.py takes for a tokenizer. Shapes: B batch, C channels, H W sides.
"""

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import VQModel
from recording import tell
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from train.adversarial import adaptive_weight
from train.checkpoint import SETTINGS_NAME
from train.config import UserError, launch, to_yaml
from train.cpu import tune_for_cpu
from train.data import training_batches
from train.features import PerceptualDistance
from train.settings import PHOTOGRAPHS, DataSettings, ThreadSettings, TokenizerRun, at_least_one, require
from train.sources import open_sources

LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, (0.9, 0.999), 1e-2, 1.0
MAX_ADAPTIVE_WEIGHT, GRADIENT_PENALTY = 1e4, 10.0
DISCRIMINATOR_WIDTHS = (64, 128, 256, 512, 512, 512)  # each layer halves the side


@dataclass
class PeerLoss:
    perceptual: Literal["vgg", "alex", "squeeze"] = "vgg"  # LPIPS by that network, downloaded when first used


@dataclass
class PeerRun:
    """Settings of benchmarks/reference_vqgan.py."""

    output_dir: str = "runs/reference_vqgan"
    data: str = PHOTOGRAPHS  # as for train/vqvae.py
    split: str = "train"
    resize: int | None = None  # short side in pixels from which crops are cut
    image_size: int = 128  # pixels, side of the random training crop
    steps: int = 1000  # of generator and discriminator together, as the example counts them
    batch_size: int = 16
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 512])  # a level each, halving the side
    codebook_size: int = 16384
    codebook_dim: int = 4
    mixed_precision: Literal["no", "bf16"] = "no"
    num_workers: int = 2  # processes that decode images
    seed: int = 0
    loss: PeerLoss = field(default_factory=PeerLoss)
    data_options: DataSettings = field(default_factory=DataSettings)
    speed: ThreadSettings = field(default_factory=ThreadSettings)

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "batch_size", "image_size")
        smallest = 2 ** len(DISCRIMINATOR_WIDTHS)  # leaves the last norm of the discriminator a single place
        require(self.image_size > smallest, f"image_size={self.image_size}", f"be above {smallest}")
        groups, widths = 32, self.block_out_channels  # of VQModel's norms
        fitting = bool(widths) and all(width > 0 and width % groups == 0 for width in widths)
        require(fitting, f"block_out_channels={widths}", f"hold multiples of {groups}, one or more")


class Discriminator(nn.Module):
    """Images (B, C, H, W) in [0, 1] to probabilities (B, 1, h, w) of being real."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise((3, *DISCRIMINATOR_WIDTHS)):
            layers.append(nn.utils.parametrizations.spectral_norm(nn.Conv2d(narrow, wide, 3, stride=2, padding=1)))
            layers += [nn.InstanceNorm2d(wide)] if narrow != 3 else []
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(DISCRIMINATOR_WIDTHS[-1], 1, 1), nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def main(config: PeerRun) -> None:
    folder = Path(config.output_dir)
    if folder.exists():
        raise UserError(f"output_dir={config.output_dir} is there already; another one, or move it away")
    set_seed(config.seed)
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    tune_for_cpu(accelerator, config.speed)
    run = TokenizerRun(
        data=config.data, split=config.split, image_size=config.image_size, batch_size=config.batch_size,
        num_workers=config.num_workers, seed=config.seed, data_options=config.data_options,
    )  # fmt: skip
    run.model.resize = config.resize
    source, _ = open_sources(run)
    model, discriminator = built(config), Discriminator()
    perceptual = PerceptualDistance(config.loss.perceptual).to(accelerator.device)
    optimizers = [
        torch.optim.AdamW(network.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY)
        for network in (model, discriminator)
    ]
    model, discriminator, *optimizers = accelerator.prepare(model, discriminator, *optimizers)
    batches = training_batches(source, run, accelerator, 0, set())
    begun = time.perf_counter()
    for step in tqdm(range(config.steps), unit="step", mininterval=5):
        images = next(batches)[0].float() / 255
        reconstructions, commitment = model(images, return_dict=False)
        network, optimizer = ((model, optimizers[0]), (discriminator, optimizers[1]))[step % 2]
        if step % 2 == 0:
            loss = generator_loss(images, reconstructions.float(), commitment, perceptual, discriminator, model)
        else:
            loss = discriminator_loss(images, reconstructions.detach(), discriminator)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    tell(f"{config.steps} steps in {(time.perf_counter() - begun) / 60:.1f} min")
    model.save_pretrained(folder)
    (folder / SETTINGS_NAME).write_text(to_yaml(config))


def built(config: PeerRun) -> VQModel:
    """The network of the example, with the widths of the settings."""
    num_levels = len(config.block_out_channels)
    return VQModel(
        act_fn="silu",
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        layers_per_block=2,
        latent_channels=config.codebook_dim,
        norm_num_groups=32,
        norm_type="spatial",
        num_vq_embeddings=config.codebook_size,
        vq_embed_dim=config.codebook_dim,
    )


def generator_loss(
    images: Tensor,
    reconstructions: Tensor,
    commitment: Tensor,
    perceptual: PerceptualDistance,
    discriminator: nn.Module,
    model: VQModel,
) -> Tensor:
    """What the network learns from, with the adaptive weight of the perceptual against the adversarial gradient."""
    distance = perceptual(reconstructions, images).mean()
    adversarial = -discriminator(reconstructions).float().mean()
    kernel = model.decoder.conv_out.weight
    gradients = [torch.autograd.grad(term, kernel, retain_graph=True)[0] for term in (distance, adversarial)]
    weight = adaptive_weight(*gradients, MAX_ADAPTIVE_WEIGHT).detach()
    return F.mse_loss(images, reconstructions) + commitment.float() + distance + weight * adversarial


def discriminator_loss(images: Tensor, reconstructions: Tensor, discriminator: nn.Module) -> Tensor:
    """Hinge loss and gradient penalty at the real images."""
    images = images.requires_grad_()
    real, fake = discriminator(images).float(), discriminator(reconstructions).float()
    (gradient,) = torch.autograd.grad(real.sum(), images, create_graph=True)
    penalty = GRADIENT_PENALTY * (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return (F.relu(1 + fake).mean() + F.relu(1 - real).mean()) + penalty


if __name__ == "__main__":
    launch(main, PeerRun)
