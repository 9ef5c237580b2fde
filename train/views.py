"""A data set as the pictures that are encoded: which shard they go to, the views of each image, batches from workers.

The plan depends on the data alone, whatever the ranks and workers. Shapes: B batch, C channels, S image_size in pixels.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tokenizer import ImageTokenizer
from tokenizer.images import convert, pil_to_tensor, prepare_pil, resize_short_side

from .config import UserError
from .data import holding_signals, outlive_signals, picture_to_cut, random_square
from .settings import PHOTOGRAPHS, StoreRun
from .sources import ImageSource, Unreadable, is_path, reading
from .token_store import NO_LABEL, shard_name

MARGIN = 1.1  # of ten_crop: the short side that is cropped, against the side of the crops
READ_AT_ONCE = 16  # rows of a stream
ON_HUB = re.compile(r"^hf://datasets/[^:]+?@[^/]+/([^:]+)$|/datasets--[^/]+/snapshots/[0-9a-f]{40}/(.+)$")

Sources = dict[str, ImageSource]  # by the split of the store
View = tuple[str, Tensor]  # what its key ends in, uint8 (C, S, S)


@dataclass(frozen=True)
class Shard:
    """One file of the store."""

    split: str
    number: int
    num_shards: int  # of the split
    rows: range | None  # of the split; None: those in the stream's own shard of that number

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number, self.num_shards)


def plan_shards(sources: Sources, rows_per_shard: int) -> list[Shard]:
    """Every shard of the store: so many images each, or for a stream one for each of its own shards."""
    return [shard for split in sources for shard in shards_of_split(split, sources[split].rows, rows_per_shard)]


def shards_of_split(split: str, rows: Dataset | IterableDataset, rows_per_shard: int) -> list[Shard]:
    if not isinstance(rows, Dataset):
        return [Shard(split, number, rows.num_shards, None) for number in range(rows.num_shards)]
    starts = range(0, max(1, len(rows)), rows_per_shard)
    parts = [range(start, min(start + rows_per_shard, len(rows))) for start in starts]
    return [Shard(split, number, len(parts), part) for number, part in enumerate(parts)]


def num_views(config: StoreRun, split: str) -> int:
    """Pictures made of each image of a split."""
    if config.views == "random_crops":
        return config.num_crops
    return {"center": 1, "flip": 2, "ten_crop": 10}[config.views] if split == "train" else 1


class ViewMaker:
    """The views of an image that the settings ask for, prepared as `tokenizer.encode` prepares pictures."""

    def __init__(self, config: StoreRun, tokenizer: ImageTokenizer):
        self.kind, self.size, self.num_crops, self.seed = config.views, config.image_size, config.num_crops, config.seed
        self.channels, self.resize = tokenizer.config.image_channels, tokenizer.config.resize
        self.factor = tokenizer.downsample_factor

    def views(self, image: Image.Image, training: bool, row: tuple[int, ...]) -> Iterable[View]:
        """All views of an image whose place in the data is `row`; raises at once what decoding raises."""
        if self.kind == "random_crops":
            picture = picture_to_cut(image, self.channels, self.resize, self.size)
            return (self.random_crop(picture, training, row, number) for number in range(self.num_crops))
        if self.kind == "ten_crop" and training:
            return with_mirror_images(self.five_crops(image))
        center = [("", pil_to_tensor(prepare_pil(image, self.channels, self.factor, self.size)))]
        return with_mirror_images(center) if self.kind == "flip" and training else center

    def five_crops(self, image: Image.Image) -> list[View]:
        """The four corners and the centre."""
        image = resize_short_side(convert(image, self.channels), round(MARGIN * self.size))
        bottom, right = image.height - self.size, image.width - self.size
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        picture = pil_to_tensor(image)
        return [
            (f"#crop{number}", picture[:, top : top + self.size, left : left + self.size])
            for number, (top, left) in enumerate(corners)
        ]

    def random_crop(self, picture: Tensor, training: bool, row: tuple[int, ...], number: int) -> View:
        """A function of picture, seed, row and number alone; half of the crops to train on are mirrored."""
        random = np.random.default_rng((self.seed, *row, number))
        crop = (f"#crop{number}", random_square(picture, self.size, random))
        return mirrored(crop) if training and random.random() < 0.5 else crop


def mirrored(view: View) -> View:
    suffix, picture = view
    return f"{suffix}#flip", picture.flip(2)


def with_mirror_images(views: list[View]) -> list[View]:
    return [*views, *map(mirrored, views)]


@dataclass
class ShardBatch:
    """Pictures of one shard, and what was met on the way to them."""

    shard: Shard
    pictures: Tensor  # uint8 (B, C, S, S), of any shape where B is 0
    labels: list[int]
    keys: list[str]
    num_images: int  # read, unreadable ones included
    unreadable: list[Unreadable]  # by their keys
    is_last: bool  # of its shard


class ShardPictures(torch.utils.data.IterableDataset):
    """ShardBatch after ShardBatch, each shard whole and by one worker; a UserError in their place ends them."""

    def __init__(self, shards: list[Shard], sources: Sources, config: StoreRun, tokenizer: ImageTokenizer):
        self.shards, self.sources, self.maker = shards, sources, ViewMaker(config, tokenizer)
        self.data, self.batch_size = config.data, config.batch_size
        self.conditional = tokenizer.config.num_classes > 0

    def __iter__(self) -> Iterator[ShardBatch | UserError]:
        worker = torch.utils.data.get_worker_info()
        try:
            for shard in self.shards[worker.id :: worker.num_workers] if worker else self.shards:
                yield from self.batches(shard)
        except UserError as error:  # raised here, it would reach the main process as a page of text
            yield error

    def batches(self, shard: Shard) -> Iterator[ShardBatch]:
        """The batches of a shard; only the last one is not full."""
        met: list[Unreadable | None] = []  # an entry for each image, None for a good one
        pictures = self.pictures(shard, met)
        is_last = False
        while not is_last:
            views = list(itertools.islice(pictures, self.batch_size))
            is_last = len(views) < self.batch_size
            images, labels, keys = zip(*views, strict=True) if views else ([torch.empty(0)], (), ())
            unreadable = [each for each in met if each]
            yield ShardBatch(shard, torch.stack(images), [*labels], [*keys], len(met), unreadable, is_last)
            met.clear()

    def pictures(self, shard: Shard, met: list[Unreadable | None]) -> Iterator[tuple[Tensor, int, str]]:
        """(picture, label, key) of every view in a shard; an entry is added to `met` for each image."""
        source, taken = self.sources[shard.split], set()
        for number, row in self.numbered_rows(shard):
            key = key_of(row[source.image_column], self.data, shard.split, number, taken)
            label = row[source.label_column] if source.label_column else None
            try:
                if self.conditional:
                    source.label(row)
                views = self.maker.views(source.image(row), shard.split == "train", number)
            except Exception as error:  # a decoder may raise anything on damaged bytes
                met.append((key, str(error)))
                continue
            met.append(None)
            for suffix, picture in views:
                yield picture, NO_LABEL if label is None else label, key + suffix

    def numbered_rows(self, shard: Shard) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
        """The rows of a shard, still encoded, with their number in the split, or in a stream's shard of that number."""
        rows = self.sources[shard.split].rows
        with reading(self.data):
            if shard.rows is not None:
                yield from zip(((number,) for number in shard.rows), rows.select(shard.rows), strict=True)
                return
            # In batches: row by row a stream deals itself out among the workers of a loader, here once too often.
            batches = rows.shard(num_shards=shard.num_shards, index=shard.number).iter(READ_AT_ONCE)
            streamed = (row for batch in batches for row in rows_of(batch))
            yield from (((shard.number, number), row) for number, row in enumerate(streamed))


def rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """A batch of columns, row by row."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def shard_batches(
    shards: list[Shard], sources: Sources, config: StoreRun, tokenizer: ImageTokenizer
) -> Iterable[ShardBatch | UserError]:
    """The batches of these shards; the shards that are read at the same time take turns."""
    pictures = ShardPictures(shards, sources, config, tokenizer)
    num_workers = min(config.num_workers, len(shards))
    loader = DataLoader(pictures, batch_size=None, num_workers=num_workers, worker_init_fn=outlive_signals)
    with holding_signals():
        return iter(loader)


def key_of(value: dict[str, Any] | None, data: str, split: str, number: tuple[int, ...], taken: set[str]) -> str:
    """What tells a row from all others: its file's path in the data, else the file's name if any and `split/number`.

    `taken` are the paths met before in the shard; one that comes again is given its number too.
    """
    path, place = (value or {}).get("path"), "/".join(map(str, (split, *number)))
    if not path:
        return place
    known = path_within(path, data) if value["bytes"] is None else None
    if known and known not in taken:
        taken.add(known)
        return known
    return f"{known or PurePosixPath(path.partition('::')[0]).name}@{place}"


def path_within(path: str, data: str) -> str | None:
    """A file's path inside the folder or data set of the Hub that `data` names; None for one that lies elsewhere."""
    if data == PHOTOGRAPHS:
        return Path(path).name
    if on_hub := ON_HUB.search(path):
        return on_hub[1] or on_hub[2]
    root = folder_named(data) if is_path(data) and "::" not in path else None
    return Path(path).relative_to(root).as_posix() if root and Path(path).is_relative_to(root) else None


def folder_named(data: str) -> Path:
    """The folder that a path or a pattern starts with, absolute."""
    path = Path(os.path.abspath(os.path.expanduser(data)))
    while glob.has_magic(str(path)) or path.is_file():
        path = path.parent
    return path
