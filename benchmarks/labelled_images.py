"""Labelled images in memory: read from any source of the training programs, all brought to one square.

Shapes: N images, C channels, S side in pixels.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.images import pil_to_tensor, prepare_pil
from train.config import UserError
from train.sources import ImageSource


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
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


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
        pixels.append(pil_to_tensor(prepare_pil(source.image(row), channels, 1, side)))
        labels.append(label)
    return LabelledImages(torch.stack(pixels), torch.tensor(labels))
