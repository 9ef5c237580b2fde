"""Compare the bottlenecks in one tokenizer: python benchmarks/quantizers.py NAME [key=value ...]; --help.

Each of `models` is what train/vqvae.py is given after the arguments that all share, so that data, network, steps and
batches are the same and the bottleneck alone differs; the defaults are all bottlenecks at about 9 bits for each place
of the grid, 500 steps of CIFAR-10. A finished model is kept in runs/NAME/ and not trained again: the same command goes
on, and adds the models that were added.
Writes results/quantizers_NAME.json: of each model and seed the reconstruction of the test pictures, the codes in use,
steps a second, peak memory.
"""

import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from recording import ROOT, command_line, launch_named, public_settings, record
from trained_tokenizers import TrainedRun, check_unconditional, figures_of_all, read_pictures, summaries, train_ours

from train.config import UserError, parse
from train.settings import TokenizerRun, require
from train.vqvae import check_model

SHARED = "train/presets/cifar10/vqvae.yaml steps=500 eval_every=500 save_every=500"
MODELS = [  # every bottleneck at about 9 bits for each place of the grid
    "model.quantizer.name=ema_vq model.quantizer.codebook_size=512",
    "model.quantizer.name=vq model.quantizer.codebook_size=512",
    "model.quantizer.name=softmax_vq model.quantizer.codebook_size=512",
    "model.quantizer.name=simvq model.quantizer.codebook_size=512",
    "model.quantizer.name=ibq model.quantizer.codebook_size=512",
    "model.quantizer.name=gumbel_vq model.quantizer.codebook_size=512",
    "model.quantizer.name=fsq model.quantizer.levels=[8,8,8] model.codebook_dim=3",
    "model.quantizer.name=lfq model.codebook_dim=9",
    "model.quantizer.name=bsq model.codebook_dim=9",
    "model.quantizer.name=residual model.quantizer.depth=3 model.quantizer.each.codebook_size=8",
    "model.quantizer.name=grouped model.codebook_dim=9 model.quantizer.groups=3 model.quantizer.each.codebook_size=8",
    "model.quantizer.name=multiscale model.quantizer.scales=[1,2,4,8] model.quantizer.each.codebook_size=64",
    "model.quantizer.name=hierarchical model.quantizer.each.codebook_size=128",
]


@dataclass
class QuantizersRun(TrainedRun):
    """Settings of benchmarks/quantizers.py NAME."""

    shared: str = SHARED  # arguments of train/vqvae.py that every model has
    models: list[str] = field(default_factory=lambda: [*MODELS])  # arguments of each
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.models), "models=[]", "hold the arguments of at least one model")


def main(name: str, config: QuantizersRun, root: Path = ROOT) -> None:
    """Train what is not trained yet, measure everything, and write the record under `root`."""
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    arguments = [f"{config.shared} {model}".strip() for model in config.models]
    first, *_ = [checked(each) for each in arguments]  # all of them before hours go into the first
    pictures = read_pictures(config, first.model.image_channels, first.image_size)
    makers = {each: partial(train_ours, each, pictures, config) for each in arguments}
    rows = figures_of_all(root / "runs" / name, makers, config.seeds, pictures)
    figures = {"command": command_of(name, config), "protocol": pictures.protocol(config), "models": summaries(rows)}
    record(f"quantizers_{name}", figures, root)


def checked(arguments: str) -> TokenizerRun:
    """The settings that the arguments make; UserError where the training program would refuse them."""
    try:
        run = parse(TokenizerRun, shlex.split(arguments))
        check_model(run)
    except UserError as error:
        raise UserError(f"{arguments}: {error}") from None
    check_unconditional(arguments)
    return run


def command_of(name: str, config: QuantizersRun) -> str:
    """The command that measures the same."""
    return command_line("quantizers", name, public_settings(config), public_settings(QuantizersRun()), ("data",))


if __name__ == "__main__":
    launch_named(main, QuantizersRun, __doc__)
