"""Images for training and validation; what is random depends on (seed, epoch, sample) alone."""

import itertools
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from tokenizer.images import convert, pil_to_tensor, prepare_pil, resize_short_side

from .config import RunError
from .settings import AutoencoderRun
from .sources import ImageSource, Unreadable

log = logging.getLogger(__name__)

MAX_EVAL_SIDE = 1024  # pixels; larger validation images are cropped to it
CACHE_BYTES = 256 * 2**20  # decoded images that a worker keeps
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_EMPTY_EPOCHS = 10  # in a row; then a worker whose share of a stream holds no row ends

Sample = tuple[Tensor, int | None, list[Unreadable]]  # a crop, its class, the unreadable images met on the way
Row = dict[str, Any]


class Batch(NamedTuple):
    """What a training step takes; a tuple, whose parts Accelerate can move to a device."""

    crops: Tensor  # uint8 (B, C, S, S)
    labels: Tensor | None  # (B,) int64; None for an unconditional model
    corrupt: list[Unreadable]  # met while making it


class CropMaker:
    """Training crops of one source: a picture prepared, cut at random, perhaps mirrored; for some models its class."""

    def __init__(self, source: ImageSource, config: AutoencoderRun):
        self.source, self.size, self.flip = source, config.image_size, config.data_options.flip
        self.shuffle_colors = config.data_options.shuffle_colors
        self.channels, self.resize, self.seed = config.model.image_channels, config.model.resize, config.seed
        self.conditional = config.model.num_classes > 0

    def picture(self, row: Row) -> tuple[Tensor, int | None]:
        """A row's picture as uint8 (C, H, W), both sides at least the crop's, and its class for a conditional model.

        Raises whatever decoding raises, or ValueError for a class that is missing.
        """
        label = self.source.label(row) if self.conditional else None
        return picture_to_cut(self.source.image(row), self.channels, self.resize, self.size), label

    def crop(self, picture: Tensor, *sample: int) -> Tensor:
        """uint8 (C, image_size, image_size), a function of the picture, the seed and the sample's numbers alone."""
        random = np.random.default_rng((self.seed, *sample))
        cut = random_square(picture, self.size, random)
        cut = cut.flip(2) if self.flip and random.random() < 0.5 else cut
        if random.random() < self.shuffle_colors:  # a few photographs hold few colours
            cut = cut[random.permutation(len(cut))]
        return cut


def picture_to_cut(image: PILImage.Image, channels: int, resize: int | None, size: int) -> Tensor:
    """A picture from which squares of `size` pixels can be cut: uint8 (C, H, W), the short side `resize` if given."""
    image = convert(image, channels)
    if resize is not None:
        image = resize_short_side(image, resize)
    if min(image.size) < size:
        image = resize_short_side(image, size)
    return pil_to_tensor(image)


def random_square(picture: Tensor, size: int, random: np.random.Generator) -> Tensor:
    """uint8 (C, size, size), cut out of a picture (C, H, W) where the generator says."""
    top, left = (int(random.integers(side - size + 1)) for side in picture.shape[1:])
    return picture[:, top : top + size, left : left + size]


class MappedCrops(torch.utils.data.Dataset):
    """(epoch, index) -> (crop, class, unreadable images met on the way); pictures are kept while there is room."""

    def __init__(self, source: ImageSource, config: AutoencoderRun):
        self.maker, self.rows = CropMaker(source, config), source.rows
        self.kept: dict[int, tuple[Tensor, int | None]] = {}
        self.room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: tuple[int, int]) -> Sample:
        epoch, index = sample
        corrupt: list[Unreadable] = []
        for candidate in itertools.chain(range(index, len(self)), range(index)):  # the next readable one stands in
            try:
                picture, label = self.picture(candidate)
                return self.maker.crop(picture, epoch, index), label, corrupt
            except Exception as error:  # a decoder may raise anything on damaged bytes
                corrupt.append((self.maker.source.name(self.rows[candidate], candidate), str(error)))
        raise RunError(f"none of the {len(self)} images can be read any more, such as {': '.join(corrupt[-1])}")

    def picture(self, index: int) -> tuple[Tensor, int | None]:
        """The prepared picture of a row and its class, decoded once where it can be kept."""
        found = self.kept.get(index)
        if found is None:
            found = self.maker.picture(self.rows[index])
            size = found[0].numel()
            if size <= self.room:
                self.room -= size
                self.kept[index] = found
        return found


class StreamedCrops(torch.utils.data.IterableDataset):
    """The same from a stream, endless: each row once per epoch over all ranks and workers.

    A resumed run replays the seeded order: in place of its first `skip` crops each worker yields nothing, having read
    but not decoded them; images that were unreadable (`known_corrupt`) made no crop and do not count.
    """

    def __init__(self, source: ImageSource, config: AutoencoderRun, rank: int, skip: int, known_corrupt: set[str]):
        self.maker, self.rows, self.rank, self.skip = CropMaker(source, config), source.rows, rank, skip
        self.buffer, self.known_corrupt = config.data_options.shuffle_buffer, known_corrupt

    def __iter__(self) -> Iterator[Sample]:
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
                        yield torch.empty(0), None, []
                    continue
                try:
                    picture, label = self.maker.picture(row)
                except Exception as error:  # a decoder may raise anything on damaged bytes
                    corrupt.append((self.maker.source.name(row), str(error)))
                    continue
                yield self.maker.crop(picture, epoch, self.rank, worker.id if worker else 0, number), label, corrupt
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


def collate(samples: list[Sample]) -> Batch:
    """One batch of its samples."""
    crops, labels, corrupt = zip(*samples, strict=True)
    told = None if None in labels else torch.tensor(labels)
    return Batch(torch.stack(crops), told, list(itertools.chain.from_iterable(corrupt)))


def outlive_signals(worker: int) -> None:
    """A pre-empting scheduler signals every process of a job; the workers must live until the checkpoint is written.

    A second signal ends them, so that one that hangs in a read cannot hold up the end of the job.
    """

    def outlive_one(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for name in STOP_SIGNALS:
        signal.signal(name, outlive_one)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see holding_signals


@contextmanager
def holding_signals() -> Iterator[None]:
    """Workers started inside the block get signals only once `outlive_signals` is in place, this process after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def training_batches(
    source: ImageSource, config: AutoencoderRun, accelerator: Accelerator, batches_done: int, known_corrupt: set[str]
) -> Iterator[Batch]:
    """This rank's batches from number `batches_done` on, without end, on the accelerator's device."""
    if isinstance(source.rows, Dataset):
        crops = MappedCrops(source, config)
        options = {"num_workers": config.num_workers, "worker_init_fn": outlive_signals}
        return dealt_batches(crops, config.batch_size, config.seed, accelerator, batches_done, collate, **options)
    rows = split_dataset_by_node(source.rows, accelerator.process_index, accelerator.num_processes)
    num_workers = min(config.num_workers, rows.num_shards)
    skip = batches_done // max(1, num_workers) * config.batch_size  # workers take turns, a batch each
    crops = StreamedCrops(replace(source, rows=rows), config, accelerator.process_index, skip, known_corrupt)
    options = {"num_workers": num_workers, "worker_init_fn": outlive_signals, "generator": torch.Generator()}
    loader = DataLoader(
        crops, config.batch_size, collate_fn=collate, pin_memory=accelerator.device.type == "cuda", **options
    )
    with holding_signals():
        batches = itertools.islice(loader, batches_done, None)
    return placed(batches, accelerator)


def dealt_batches(
    samples: torch.utils.data.Dataset,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
    batches_done: int,
    collate_fn: Callable[[Any], Any],
    **options: Any,
) -> Iterator[Any]:
    """A rank's share of the batches of all epochs of `samples`, indexed (epoch, index), after the first so many.

    The order of all samples is drawn from the seed and then dealt out, a batch to each rank in turn. On the
    accelerator's device; `options` are those of DataLoader.
    """
    loader = DataLoader(
        samples,
        batch_size,
        sampler=EndlessOrder(len(samples), seed),
        collate_fn=collate_fn,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),
        **options,
    )
    # Not Accelerator's method of that name, which would keep a reference to every loader of every evaluation.
    ranks = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    dealt = prepare_data_loader(loader, accelerator.device, put_on_device=True, **ranks)
    batches = iter(skip_first_batches(dealt, batches_done))
    with holding_signals():  # the workers start with the first batch
        first = next(batches)
    return itertools.chain([first], batches)


def placed(batches: Iterator[Batch], accelerator: Accelerator) -> Iterator[Batch]:
    """A stream's batches on the accelerator's device; RunError where they end, which those of an empty share do."""
    for crops, labels, corrupt in batches:
        moved = [None if part is None else part.to(accelerator.device, non_blocking=True) for part in (crops, labels)]
        yield Batch(*moved, corrupt)
    raise RunError(f"the stream holds no image for rank {accelerator.process_index}; start fewer processes")


def evaluation_batches(
    source: ImageSource, rows: list[Row], config: AutoencoderRun, factor: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Whole validation pictures as `encode` prepares them, uint8 (B, C, H, W); neighbours of one size share a batch.

    Beside them their labels (B,) int64 for a conditional model, else None.
    """
    batch: list[Tensor] = []
    labels: list[int] = []
    conditional = config.model.num_classes > 0
    for row in rows:
        try:
            label = source.label(row) if conditional else None
            image = prepare_pil(source.image(row), config.model.image_channels, factor, config.model.resize)
        except Exception as error:  # a decoder may raise anything on damaged bytes
            log.warning("validation image skipped: %s: %s", source.name(row), error)
            continue
        picture, limit = pil_to_tensor(image), MAX_EVAL_SIDE // factor * factor
        top, left = (max(0, side - limit) // 2 for side in picture.shape[1:])
        picture = picture[:, top : top + limit, left : left + limit]
        if batch and (batch[0].shape != picture.shape or len(batch) == config.batch_size):
            yield torch.stack(batch), torch.tensor(labels) if conditional else None
            batch, labels = [], []
        batch.append(picture)
        labels.append(label)
    if batch:
        yield torch.stack(batch), torch.tensor(labels) if conditional else None
