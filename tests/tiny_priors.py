"""Training runs of ten steps of a tiny prior in this process, and the store that they train on."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import picture, tiny_config
from safetensors.torch import load_file
from tiny_runs import TEN_STEPS

from tokenizer import ImageTokenizer
from train.config import parse
from train.encode_dataset import encode_dataset
from train.settings import PriorRun, StoreRun
from train.token_prior import main

TINY = [*TEN_STEPS, "model.width=16", "model.num_layers=2", "model.num_heads=2"]


def fill_with_a_store(folder: Path) -> Path:
    """A tokenizer, pictures of two classes and the token store made of them."""
    torch.manual_seed(0)
    ImageTokenizer(tiny_config()).save_pretrained(folder / "tokenizer")
    for number in range(24):
        place = folder / "pictures" / ("train" if number < 18 else "validation") / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number}.png")
    store_of(folder, "tokens", f"tokenizer={folder / 'tokenizer'}")
    return folder


def store_of(folder: Path, name: str, *settings: str) -> None:
    """Write the token store `name` of the folder's pictures, in this process."""
    given = [f"data={folder / 'pictures'}", f"output_dir={folder / name}", "image_size=8", "num_workers=0", *settings]
    AcceleratorState._reset_state(reset_partial_state=True)
    encode_dataset(parse(StoreRun, given), Accelerator(cpu=True))


def settings(made: Path, output: Path, *more: str) -> list[str]:
    """Of a run on the store in a folder."""
    return [*TINY, f"tokens={made / 'tokens'}", f"tokenizer={made / 'tokenizer'}", f"output_dir={output}", *more]


def train_prior(made: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    """A run in this process; the exported tensors."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse(PriorRun, settings(made, output, *more)))
    return load_file(output / "model.safetensors")
