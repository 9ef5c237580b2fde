"""Training runs of ten steps on a tiny network in this process: their settings, and what interrupts them."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from processes import assert_equal_runs
from safetensors.torch import load_file

from train.checkpoint import RunFolder
from train.config import parse
from train.settings import TokenizerRun, VAERun
from train.vqvae import main

TEN_STEPS = ["steps=10", "batch_size=4", "eval_every=5", "save_every=1", "speed.threads=1"]
OF_IMAGES = [
    *TEN_STEPS,
    "image_size=16",
    "average.decay=0.9",
    "model.autoencoder.patch_size=2",
    "model.autoencoder.base_channels=8",
    "model.autoencoder.channel_multipliers=[1]",
    "model.autoencoder.latent_channels=8",
]
WITH_ANY_QUANTIZER = [*OF_IMAGES, "model.codebook_dim=4"]
TINY = [*WITH_ANY_QUANTIZER, "model.quantizer.codebook_size=32", "model.quantizer.revival_threshold=0.5"]
TINY_VAE = [*OF_IMAGES, "model.latent_dim=4"]


def train_here(
    folder: str | Path, output: Path, *settings: str, run: type = TokenizerRun, tiny: list[str] = TINY
) -> dict[str, torch.Tensor]:
    """A run of train/vqvae.py's loop on a folder of pictures; the exported tensors."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse(run, [*tiny, f"data={folder}", f"output_dir={output}", "num_workers=0", *settings]))
    return load_file(output / "model.safetensors")


train_vae = functools.partial(train_here, run=VAERun, tiny=TINY_VAE)


@contextmanager
def ended_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The run inside the block ends right after the checkpoint of a step, as if it were killed."""
    save = RunFolder.save

    def save_and_end(self, accelerator, saved_step, kept):
        save(self, accelerator, saved_step, kept)
        if saved_step == step:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(RunFolder, "save", save_and_end)
        yield


def assert_resumes_to_the_bit(
    folder: str | Path,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[..., object] = train_here,
) -> None:
    """Interrupt a run right after a checkpoint, mid-epoch, and compare it with an undisturbed one."""
    train(folder, tmp_path / "whole", *settings)
    with ended_after(5, monkeypatch):
        train(folder, tmp_path / "parts", *settings)
    train(folder, tmp_path / "parts", *settings)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
