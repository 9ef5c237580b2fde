"""A token store: the token grids of a whole data set, and what they must never be parted from.

train-00000-of-00007.parquet, validation-00000-of-00001.parquet, each row one encoded picture:
    tokens  unsigned integers, the smallest type that holds the vocabulary; L of them, grid after grid, row-major,
            with several codebooks all tokens of a place together: reshaped to (-1, *stamp.token_shape), what decodes
    label   int64, -1 where the data has no classes
    key     string, where in the data the picture comes from; views of one image end in #crop3, #flip or both
README.md       the data set's card, by which `datasets.load_dataset` finds the splits
run.yaml        the settings; may hold local paths and is never published
tokens.json     StoreIndex, written last: a folder without it is no complete store

Each shard carries the StoreStamp in its schema's metadata. L is tokens_per_image.
"""

import json
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, List, Value, disable_progress_bars, load_dataset
from huggingface_hub import DatasetCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from tokenizer.pretrained import PretrainedConfig, written_whole

INDEX_NAME = "tokens.json"
SPLITS = ("train", "validation")
NO_LABEL = -1
ROWS_PER_GROUP = 4096  # of a parquet file; as many rows wait in memory for each shard that is being written
STAMP_KEY, COUNTS_KEY = b"tokengrid", b"tokengrid_shard"  # in a shard's metadata

USAGE = """
from datasets import load_dataset

rows = load_dataset("{source}", split="train").with_format("numpy")
tokens = rows[:64]["tokens"]  # integers (64, {length}) in [0, {size}), row-major; {layout}
"""


@dataclass
class StoreStamp(PretrainedConfig):
    """What a token means, with `format_version` on disk; ValueError where the values contradict each other."""

    tokenizer_fingerprint: str  # of the only tokenizer that can read these tokens
    tokenizer: str | None  # its repo id, where it has one
    vocab_size: int  # every token lies in [0, vocab_size)
    grids: list[list[int]]  # [h, w] of each grid of a picture, in the order of its tokens
    tokens_per_image: int  # L, the sum of h * w, times num_codebooks
    image_size: int  # pixels, side of the square that was encoded
    image_channels: int  # 3 RGB or 1 grey
    class_names: list[str] | None  # of labels 0, 1, ...
    num_codebooks: int = field(default=1, kw_only=True)  # q, tokens at each place of a grid
    fast: bool = field(default=False, kw_only=True)  # encoded in the fast mode, where a few tokens are others

    format_version: ClassVar[int] = 3
    later_keys: ClassVar[dict[str, tuple[int, Any]]] = {"num_codebooks": (2, 1), "fast": (3, False)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if self.num_codebooks < 1:
            raise ValueError(f"num_codebooks={self.num_codebooks} must be at least 1")
        num_tokens = sum(height * width for height, width in self.grids) * self.num_codebooks
        if self.tokens_per_image < 1 or self.tokens_per_image != num_tokens:
            raise ValueError(f"tokens_per_image={self.tokens_per_image} must be the tokens of the {described(self)}")

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of the tokens of one picture as its tokenizer takes them: (h, w), (h, w, q) or (L,)."""
        if len(self.grids) > 1:
            return (self.tokens_per_image,)
        return (*self.grids[0], self.num_codebooks) if self.num_codebooks > 1 else tuple(self.grids[0])

    def means_the_same(self, other: "StoreStamp") -> bool:
        """Whether rows under both stamps may lie in one store; a tokenizer can be published after it was used."""
        return replace(self, tokenizer=None) == replace(other, tokenizer=None)

    def to_json(self) -> str:
        return json.dumps({"format_version": self.format_version} | asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """What `to_json` wrote; ValueError for a newer version, an unknown or missing key, or what is not JSON."""
        try:
            values = json.loads(text)
            version = values.pop("format_version", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{where} does not describe a token store ({error}); encode the data again") from None
        return cls.from_dict(values, version, where)


@dataclass
class StoreIndex(StoreStamp):
    """tokens.json: the stamp, and what the shards hold together."""

    num_rows: dict[str, int]  # of each split
    unreadable_images: dict[str, int]  # of each split, skipped

    @property
    def stamp(self) -> StoreStamp:
        values = asdict(self)
        del values["num_rows"], values["unreadable_images"]
        return StoreStamp(**values)


def described(stamp: StoreStamp) -> str:
    """The grids of a picture, in words."""
    grids = ", ".join(f"{height} x {width}" for height, width in stamp.grids)
    return f"grids of {grids}" + (f" with {stamp.num_codebooks} tokens a place" if stamp.num_codebooks > 1 else "")


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token."""
    return np.min_scalar_type(vocab_size - 1)


def schema_of(stamp: StoreStamp) -> pa.Schema:
    """The columns of a shard, for pyarrow and (under `huggingface`) for `datasets`, with the stamp."""
    tokens = List(Value(token_type(stamp.vocab_size).name), length=stamp.tokens_per_image)
    label = ClassLabel(names=stamp.class_names) if stamp.class_names else Value("int64")
    schema = Features({"tokens": tokens, "label": label, "key": Value("string")}).arrow_schema
    return schema.with_metadata(schema.metadata | {STAMP_KEY: stamp.to_json().encode()})


def shard_name(split: str, number: int, num_shards: int) -> str:
    """The file of one shard."""
    return f"{split}-{number:05d}-of-{num_shards:05d}.parquet"


class ShardWriter:
    """One shard, written aside; `finish` gives it its name, `abandon` leaves nothing of it."""

    def __init__(self, path: Path, stamp: StoreStamp):
        self.stamp, self.schema, self.files = stamp, schema_of(stamp), ExitStack()
        self.parquet = pq.ParquetWriter(self.files.enter_context(written_whole(path)), self.schema)
        self.waiting: list[pa.RecordBatch] = []
        self.num_waiting = 0
        self.num_images = self.num_unreadable = 0  # that the shard is made from, the unreadable ones among them

    def append(self, tokens: np.ndarray, labels: list[int], keys: list[str]) -> None:
        """Add rows: tokens (B, L) in [0, vocab_size), B labels and B keys."""
        assert tokens.shape == (len(keys), self.stamp.tokens_per_image)
        values = pa.array(tokens.astype(token_type(self.stamp.vocab_size)).reshape(-1))
        columns = [pa.FixedSizeListArray.from_arrays(values, tokens.shape[1]), pa.array(labels, pa.int64()), keys]
        self.waiting.append(pa.record_batch(columns, schema=self.schema))
        self.num_waiting += len(keys)
        while self.num_waiting >= ROWS_PER_GROUP:
            self.write(ROWS_PER_GROUP)

    def write(self, num_rows: int) -> None:
        """Write so many of the waiting rows as one group, whatever the batches they came in."""
        table = pa.Table.from_batches(self.waiting, self.schema)
        self.parquet.write_table(table.slice(0, num_rows), row_group_size=num_rows)
        self.waiting = table.slice(num_rows).to_batches()
        self.num_waiting -= num_rows

    def finish(self) -> None:
        """Give the shard its name: it is whole."""
        if self.num_waiting:
            self.write(self.num_waiting)
        counts = {"num_images": self.num_images, "num_unreadable": self.num_unreadable}
        self.parquet.add_key_value_metadata({COUNTS_KEY: json.dumps(counts)})
        self.parquet.close()
        self.files.close()

    def abandon(self) -> None:
        """Throw away what was written."""
        with suppress(OSError):  # of a full disk, again
            self.parquet.close()
        with suppress(InterruptedError), self.files:
            raise InterruptedError


@dataclass
class ShardSummary:
    """What a finished shard says of itself."""

    stamp: StoreStamp
    num_rows: int
    num_images: int  # that it was made from, unreadable ones included
    num_unreadable: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """From the file's metadata alone; ValueError for a damaged file or one that is no shard of a token store."""
        try:
            found = pq.read_metadata(path)
            stamp, counts = found.metadata[STAMP_KEY], json.loads(found.metadata[COUNTS_KEY])
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged or no shard of a token store ({error}); delete it") from None
        return cls(StoreStamp.from_json(stamp, str(path)), found.num_rows, **counts)


class TokenStore:
    """A complete token store, opened for reading; `stamp` says what its tokens mean."""

    def __init__(self, folder: Path, index: StoreIndex):
        """ValueError or FileNotFoundError unless the shards in the folder are those of the index."""
        self.folder, self.index, self.stamp = folder, index, index.stamp
        self.shards = {split: shards_of(folder, split, index) for split, rows in index.num_rows.items() if rows}
        if not self.shards:
            raise ValueError(f"{folder} holds no tokens; encode data that has readable images")

    @classmethod
    def open(cls, path_or_repo: str | Path, revision: str | None = None) -> Self:
        """A store from a folder, or from the Hub by its data set id (from its cache without a connection).

        Raises FileNotFoundError where there is no complete store, ValueError where its files contradict each other.
        """
        folder = Path(path_or_repo).expanduser()
        if not folder.is_dir():
            folder = download(str(path_or_repo), revision)
        path = folder / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(lacking_index(folder))
        return cls(folder, StoreIndex.from_json(path.read_bytes(), str(path)))

    @property
    def splits(self) -> list[str]:
        """The splits that hold rows."""
        return list(self.shards)

    def rows(self, split: str) -> Dataset:
        """`tokens` (L), `label` and `key` of each picture, in numpy format: rows[[0, 1]]["tokens"] is int64 (2, L).

        Memory-mapped: `datasets` keeps a copy in its cache on disk. ValueError for a split that the store lacks.
        """
        if split not in self.shards:
            raise ValueError(f"split={split!r} has no rows in {self.folder}; it has {', '.join(self.splits)}")
        disable_progress_bars()
        files = {split: [str(path) for path in self.shards[split]]}
        return load_dataset("parquet", data_files=files, split=split).with_format("numpy")

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise ValueError unless the store's tokens are those of the tokenizer with this fingerprint."""
        if fingerprint != self.stamp.tokenizer_fingerprint:
            made_by = f" ({self.stamp.tokenizer})" if self.stamp.tokenizer else ""
            raise ValueError(
                f"the tokens in {self.folder} are those of tokenizer {self.stamp.tokenizer_fingerprint}{made_by}, "
                f"not of {fingerprint}; give that tokenizer, or encode the data again into another output_dir"
            )


def shards_of(folder: Path, split: str, index: StoreIndex) -> list[Path]:
    """The shards of a split in order; FileNotFoundError where one is missing, ValueError where one does not belong."""
    found = {path.name: path for path in folder.glob(f"{split}-*-of-*.parquet")}
    totals = {name.removesuffix(".parquet").rpartition("-")[2] for name in found}
    if len(totals) > 1:
        raise ValueError(f"{folder} holds {split} shards of {len(totals)} stores; keep those of one")
    expected = [shard_name(split, number, int(total)) for total in totals for number in range(int(total))]
    missing = [name for name in expected if name not in found] if found else [f"{split}-*.parquet"]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of its files, such as {missing[0]}; fetch it again")
    summaries = [ShardSummary.read(found[name]) for name in expected]
    for name, summary in zip(expected, summaries, strict=True):
        if not summary.stamp.means_the_same(index.stamp):
            raise ValueError(f"{folder / name} is of another store than {INDEX_NAME}; fetch or encode it again")
    num_rows = sum(summary.num_rows for summary in summaries)
    if num_rows != index.num_rows[split]:
        raise ValueError(
            f"{folder} holds {num_rows} {split} rows and {INDEX_NAME} says {index.num_rows[split]}; "
            f"fetch or encode it again"
        )
    return [found[name] for name in expected]


def lacking_index(folder: Path) -> str:
    """Why a folder without tokens.json cannot be opened, and what to do."""
    settings = folder / "run.yaml"
    if settings.is_file() and "\nrows_per_shard: " in settings.read_text():  # a training run has none
        return (
            f"{folder} is an unfinished token store; "
            f"`accelerate launch train/encode_dataset.py {settings} output_dir={folder}` finishes it"
        )
    return f"{folder} has no {INDEX_NAME}; pass the folder of a token store, which train/encode_dataset.py makes"


def download(repo_id: str, revision: str | None) -> Path:
    """The folder in the Hub's cache that holds a store; FileNotFoundError naming both readings."""
    try:
        patterns = [INDEX_NAME, "*.parquet"]
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join([line for line in str(error).splitlines() if line][:2])  # the status, then what was missing
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a token store that could be read from the Hub ({reason}); "
            f"check the spelling, the connection and the access token"
        ) from error


def render_card(index: StoreIndex, source: str, stated: dict[str, Any]) -> str:
    """README.md: how to load the splits from `source`, what the tokens mean, and what is stated of licence and data."""
    files = [{"split": split, "path": f"{split}-*.parquet"} for split, num_rows in index.num_rows.items() if num_rows]
    configs = [{"config_name": "default", "data_files": files}]
    metadata = DatasetCardData(license=stated["Tokens"], tags=["tokengrid", "image-tokens"], configs=configs)
    facts = facts_of(index)
    numbers = {"length": index.tokens_per_image, "size": index.vocab_size}
    usage = USAGE.format(source=source, layout=described(index), **numbers)
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {source.rpartition('/')[2]}"]
    parts.append("Pictures as grids of discrete tokens, made by tokengrid.")
    parts.append(f"```python\n{usage.strip()}\n```")
    parts.append("| what | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items()))
    parts.append("## Licence and data\n\n" + "\n".join(f"- {k}: {v or 'not stated'}" for k, v in stated.items()))
    return "\n\n".join(parts) + "\n"


def facts_of(index: StoreIndex) -> dict[str, Any]:
    """What the card's table says."""
    counts = {f"{split} rows": f"{num_rows:,}" for split, num_rows in index.num_rows.items() if num_rows}
    return counts | {
        "grids": described(index).removeprefix("grids of "),
        "vocabulary": f"{index.vocab_size:,}",
        "pictures": f"{index.image_size} x {index.image_size} pixels, {index.image_channels} channels",
        "classes": len(index.class_names or []) or "none",
        "tokenizer": index.tokenizer or "not published",
        "its fingerprint": f"`{index.tokenizer_fingerprint}`",
    }
