"""Images for training and validation, read through `datasets`; what is random depends on (seed, epoch, sample) alone.

`data` is "photographs" (those inside scikit-image and scikit-learn), a path on disk or a Hub id. Images stay encoded
until a worker needs them, so that an unreadable one can be skipped, counted and named.
"""

import glob
import itertools
import logging
import os
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, disable_progress_bars, load_dataset_builder
from datasets.data_files import SPLIT_KEYWORDS
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from tokenizer.images import convert, pil_to_tensor, prepare_pil, resize_short_side

from .config import DataSettings, RunError, TokenizerRun, UserError

log = logging.getLogger(__name__)

EMBEDDED = {  # colour photographs that the two packages ship; the validation ones are seen in training by no crop
    "train": {
        "skimage": "astronaut.png coffee.png hubble_deep_field.jpg ihc.png motorcycle_left.png motorcycle_right.png "
        "retina.jpg rocket.jpg",
        "sklearn": "china.jpg",
    },
    "validation": {"skimage": "chelsea.png", "sklearn": "flower.jpg"},
}
HELD_OUT = 50  # one image in fifty is held out where the data has no validation split
MAX_EVAL_SIDE = 1024  # pixels; larger validation images are cropped to it
PROBED_IMAGES = 64  # before a run starts, until one can be read
CACHE_BYTES = 256 * 2**20  # decoded images that a worker keeps
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
SPLIT_FOLDERS = {name for names in SPLIT_KEYWORDS.values() for name in names}  # which are no classes
MAX_EMPTY_EPOCHS = 10  # in a row; then a worker whose share of a stream holds no row ends

Unreadable = tuple[str, str]  # the name of an image and why it could not be decoded
Batches = Iterator[tuple[Tensor, list[Unreadable]]]  # crops uint8 (B, C, S, S), the unreadable images met on the way


@dataclass
class ImageSource:
    """The rows of a split, images still encoded, and what its columns are."""

    rows: Dataset | IterableDataset
    image_column: str
    label_column: str | None
    class_names: list[str] | None

    def image(self, row: dict[str, Any]) -> PILImage.Image:
        """The decoded picture of a row; raises whatever the decoder raises."""
        return Image().decode_example(row[self.image_column])

    def name(self, row: dict[str, Any]) -> str:
        """What tells a row's image from all others: its path, with a checksum where its bytes lie in the row."""
        value = row[self.image_column] or {"bytes": None, "path": "a row without an image"}
        if value["bytes"] is None:
            return value["path"]
        return f"{value['path'] or 'an image'} (crc32 {zlib.crc32(value['bytes']):08x})"


def open_sources(config: TokenizerRun) -> tuple[ImageSource, list[dict[str, Any]]]:
    """The training images, and the first `data_options.eval_images` rows of the validation images.

    A stream without a validation split is read until so many held-out rows are found, or to its end.
    """
    try:
        train, validation = load_splits(config)
        source = find_columns(train, config.data, config.data_options)
        if validation is None:
            source.rows, validation = hold_out(source, config.seed)
        else:
            validation = encoded(validation, source.image_column, source.label_column)
        eval_rows = list(itertools.islice(validation, config.data_options.eval_images))
    except UserError:
        raise
    except Exception as error:  # datasets raises a different type for every way in which reading can fail
        kind = "path to images, parquet or tar files" if is_path(config.data) else "Hub id, for there is no such path"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data={config.data} (read as a {kind}) cannot be read: {reason[:300]}") from None
    if not eval_rows:
        raise UserError(f"data={config.data} has no image to validate on; name a split that has some: eval_split=...")
    return source, eval_rows


def embedded(split: str) -> Dataset:
    """The photographs inside scikit-image and scikit-learn as a dataset of their files."""
    import skimage
    import sklearn

    folders = {"skimage": Path(skimage.__path__[0], "data"), "sklearn": Path(sklearn.__path__[0], "datasets/images")}
    paths = [str(folders[package] / name) for package, names in EMBEDDED[split].items() for name in names.split()]
    return Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))


def load_splits(config: TokenizerRun) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training split, and the validation split where there is one."""
    if config.data == "photographs":
        return embedded("train"), embedded("validation")
    arguments = locate(config.data, config.data_options.subset)
    if is_path(config.data):
        disable_progress_bars()  # opening files on disk is quick; a download is not
    builder = load_dataset_builder(**arguments)
    names = [str(name) for name in builder.info.splits or builder.config.data_files or []]
    wanted = config.eval_split or next((name for name in ("validation", "test") if name in names), None)
    for key, name in [("split", config.split), ("eval_split", wanted)]:
        if name is not None and names and name not in names:
            raise UserError(f"{key}={name} is not a split of {config.data}; it has {', '.join(names)}")
    if config.streaming:
        splits = builder.as_streaming_dataset()
    else:
        builder.download_and_prepare()
        splits = builder.as_dataset()
    return splits[config.split], splits[wanted] if wanted not in (None, config.split) else None


def is_path(data: str) -> bool:
    """Whether `data` means the disk: it exists there, has a wildcard, or starts as only paths do."""
    return data.startswith((".", "/", "~")) or os.path.exists(data) or glob.has_magic(data)


def locate(data: str, subset: str | None) -> dict[str, Any]:
    """The arguments by which `datasets` opens `data`; UserError for a path where nothing is."""
    if not is_path(data):
        return {"path": data, "name": subset}
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"data={data} cannot be read: permission denied; change its mode or run as its owner")
        return {"path": path}
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"data={data} is read as a path, and there is no file or folder of that name")
    return {"path": BUILDERS.get(Path(files[0]).suffix.lower(), "imagefolder"), "data_files": {"train": files}}


def find_columns(rows: Dataset | IterableDataset, data: str, options: DataSettings) -> ImageSource:
    """The image and the class column by their feature type, or as the options name them; UserError where unclear."""
    features = rows.features or rows._resolve_features().features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    labels = [name for name, class_names in classes.items() if not SPLIT_FOLDERS.issuperset(class_names)]
    for key, name in [("image_column", options.image_column), ("label_column", options.label_column)]:
        if name is not None and name not in features:
            raise UserError(f"data_options.{key}={name} is not a column of {data}; it has {', '.join(features)}")
    if options.image_column is None and len(images) != 1:
        found = f"{len(images)} columns of images ({', '.join(images)})" if images else "no column of images"
        raise UserError(f"{data} has {found} among {', '.join(features)}; choose one: data_options.image_column=...")
    image_column = options.image_column or images[0]
    label_column = options.label_column or (labels[0] if len(labels) == 1 else None)
    return ImageSource(encoded(rows, image_column, label_column), image_column, label_column, classes.get(label_column))


def encoded(rows: Dataset | IterableDataset, image_column: str, label_column: str | None) -> Dataset | IterableDataset:
    """The two columns that are used, images as they lie in the files; any other may be damaged or costly to decode."""
    columns = [image_column] if label_column is None else [image_column, label_column]
    if isinstance(rows, IterableDataset) and rows.features:
        rows = rows.decode(False)  # streams of the Hub come with a decoder ahead of ours, which damaged bytes end
    return rows.select_columns(columns).cast_column(image_column, Image(decode=False))


def hold_out(source: ImageSource, seed: int) -> tuple[Any, Any]:
    """Training and validation rows from one split, the same for every rank, run and order of reading."""
    if isinstance(source.rows, Dataset):
        if len(source.rows) < 2:
            raise UserError("the data holds a single image; one to train on and one to validate on are the least")
        parts = source.rows.train_test_split(max(1, len(source.rows) // HELD_OUT), seed=seed)
        return parts["train"], parts["test"]
    parts = [{"column": source.image_column, "seed": seed, "held_out": held_out} for held_out in (False, True)]
    return tuple(source.rows.filter(is_in_part, fn_kwargs=part) for part in parts)


def is_in_part(row: dict[str, Any], column: str, seed: int, held_out: bool) -> bool:
    """Whether a streamed row is in that part; its bytes decide, or its file's name, the same wherever the data lies."""
    value = row[column] or {"bytes": None, "path": None}
    content = value["bytes"] or "/".join(Path(value["path"] or "").parts[-2:]).encode()
    return (content != b"" and zlib.crc32(content, seed) % HELD_OUT == 0) == held_out


class CropMaker:
    """Training crops of one source: a picture prepared, cut at random, perhaps mirrored."""

    def __init__(self, source: ImageSource, config: TokenizerRun):
        self.source, self.size, self.flip = source, config.image_size, config.data_options.flip
        self.shuffle_colors = config.data_options.shuffle_colors
        self.channels, self.resize, self.seed = config.model.image_channels, config.model.resize, config.seed

    def picture(self, row: dict[str, Any]) -> Tensor:
        """A row's picture as uint8 (C, H, W), both sides at least the crop's; raises whatever decoding raises."""
        image = convert(self.source.image(row), self.channels)
        if self.resize is not None:
            image = resize_short_side(image, self.resize)
        if min(image.size) < self.size:
            image = resize_short_side(image, self.size)
        return pil_to_tensor(image)

    def crop(self, picture: Tensor, *sample: int) -> Tensor:
        """uint8 (C, image_size, image_size), a function of the picture, the seed and the sample's numbers alone."""
        random = np.random.default_rng((self.seed, *sample))
        top, left = (int(random.integers(side - self.size + 1)) for side in picture.shape[1:])
        cut = picture[:, top : top + self.size, left : left + self.size]
        cut = cut.flip(2) if self.flip and random.random() < 0.5 else cut
        if random.random() < self.shuffle_colors:  # a few photographs hold few colours
            cut = cut[random.permutation(len(cut))]
        return cut


class MappedCrops(torch.utils.data.Dataset):
    """(epoch, index) -> (crop, the unreadable images met on the way); decoded pictures are kept while there is room."""

    def __init__(self, source: ImageSource, config: TokenizerRun):
        self.maker, self.rows = CropMaker(source, config), source.rows
        self.kept: dict[int, Tensor] = {}
        self.room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: tuple[int, int]) -> tuple[Tensor, list[Unreadable]]:
        epoch, index = sample
        corrupt: list[Unreadable] = []
        for candidate in (*range(index, len(self)), *range(index)):  # the next readable one stands in
            try:
                return self.maker.crop(self.picture(candidate), epoch, index), corrupt
            except Exception as error:  # a decoder may raise anything on damaged bytes
                corrupt.append((self.maker.source.name(self.rows[candidate]), str(error)))
        raise RuntimeError("no image of the data can be read any more")

    def picture(self, index: int) -> Tensor:
        """The prepared picture of a row, decoded once where it can be kept."""
        picture = self.kept.get(index)
        if picture is None:
            picture = self.maker.picture(self.rows[index])
            if picture.numel() <= self.room:
                self.room -= picture.numel()
                self.kept[index] = picture
        return picture


class StreamedCrops(torch.utils.data.IterableDataset):
    """The same from a stream, endless: each row once per epoch over all ranks and workers.

    A resumed run replays the seeded order: in place of its first `skip` crops each worker yields nothing, having read
    but not decoded them; images that were unreadable (`known_corrupt`) made no crop and do not count.
    """

    def __init__(self, source: ImageSource, config: TokenizerRun, rank: int, skip: int, known_corrupt: set[str]):
        self.maker, self.rows, self.rank, self.skip = CropMaker(source, config), source.rows, rank, skip
        self.buffer, self.known_corrupt = config.data_options.shuffle_buffer, known_corrupt

    def __iter__(self) -> Iterator[tuple[Tensor, list[Unreadable]]]:
        worker = torch.utils.data.get_worker_info()
        corrupt: list[Unreadable] = []
        skip, empty_epochs = self.skip, 0
        for epoch in itertools.count():
            # A new shuffle rather than set_epoch: its epoch lives in memory that all workers share and would race for.
            rows = self.rows.shuffle(seed=self.maker.seed + epoch, buffer_size=self.buffer)
            number = -1
            for number, row in enumerate(rows):
                if skip > 0:
                    if not (self.known_corrupt and self.maker.source.name(row) in self.known_corrupt):
                        skip -= 1
                        yield torch.empty(0), []
                    continue
                try:
                    picture = self.maker.picture(row)
                except Exception as error:  # a decoder may raise anything on damaged bytes
                    corrupt.append((self.maker.source.name(row), str(error)))
                    continue
                yield self.maker.crop(picture, epoch, self.rank, worker.id if worker else 0, number), corrupt
                corrupt = []
            if 0 <= number < len(corrupt):
                raise RunError(f"none of a worker's {number + 1} images can be read, such as {': '.join(corrupt[-1])}")
            empty_epochs = empty_epochs + 1 if number < 0 else 0  # shards are dealt anew in each epoch
            if empty_epochs == MAX_EMPTY_EPOCHS:
                return


class EndlessOrder(Sampler[tuple[int, int]]):
    """(epoch, index) of every sample of every epoch, the order of an epoch drawn from (seed, epoch) alone."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for epoch in itertools.count():
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            yield from ((epoch, int(index)) for index in order)


def collate(samples: list[tuple[Tensor, list[Unreadable]]]) -> tuple[Tensor, list[Unreadable]]:
    """A batch of crops uint8 (B, C, S, S) and the unreadable images met while making it."""
    crops, corrupt = zip(*samples, strict=True)
    return torch.stack(crops), list(itertools.chain.from_iterable(corrupt))


def outlive_signals(worker: int) -> None:
    """A pre-empting scheduler signals every process of a job; the workers must live until the checkpoint is written."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def training_batches(
    source: ImageSource, config: TokenizerRun, accelerator: Accelerator, batches_done: int, known_corrupt: set[str]
) -> Batches:
    """This rank's batches from number `batches_done` on, without end, on the accelerator's device."""
    shared = {"batch_size": config.batch_size, "collate_fn": collate, "worker_init_fn": outlive_signals}
    shared |= {"pin_memory": accelerator.device.type == "cuda", "generator": torch.Generator()}
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    if isinstance(source.rows, Dataset):
        shared |= {"sampler": EndlessOrder(len(source.rows), config.seed), "num_workers": config.num_workers}
        loader = DataLoader(MappedCrops(source, config), **shared)
        # Not Accelerator's method of that name, which would keep a reference to every loader of every evaluation.
        dealt = prepare_data_loader(loader, accelerator.device, num_ranks, rank, put_on_device=True)
        return iter(skip_first_batches(dealt, batches_done))
    rows = split_dataset_by_node(source.rows, rank, num_ranks)
    num_workers = min(config.num_workers, rows.num_shards)
    skip = batches_done // max(1, num_workers) * config.batch_size  # workers take turns, a batch each
    crops = StreamedCrops(replace(source, rows=rows), config, rank, skip, known_corrupt)
    loader = DataLoader(crops, num_workers=num_workers, **shared)
    return placed(itertools.islice(loader, batches_done, None), accelerator)


def placed(batches: Batches, accelerator: Accelerator) -> Batches:
    """A stream's batches on the accelerator's device; RunError where they end, which those of an empty share do."""
    for images, corrupt in batches:
        yield images.to(accelerator.device, non_blocking=True), corrupt
    raise RunError(f"the stream holds no image for rank {accelerator.process_index}; start fewer processes")


def evaluation_batches(
    source: ImageSource, rows: list[dict[str, Any]], config: TokenizerRun, factor: int
) -> Iterator[Tensor]:
    """Whole validation pictures as `encode` prepares them, uint8 (B, C, H, W); neighbours of one size share a batch."""
    batch: list[Tensor] = []
    for row in rows:
        try:
            image = prepare_pil(source.image(row), config.model.image_channels, factor, config.model.resize)
        except Exception as error:  # a decoder may raise anything on damaged bytes
            log.warning("validation image skipped: %s: %s", source.name(row), error)
            continue
        picture, limit = pil_to_tensor(image), MAX_EVAL_SIDE // factor * factor
        top, left = (max(0, side - limit) // 2 for side in picture.shape[1:])
        picture = picture[:, top : top + limit, left : left + limit]
        if batch and (batch[0].shape != picture.shape or len(batch) == config.batch_size):
            yield torch.stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield torch.stack(batch)


def check_readable(source: ImageSource, data: str) -> None:
    """Raise UserError where none of the first images can be read."""
    failures: list[str] = []
    for row in itertools.islice(source.rows, PROBED_IMAGES):
        try:
            convert(source.image(row), 3)
            return
        except Exception as error:  # a decoder may raise anything on damaged bytes
            failures.append(f"{source.name(row)}: {error}")
    example = f", such as {failures[0]}" if failures else ": there is none"
    raise UserError(f"data={data}: none of the first {len(failures)} images can be read{example}")


class CorruptCounter:
    """Names each unreadable image in the log once, and stops the run where there are too many."""

    def __init__(self, config: TokenizerRun, source: ImageSource, known: set[str]):
        self.fraction, self.names = config.data_options.max_corrupt_fraction, set(known)
        self.num_rows = len(source.rows) if isinstance(source.rows, Dataset) else None
        self.images_seen = 0

    def add(self, num_images: int, corrupt: list[Unreadable]) -> None:
        """Count a batch; RunError once more than the fraction (and more than one) could not be read."""
        self.images_seen += num_images
        for name, reason in corrupt:
            if name not in self.names:
                self.names.add(name)
                log.warning("unreadable image %d skipped: %s: %s", len(self.names), name, reason)
        total = self.num_rows or max(self.images_seen, 1000)  # of a stream, so that its first image decides nothing
        if len(self.names) > max(1, self.fraction * total):
            raise RunError(
                f"{len(self.names)} of {total} images cannot be read, above data_options.max_corrupt_fraction="
                f"{self.fraction}; the log names them: mend or remove them, or raise it"
            )
