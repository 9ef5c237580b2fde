"""The token store's format: what is written comes back through every door, and what is not a store is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.pretrained import CARD_NAME
from train.config import parse
from train.settings import StoreRun
from train.token_store import (
    INDEX_NAME,
    ROWS_PER_GROUP,
    ShardSummary,
    ShardWriter,
    StoreIndex,
    StoreStamp,
    TokenStore,
    render_card,
    shard_name,
    token_type,
)

pytestmark = pytest.mark.usefixtures("own_cache")
STAMP = StoreStamp("f" * 64, "org/tokenizer", 1000, [[2, 3]], 6, 8, 3, ["cat", "dog"])


def grids(num_rows: int, stamp: StoreStamp = STAMP, seed: int = 0) -> np.ndarray:
    shape = (num_rows, stamp.tokens_per_image)
    return np.random.default_rng(seed).integers(0, stamp.vocab_size, shape)


def write_shard(path: Path, tokens: np.ndarray, stamp: StoreStamp = STAMP, labels: list[int] | None = None) -> None:
    writer = ShardWriter(path, stamp)
    keys = [f"{path.stem}/{number}" for number in range(len(tokens))]
    writer.append(tokens, labels or [number % 2 for number in range(len(tokens))], keys)
    writer.num_images = len(tokens)
    writer.finish()


def write_store(folder: Path, parts: dict[str, list[np.ndarray]], stamp: StoreStamp = STAMP, **index: Any) -> Path:
    """A complete store of these shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in parts.items():
        for number, tokens in enumerate(shards):
            write_shard(folder / shard_name(split, number, len(shards)), tokens, stamp)
    num_rows = {split: sum(map(len, shards)) for split, shards in parts.items()}
    values = {"num_rows": num_rows, "unreadable_images": dict.fromkeys(parts, 0)} | index
    complete = StoreIndex(**vars(stamp), **values)
    stated = {"Tokens": "mit", "Data": "x", "Data licence": None}
    (folder / CARD_NAME).write_text(render_card(complete, str(folder), stated))
    (folder / INDEX_NAME).write_text(complete.to_json())
    return folder


PARTS = {"train": [grids(5, seed=1), grids(4, seed=2)], "validation": [grids(3, seed=3)]}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_store(tmp_path / "store", PARTS)


def test_a_store_gives_back_its_rows_in_order_with_labels_and_keys(folder):
    store = TokenStore.open(folder)
    assert (store.stamp, store.splits) == (STAMP, ["train", "validation"])
    rows = store.rows("train")
    assert np.array_equal(rows[:]["tokens"], np.concatenate(PARTS["train"]))
    assert rows["label"][:].tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert rows[5]["key"] == "train-00001-of-00002/0"
    assert rows.features["label"].names == ["cat", "dog"]
    with pytest.raises(ValueError, match="split='test' has no rows .*; it has train, validation"):
        store.rows("test")


def test_rows_lie_in_memory_mapped_files_and_a_batch_is_an_integer_array(folder):
    rows = TokenStore.open(folder).rows("train")
    assert rows.cache_files
    batch = rows[[7, 0, 3]]["tokens"]
    assert np.issubdtype(batch.dtype, np.integer)
    assert np.array_equal(batch, np.concatenate(PARTS["train"])[[7, 0, 3]])


def test_datasets_alone_reads_splits_and_classes(folder):
    files = {"data_files": {"train": f"{folder}/train-*.parquet"}}
    for rows in (datasets.load_dataset(str(folder)), datasets.load_dataset("parquet", **files)):
        assert rows["train"].features["label"].names == ["cat", "dog"]
        assert rows["train"]["tokens"][:] == np.concatenate(PARTS["train"]).tolist()
    assert list(datasets.load_dataset(str(folder))) == ["train", "validation"]


def test_pyarrow_alone_reads_a_shard(folder):
    table = pq.read_table(folder / "validation-00000-of-00001.parquet")
    assert table.column_names == ["tokens", "label", "key"]
    assert str(table.schema.field("tokens").type).startswith("fixed_size_list<")
    assert table["tokens"].to_pylist() == PARTS["validation"][0].tolist()
    assert json.loads(table.schema.metadata[b"tokengrid"])["tokenizer_fingerprint"] == STAMP.tokenizer_fingerprint


@pytest.mark.parametrize(
    ("stamp", "shape", "said"),
    [
        (STAMP, (2, 3), "grids of 2 x 3\n"),
        (replace(STAMP, num_codebooks=4, tokens_per_image=24), (2, 3, 4), "grids of 2 x 3 with 4 tokens a place\n"),
        (replace(STAMP, grids=[[1, 1], [2, 3]], tokens_per_image=7), (7,), "grids of 1 x 1, 2 x 3\n"),
    ],
)
def test_a_store_knows_the_shape_of_its_tokens_and_says_it(tmp_path, stamp, shape, said):
    tokens = grids(3, stamp)
    store = TokenStore.open(write_store(tmp_path / "store", {"train": [tokens]}, stamp))
    assert store.stamp == stamp
    assert store.stamp.token_shape == shape
    assert np.array_equal(store.rows("train")[:]["tokens"], tokens)
    assert said in (tmp_path / "store" / CARD_NAME).read_text()


@pytest.mark.parametrize(("version", "unknown"), [(1, ["num_codebooks", "fast"]), (2, ["fast"])])
def test_a_store_of_an_older_version_is_read_as_ever(folder, version, unknown):
    def older(values: dict[str, Any]) -> dict[str, Any]:
        return without(values, *unknown) | {"format_version": version}

    rewrite_index(older)(folder)
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        stamp = json.dumps(older(json.loads(table.schema.metadata[b"tokengrid"]))).encode()
        counts = pq.read_metadata(path).metadata[b"tokengrid_shard"]
        pq.write_table(
            table.replace_schema_metadata(table.schema.metadata | {b"tokengrid": stamp, b"tokengrid_shard": counts}),
            path,
        )
    assert TokenStore.open(folder).stamp == STAMP


def test_data_without_classes_keeps_minus_one(tmp_path):
    stamp = replace(STAMP, class_names=None)
    write_shard(tmp_path / "train-00000-of-00001.parquet", grids(2), stamp, [-1, -1])
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train")
    assert rows.features["label"] == datasets.Value("int64")
    assert rows["label"][:] == [-1, -1]


@given(vocab_size=st.one_of(st.integers(1, 2**32), st.sampled_from([256, 257, 2**16, 2**16 + 1])))
def test_the_smallest_unsigned_type_holds_every_token(vocab_size):
    kind = token_type(vocab_size)
    assert kind.kind == "u"
    assert np.iinfo(kind).max >= vocab_size - 1
    assert kind.itemsize == 1 or vocab_size > 2 ** (4 * kind.itemsize)


@pytest.mark.parametrize("vocab_size", [256, 257, 65_537, 2**62])
def test_the_highest_token_survives_in_every_type(tmp_path, vocab_size):
    stamp = replace(STAMP, vocab_size=vocab_size)
    tokens = np.full((2, 6), vocab_size - 1)
    store = TokenStore.open(write_store(tmp_path, {"train": [tokens]}, stamp))
    assert np.array_equal(store.rows("train")[:]["tokens"], tokens)
    schema = pq.read_schema(tmp_path / "train-00000-of-00001.parquet")
    assert str(schema.field("tokens").type.value_type) == token_type(vocab_size).name


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_a_shard_is_the_same_file_whatever_batches_it_came_in(tmp_path_factory, sizes):
    folder, tokens = tmp_path_factory.mktemp("batches"), grids(sum(sizes))
    keys, labels, start = [str(number) for number in range(len(tokens))], [0] * len(tokens), 0
    once, batched = (ShardWriter(folder / name, STAMP) for name in ("once", "batched"))
    once.append(tokens, labels, keys)
    for size in sizes:
        part = slice(start, start := start + size)
        batched.append(tokens[part], labels[part], keys[part])
    once.finish()
    batched.finish()
    assert (folder / "once").read_bytes() == (folder / "batched").read_bytes()
    groups = pq.read_metadata(folder / "once")
    assert groups.num_rows == len(tokens)
    assert groups.num_row_groups == -(-len(tokens) // ROWS_PER_GROUP)


def test_a_shard_has_no_name_before_it_is_whole_and_an_abandoned_one_leaves_nothing(tmp_path):
    writers = {name: ShardWriter(tmp_path / name, STAMP) for name in ("kept", "abandoned")}
    for writer in writers.values():
        writer.append(grids(2), [0, 0], ["a", "b"])
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    writers["abandoned"].abandon()
    writers["kept"].num_images, writers["kept"].num_unreadable = 3, 1
    writers["kept"].finish()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert ShardSummary.read(tmp_path / "kept") == ShardSummary(STAMP, num_rows=2, num_images=3, num_unreadable=1)


def test_another_tokenizer_is_refused_with_both_fingerprints(folder):
    store = TokenStore.open(folder)
    store.check_tokenizer(STAMP.tokenizer_fingerprint)
    with pytest.raises(ValueError, match=f"{STAMP.tokenizer_fingerprint} .org/tokenizer., not of abc; .*output_dir"):
        store.check_tokenizer("abc")


def test_a_tokenizer_published_meanwhile_still_opens_the_store(folder):
    write_shard(folder / "validation-00000-of-00001.parquet", PARTS["validation"][0], replace(STAMP, tokenizer=None))
    assert TokenStore.open(folder).stamp.tokenizer == "org/tokenizer"


def rewrite_index(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / INDEX_NAME
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return rewrite


def without(values: dict, *keys: str) -> dict:
    return {name: value for name, value in values.items() if name not in keys}


def unfinished(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / "run.yaml").write_text("data: photographs\nrows_per_shard: 16\n")


def of_a_training_run(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / "run.yaml").write_text("data: photographs\nsteps: 700\n")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace_shard(stamp: StoreStamp, num_rows: int) -> Callable[[Path], None]:
    return lambda folder: write_shard(folder / "train-00000-of-00002.parquet", grids(num_rows), stamp)


def truncate(folder: Path) -> None:
    path = folder / "train-00000-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def rewrite_shard(folder: Path) -> None:  # by `datasets`, which keeps the rows and drops the stamp
    path = str(folder / "train-00000-of-00002.parquet")
    datasets.load_dataset("parquet", data_files=path, split="train").to_parquet(path)


def shard_of_another_plan(folder: Path) -> None:
    shutil.copy(folder / "train-00000-of-00002.parquet", folder / "train-00000-of-00003.parquet")


BROKEN = [
    (remove(INDEX_NAME), FileNotFoundError, "has no tokens.json; pass the folder of a token store"),
    (of_a_training_run, FileNotFoundError, "has no tokens.json; pass the folder of a token store"),
    (unfinished, FileNotFoundError, "unfinished token store; `accelerate launch train/encode_dataset.py .*run.yaml"),
    (rewrite_index(lambda index: index | {"format_version": 4}), ValueError, "format_version 4 .*upgrade"),
    (rewrite_index(lambda index: without(index, "format_version")), ValueError, "format_version None"),
    (rewrite_index(lambda index: without(index, "grids")), ValueError, "lacks grids"),
    (rewrite_index(lambda index: index | {"gridz": []}), ValueError, "'gridz' .*did you mean 'grids'"),
    (rewrite_index(lambda index: index | {"vocab_size": "9"}), ValueError, "vocab_size='9' must be of type int"),
    (rewrite_index(lambda index: index | {"grids": [[3, 3]]}), ValueError, "tokens_per_image=6 .* grids of 3 x 3"),
    (rewrite_index(lambda index: without(index, "num_codebooks")), ValueError, "lacks num_codebooks"),
    (rewrite_index(lambda index: index | {"num_codebooks": 0}), ValueError, "num_codebooks=0 must be at least 1"),
    (rewrite_index(lambda index: index | {"num_codebooks": 2}), ValueError, "of 2 x 3 with 2 tokens a place"),
    (rewrite_index(lambda index: ["no mapping"]), ValueError, "does not describe a token store"),
    (lambda folder: (folder / INDEX_NAME).write_text("{"), ValueError, "does not describe a token store"),
    (rewrite_index(lambda index: index | {"num_rows": {"train": 8, "validation": 3}}), ValueError, "9 train rows .*8"),
    (rewrite_index(lambda index: index | {"num_rows": {"train": 0}}), ValueError, "holds no tokens"),
    (remove("train-00001-of-00002.parquet"), FileNotFoundError, "lacks 1 .*train-00001-of-00002.parquet"),
    (remove("validation-00000-of-00001.parquet"), FileNotFoundError, r"lacks 1 .*validation-\*.parquet"),
    (shard_of_another_plan, ValueError, "train shards of 2 stores"),
    (replace_shard(replace(STAMP, tokenizer_fingerprint="e" * 64), 5), ValueError, "is of another store"),
    (replace_shard(STAMP, 4), ValueError, "holds 8 train rows and tokens.json says 9"),
    (rewrite_shard, ValueError, "no shard of a token store"),
    (truncate, ValueError, "train-00000-of-00002.parquet is damaged"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), BROKEN)
def test_what_is_no_complete_store_is_one_clear_error(folder, damage, kind, message):
    damage(folder)
    with pytest.raises(kind, match=message) as error:
        TokenStore.open(folder)
    assert "\n" not in str(error.value)


def test_what_is_neither_a_folder_nor_on_the_hub_names_both_readings(tmp_path):
    with pytest.raises(FileNotFoundError, match="'org/nothing' is neither a folder here nor a token store .* the Hub"):
        TokenStore.open("org/nothing")
    with pytest.raises(FileNotFoundError, match="is neither a folder here"):
        TokenStore.open(tmp_path / "nowhere")


def test_a_command_in_the_error_of_an_unfinished_store_is_one_that_the_program_takes(folder):
    unfinished(folder)
    with pytest.raises(FileNotFoundError) as error:
        TokenStore.open(folder)
    arguments = str(error.value).split("`")[1].split()[3:]
    assert parse(StoreRun, arguments).output_dir == str(folder)
