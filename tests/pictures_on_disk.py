"""Data sets of flat pictures in every form that can be opened, and runs on them."""

import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate import Accelerator
from conftest import tiny_config
from datasets import Dataset, Features
from PIL import Image
from torch import Tensor

from train.data import training_batches
from train.settings import TokenizerRun
from train.sources import open_sources

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])


def settings(data: str | Path, **changes: Any) -> TokenizerRun:
    changes = {"image_size": 8, "batch_size": 4, "num_workers": 0, "model": tiny_config()} | changes
    return TokenizerRun(data=str(data), **changes)


def flat(number: int, width: int = 8, height: int = 8) -> Image.Image:
    """A picture whose every pixel tells its number."""
    return Image.new("RGB", (width, height), (number, 255 - number, 7))


def numbers(crops: Tensor) -> list[int]:
    return crops[:, 0, 0, 0].tolist()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, *images: Image.Image) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index:03d}.png")


def write_parquet(path: Path, content: list[Any], column: str = "image", **more: Any) -> None:
    """PNG bytes, or {bytes, path} or None as they stand; further columns are (feature, values)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {column: [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in content]}
    features = {column: datasets.Image()} | {name: feature for name, (feature, _) in more.items()}
    columns |= {name: values for name, (_, values) in more.items()}
    Dataset.from_dict(columns, Features(features)).to_parquet(path)


def write_stream(folder: Path, shards: list[list[Any]]) -> None:
    for index, content in enumerate(shards):
        write_parquet(folder / f"train-{index}.parquet", content)
    write_parquet(folder / "validation.parquet", [png(flat(0))])


def write_tar(path: Path, content: list[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for index, image in enumerate(content):
            member = tarfile.TarInfo(f"{index:03d}.png")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))


def take(config: TokenizerRun, number: int, done: int = 0, known: set[str] = frozenset()) -> list[Any]:
    """The batches `done`, `done + 1`, ... `done + number - 1`: crops and the names of unreadable images."""
    batches = training_batches(open_sources(config)[0], config, Accelerator(cpu=True), done, set(known))
    return [(batch.crops, {name for name, _ in batch.corrupt}) for batch in itertools.islice(batches, number)]
