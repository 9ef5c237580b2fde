"""Latent spaces of an autoencoder and of VAEs, as pictures and in figures: python benchmarks/latents.py NAME.

Trains an ImageVAE by train/vae.py for each weight of the KL on shapes whose factors are known; at a weight of nearly
nothing, the first by default, it is an autoencoder. The network's grid is 1 x 1 for these pictures, so that the D
latents are a global code. Writes results/latents_NAME.json (ELBO, active units, mutual information gap) and the
pictures docs/NAME_*.png. What is trained already under runs/NAME is not trained again.
"""

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from disentanglement import mutual_information_gap
from labelled_images import content_hash
from latent_pictures import Space, draw_interpolations, draw_planes, draw_scatter, draw_traversals
from recording import ROOT, command_line, launch_named, num_parameters, record, tell
from shapes import FACTORS, SIDE, Shapes, all_shapes
from torch import Tensor

from tokenizer import ImageVAE
from tokenizer.collapse import active_units
from tokenizer.images import tensor_to_pil
from tokenizer.metrics import psnr
from tokenizer.posteriors.normal import gaussian_kl
from tokenizer.pretrained import written_whole
from tokenizer.unfilled import unfilled
from train.config import UserError, parse
from train.settings import VAERun, require
from train.vqvae import check_model
from train.vqvae import main as train_model

SHARED = (
    "steps=450 batch_size=32 learning_rate=3e-3 optimizer.name=muon eval_every=450 save_every=450 loss.sigma=0.1 "
    "model.latent_dim=6 model.autoencoder.patch_size=8 model.autoencoder.base_channels=32 "
    "model.autoencoder.channel_multipliers=[1,2,4]"
)
FIXED = [f"image_size={SIDE}", "num_workers=0", "data_options.flip=false", "split=train", "eval_split=validation"]
DRAWS = 10  # of the latents of each picture, from which information is measured
HELD_OUT = 10  # one picture in so many validates


@dataclass
class LatentsRun:
    """Settings of benchmarks/latents.py NAME."""

    betas: list[float] = field(default_factory=lambda: [1e-6, 1.0, 16.0])  # weights of the KL, a model for each
    shared: str = SHARED  # arguments of train/vae.py that all models have
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        require(bool(self.betas) and min(self.betas) > 0, f"betas={self.betas}", "hold weights above 0")


def main(name: str, config: LatentsRun, root: Path = ROOT) -> None:
    """Train what is not trained yet, measure, and write the record and the pictures into their folders under `root`."""
    shapes, folder = all_shapes(), root / "runs" / name
    runs = {beta: settings_of(beta, config, folder) for beta in config.betas}
    write_data(shapes, folder / "shapes")
    spaces, rows = [], []
    for beta, run in runs.items():
        tell(f"beta {beta:g}")
        train_model(run)
        vae = ImageVAE.from_pretrained(run.output_dir)
        mean, log_variance = (each.flatten(1) for each in vae.moments(shapes.pixels))  # (N, D): the grid is 1 x 1
        spaces.append(Space(f"beta {beta:g}", vae, shapes, mean, log_variance))
        rows.append({"beta": beta, **figures_of(vae, shapes, mean, log_variance, config.seed)})
    draw_traversals(root / "docs" / f"{name}_traversals.png", spaces)
    draw_planes(root / "docs" / f"{name}_planes.png", spaces)
    draw_interpolations(root / "docs" / f"{name}_interpolations.png", spaces)
    draw_scatter(root / "docs" / f"{name}_scatter.png", spaces)
    protocol = {
        "settings": asdict(config),
        "pictures": {"images": len(shapes.pixels), "sha256": content_hash(shapes.pixels, shapes.factors)},
        "factors": {factor: len(values) for factor, values in FACTORS.items()},
        "mig": f"Chen et al. 2018, equation 6, on all pictures, {DRAWS} draws of the latents each, in 20 bins",
    }
    record(f"latents_{name}", {"command": command_of(name, config), "protocol": protocol, "models": rows}, root)


def settings_of(beta: float, config: LatentsRun, folder: Path) -> VAERun:
    """The settings of the training of one model; UserError where they cannot be, or leave a grid of latents."""
    given = [*FIXED, *shlex.split(config.shared), f"model.posterior.beta={beta}", f"seed={config.seed}"]
    run = parse(VAERun, [*given, f"data={folder / 'shapes'}", f"output_dir={folder / f'beta_{beta:g}'}"])
    check_model(run)
    grid = unfilled(lambda: ImageVAE(run.model)).grid_size(SIDE)
    if grid != (1, 1) or run.model.latent_dim < 2:
        raise UserError(
            f"shared={config.shared!r} makes a grid of {grid[0]} x {grid[1]} of {run.model.latent_dim} latents; a "
            f"global code is a grid of 1 x 1 (patch_size times 2 for each further level is {SIDE}) of at least 2"
        )
    return run


def write_data(shapes: Shapes, folder: Path) -> None:
    """The pictures as parquet files, one in HELD_OUT as the validation split; what is there already stays."""
    chosen = torch.randperm(len(shapes.pixels), generator=torch.Generator().manual_seed(0))
    held_out = len(chosen) // HELD_OUT
    for split, numbers in (("validation", chosen[:held_out]), ("train", chosen[held_out:])):
        path = folder / f"{split}.parquet"
        if not path.is_file():
            images = [tensor_to_pil(picture / 255) for picture in shapes.pixels[numbers]]
            features = datasets.Features({"image": datasets.Image()})
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as part:
                datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(part)


@torch.no_grad()
def figures_of(vae: ImageVAE, shapes: Shapes, mean: Tensor, log_variance: Tensor, seed: int) -> dict[str, Any]:
    """What is measured of a model on all pictures: how good they come back, what the latents hold, and how sorted."""
    rebuilt = torch.cat([vae.decode(part[..., None, None]) for part in mean.split(256)])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(DRAWS, *mean.shape, generator=generator)
    drawn = (mean + (0.5 * log_variance).exp() * noise).flatten(0, 1)  # (DRAWS * N, D)
    gap = mutual_information_gap(drawn, shapes.factors.repeat(DRAWS, 1))
    kl = gaussian_kl(mean, log_variance).mean(0)  # (D,)
    return {
        "parameters": num_parameters(vae),
        "fingerprint": vae.fingerprint,
        "psnr": psnr(rebuilt, shapes.pixels / 255).mean().item(),
        "kl_nats": kl.sum().item(),
        "kl_nats_of_each": kl.tolist(),
        "active_units": int(active_units(mean).sum()),
        "deviation_of_each": mean.std(0).tolist(),
        "mig": gap["mig"],
        "gap_of_each_factor": dict(zip(FACTORS, gap["gaps"], strict=True)),
        "information_nats": gap["information"],
    }


def command_of(name: str, config: LatentsRun) -> str:
    """The command that measures the same."""
    return command_line("latents", name, asdict(config), asdict(LatentsRun()), ())


if __name__ == "__main__":
    launch_named(main, LatentsRun, __doc__)
