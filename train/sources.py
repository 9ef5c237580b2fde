"""Where images come from, read through `datasets`: embedded photographs, a path on disk or a Hub id.

Images stay encoded until a worker needs them, so that an unreadable one can be skipped, counted and named.
"""

import glob
import itertools
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, disable_progress_bars, load_dataset_builder
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image as PILImage

from tokenizer.images import convert

from .config import RunError, UserError
from .settings import PHOTOGRAPHS, AutoencoderRun, SourceSettings, StoreRun

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
PROBED_IMAGES = 64  # before a run starts, until one can be read
SKETCHED_IMAGES = 64  # at least, spread over all, where there are so many
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
IMAGE_SUFFIXES = tuple(ImageFolder.EXTENSIONS)
HIDDEN = (".", "__")  # so begins the name of a folder that `datasets` takes for hidden
SPLIT_FOLDERS = {name for names in SPLIT_KEYWORDS.values() for name in names}  # which are no classes

Unreadable = tuple[str, str]  # the name of an image and why it could not be decoded


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

    def label(self, row: dict[str, Any]) -> int:
        """The class of a row; ValueError where it has none."""
        label = row[self.label_column]
        if label is None or label < 0:
            raise ValueError("it has no class")
        return label

    def sketch(self) -> dict[str, int] | None:
        """How many rows there are and a checksum over some of them, by which others are told; None for a stream.

        Of an image in a file of its own the file's name and size count, of one in a row its bytes.
        """
        if not isinstance(self.rows, Dataset):
            return None
        number, checksum = len(self.rows), 0
        for index in range(0, number, max(1, number // SKETCHED_IMAGES)):
            image = self.rows[index][self.image_column] or {"bytes": None, "path": None}
            in_file = image["bytes"] is None and os.path.isfile(image["path"] or "")
            size = os.path.getsize(image["path"]) if in_file else 0
            checksum = zlib.crc32(b"%b %d" % (content_of(image), size), checksum)
        return {"images": number, "crc32": checksum}

    def name(self, row: dict[str, Any], number: int | None = None) -> str:
        """What tells a row's image from all others: its path, with a checksum where its bytes lie in the row.

        Without a path it is the number of the row, where that is known.
        """
        value = row[self.image_column] or {"bytes": None, "path": None}
        nameless = "a row without an image" if value["bytes"] is None else "an image"
        name = value["path"] or (nameless if number is None else f"row {number}")
        return name if value["bytes"] is None else f"{name} (crc32 {zlib.crc32(value['bytes']):08x})"


def open_sources(config: AutoencoderRun) -> tuple[ImageSource, list[dict[str, Any]]]:
    """The training images, and the first `data_options.eval_images` rows of the validation images.

    A stream without a validation split is read until so many held-out rows are found, or to its end.
    """
    source, validation = open_splits(config)
    with reading(config.data):
        eval_rows = list(itertools.islice(validation.rows, config.data_options.eval_images))
    if not eval_rows:
        raise UserError(f"data={config.data} has no image to validate on; name a split that has some: eval_split=...")
    return source, eval_rows


def open_splits(config: AutoencoderRun | StoreRun) -> tuple[ImageSource, ImageSource]:
    """The training and the validation images."""
    with reading(config.data):
        train, validation = load_splits(config)
        source = find_columns(train, config.data, config.data_options)
        if validation is None:
            train, validation = hold_out(source, config.seed)
        else:
            train, validation = source.rows, encoded(validation, source.image_column, source.label_column)
    return replace(source, rows=train), replace(source, rows=validation)


def open_measured(config: AutoencoderRun | StoreRun) -> ImageSource:
    """The validation images for what trains nothing: a split that is named is then whole, even where it is `split`."""
    if config.eval_split != config.split:
        return open_splits(config)[1]
    with reading(config.data):
        rows, _ = load_splits(config)
        return find_columns(rows, config.data, config.data_options)


@contextmanager
def reading(data: str) -> Iterator[None]:
    """A UserError in place of whatever reading `data` raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # datasets raises a different type for every way in which reading can fail
        kind = "path to images, parquet or tar files" if is_path(data) else "Hub id, for there is no such path"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data={data} (read as a {kind}) cannot be read: {reason[:300]}") from None


def embedded(split: str) -> Dataset:
    """The photographs inside scikit-image and scikit-learn as a dataset of their files."""
    import skimage
    import sklearn

    folders = {"skimage": Path(skimage.__path__[0], "data"), "sklearn": Path(sklearn.__path__[0], "datasets/images")}
    paths = [str(folders[package] / name) for package, names in EMBEDDED[split].items() for name in names.split()]
    return Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))


def load_splits(
    config: AutoencoderRun | StoreRun,
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The training split, and the validation split where there is one."""
    if config.data == PHOTOGRAPHS:
        if (config.split, config.eval_split or "validation") != tuple(EMBEDDED):
            raise UserError(f"data={PHOTOGRAPHS} has the splits train and validation alone; leave split=... out")
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
        of_files = builder.name == "imagefolder" and os.path.isdir(arguments["path"])
        if of_files and os.environ.get("LOCAL_RANK", "0") == "0":  # of the ranks of a machine one looks
            num_read = sum(part.num_examples for part in builder.info.splits.values())
            warn_of_unread(config.data, arguments["path"], num_read)
    return splits[config.split], splits[wanted] if wanted not in (None, config.split) else None


def warn_of_unread(data: str, folder: str, num_read: int) -> None:
    """Tell of the image files in a folder that `datasets` passes over, and of links, which it does in silence."""
    num_files = num_links = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        num_links += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        num_files += sum(name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".") for name in names)
    if num_files > num_read or num_links:
        log.warning(
            "data=%s: %d of its %d image files are not read and %d links to folders are not followed: `datasets` takes "
            "what a metadata file lists and no more, and nothing beside what is named like a split (train, test, ...); "
            "move them together, or name them by a pattern (%s/**/*.png), which is then all one split",
            *(data, max(0, num_files - num_read), num_files, num_links, data),
        )


def is_path(data: str) -> bool:
    """Whether `data` means the disk: it exists there, has a wildcard, or starts as only paths do."""
    return data.startswith((".", "/", "~")) or os.path.exists(data) or glob.has_magic(data)


def public_name(data: str) -> str | None:
    """What others know the data by: a Hub id or the embedded photographs; None for what lies on this disk alone."""
    return None if is_path(data) and data != PHOTOGRAPHS else data


def locate(data: str, subset: str | None) -> dict[str, Any]:
    """The arguments by which `datasets` opens `data`; UserError for a path where nothing is."""
    if not is_path(data):
        return {"path": data, "name": subset}
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        if glob.has_magic(os.path.abspath(path)):
            raise UserError(
                f"data={data} has one of * ? [ in its name or in that of a folder around it, by which `datasets` would "
                f"look for others; rename that"
            )
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"data={data} cannot be read: permission denied; change its mode or run as its owner")
        return {"path": path}
    files = sorted(os.path.abspath(file) for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise UserError(f"data={data} is read as a path, and there is no file or folder of that name")
    return {
        "path": BUILDERS.get(Path(files[0]).suffix.lower(), "imagefolder"),
        "data_files": {"train": [*map(glob.escape, files)]},
    }


def find_columns(rows: Dataset | IterableDataset, data: str, options: SourceSettings) -> ImageSource:
    """The image and the class column by their feature type, or as the options name them; UserError where unclear."""
    features = rows.features or rows._resolve_features().features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    labels = [name for name, class_names in classes.items() if not SPLIT_FOLDERS.issuperset(class_names)]
    for key, name in [("image_column", options.image_column), ("label_column", options.label_column)]:
        if name is not None and name not in features:
            raise UserError(f"data_options.{key}={name} is not a column of {data}; it has {', '.join(features)}")
    if options.label_column is not None and options.label_column not in classes:
        raise UserError(
            f"data_options.label_column={options.label_column} of {data} holds {features[options.label_column]}, and "
            f"classes are a ClassLabel; make it one with `class_encode_column` of datasets, or leave it out"
        )
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
    """Whether a streamed row is in that part; its content decides."""
    content = content_of(row[column])
    return (content != b"" and zlib.crc32(content, seed) % HELD_OUT == 0) == held_out


def content_of(image: dict[str, Any] | None) -> bytes:
    """The bytes of an encoded image, or its file's name and folder: the same wherever the data lies."""
    image = image or {"bytes": None, "path": None}
    return image["bytes"] or "/".join(Path(image["path"] or "").parts[-2:]).encode()


def check_unchanged(now: dict[str, int] | None, before: dict[str, int] | None, data: str) -> None:
    """Raise UserError where a run that goes on began with other images, as far as sketches of them tell."""
    if None in (before, now) or before == now:
        return
    told = f"{now['images']} training images, and there were {before['images']}"
    told = told if now["images"] != before["images"] else f"{now['images']} training images as before, but others"
    raise UserError(
        f"data={data} is no longer what this run trains on: {told}; put it back as it was, or start a new run with "
        f"another output_dir=..."
    )


def check_classes(given: str, num_classes: int, source: ImageSource, data: str) -> None:
    """Raise UserError unless the data has as many classes as a conditional model knows; `given` is who says so."""
    names = source.class_names or []
    if num_classes and num_classes != len(names):
        listed = f"{len(names)} classes ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
        found = listed if names else "no column of classes (of several, data_options.label_column=... names one)"
        raise UserError(f"{given} asks for {num_classes} classes, and data={data} has {found}; make the two agree")


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

    def __init__(self, config: AutoencoderRun | StoreRun, source: ImageSource, known: set[str], images_seen: int = 0):
        self.fraction, self.names = config.data_options.max_corrupt_fraction, set(known)
        self.num_rows = len(source.rows) if isinstance(source.rows, Dataset) else None
        self.images_seen = images_seen

    def add(self, num_images: int, corrupt: list[Unreadable]) -> None:
        """Count a batch; RunError once more than the fraction (and more than one) could not be read."""
        self.images_seen += num_images
        for name, reason in corrupt:
            if name not in self.names:
                self.names.add(name)
                log.warning("unreadable image %d skipped: %s: %s", len(self.names), name, reason)
        check_corrupt(len(self.names), self.num_rows, self.images_seen, self.fraction)

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Training batches as they are, each one counted."""
        try:
            for batch in batches:
                self.add(len(batch.crops), batch.corrupt)
                yield batch
        except RunError as error:  # a worker's comes with a page of where it was
            raise RunError(str(error).strip().rpartition("RunError: ")[2]) from None


def check_corrupt(num_corrupt: int, num_rows: int | None, images_seen: int, fraction: float) -> None:
    """RunError where more than the fraction of all images, and more than one, could not be read."""
    total = num_rows or max(images_seen, 1000)  # of a stream, so that its first image decides nothing
    if num_corrupt > max(1, fraction * total):
        raise RunError(
            f"{num_corrupt} of {total} images cannot be read, above data_options.max_corrupt_fraction={fraction}; "
            f"the log names them: mend or remove them, or raise it"
        )
