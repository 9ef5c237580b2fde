"""Pictures from any source of the training programs, all brought to one square: all in memory, or a batch at a time.

Shapes: N images, C channels, S side in pixels.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from tokenizer.images import pil_to_tensor, prepare_pil
from train.config import UserError
from train.sources import ImageSource, open_measured, reading

READ_AT_ONCE = 100


@dataclass
class LabelledImages:
    """Pictures and their classes."""

    pixels: Tensor  # (N, C, S, S) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | Tensor) -> "LabelledImages":
        return LabelledImages(self.pixels[chosen], self.labels[chosen])

    def shuffled(self, seed: int) -> "LabelledImages":
        """In a random order, so that the first n are a random draw even where the data is sorted by class."""
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]

    @property
    def content_hash(self) -> str:
        """sha256 (hex) over the shape, the pixels and the labels, in their order."""
        return content_hash(self.pixels, self.labels)


def content_hash(pixels: Tensor, *others: Tensor) -> str:
    """sha256 (hex) over the shape of the pixels and the values of all, in their order."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for tensor in (pixels, *others):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def picture_batches(
    source: ImageSource, channels: int, side: int, limit: int | None, batch_size: int, rank: int, num_ranks: int
) -> Iterator[tuple[int, Tensor]]:
    """This rank's batches of the first `limit` pictures or of all: the number of its first, and (B, C, S, S) uint8.

    Whole batches are dealt out, so that any number of ranks sees the same ones. Raises whatever decoding raises.
    """
    rows = islice(source.rows, limit)
    for number in count():
        batch = list(islice(rows, batch_size))
        if not batch:
            return
        if number % num_ranks == rank:
            yield number * batch_size, torch.stack([square(source, row, channels, side) for row in batch])


def validation_pictures(config: Any, channels: int, side: int, limit: int) -> Tensor:
    """The first `limit` pictures (N, C, S, S) uint8 of the validation split that a program's settings name."""
    with reading(config.data):
        source = open_measured(config)
        batches = picture_batches(source, channels, side, limit, READ_AT_ONCE, rank=0, num_ranks=1)
        return torch.cat([batch for _, batch in batches])


def read_images(source: ImageSource, channels: int, side: int) -> LabelledImages:
    """Every picture of a split, its short side brought to `side` and the centred square cut out.

    Raises UserError for a row without a class; whatever decoding raises otherwise.
    """
    pixels, labels = [], []
    for row in source.rows:
        label = row[source.label_column]
        if label is None or label < 0:
            raise UserError(
                f"{source.name(row)} has no class; name a split where all have one: split=... eval_split=..."
            )
        pixels.append(square(source, row, channels, side))
        labels.append(label)
    return LabelledImages(torch.stack(pixels), torch.tensor(labels))


def square(source: ImageSource, row: dict[str, Any], channels: int, side: int) -> Tensor:
    """The picture of a row (C, S, S) uint8: its short side brought to `side` and the centred square cut out."""
    return pil_to_tensor(prepare_pil(source.image(row), channels, 1, side))
