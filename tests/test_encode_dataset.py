"""The program that makes token stores: real processes for kills, signals and ranks; the rest in this one."""

import json
import shutil
import signal
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import fill, picture, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import TWO_RANKS, interrupt, run
from test_data import png, write_parquet
from tiny_stores import SIZE, by_key, encode, settings

from tokenizer import ImageTokenizer
from train.config import RunError, UserError, launch
from train.encode_dataset import encode_dataset, main, open_tokenizer, repo_id_of
from train.settings import SourceSettings, StoreRun
from train.sources import ImageSource
from train.token_store import INDEX_NAME, TokenStore
from train.views import plan_shards

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "train" / "encode_dataset.py")
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator", "own_cache"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine with a single core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # fork, Python >= 3.12
]


def command(config: StoreRun, *launcher: str) -> list[str]:
    plain = {key: value for key, value in asdict(config).items() if isinstance(value, (str, int)) and value != ""}
    return [sys.executable, *launcher, PROGRAM, "speed.threads=1", *(f"{key}={value}" for key, value in plain.items())]


def contents(folder: Path | str) -> dict[str, Any]:
    """All rows of every shard, and tokens.json."""
    shards = {path.name: pq.read_table(path).to_pylist() for path in sorted(Path(folder).glob("*.parquet"))}
    return shards | {INDEX_NAME: json.loads((Path(folder) / INDEX_NAME).read_text())}


# What is in a store.


def test_the_tokens_are_those_of_encode_with_labels_classes_and_keys(tiny_tokenizer, two_classes, tmp_path):
    store = encode(settings(tiny_tokenizer, two_classes, tmp_path / "store"))
    tokenizer = ImageTokenizer.from_pretrained(tiny_tokenizer)
    assert store.stamp.class_names == ["cat", "dog"]
    for split, size in (("train", 14), ("validation", 5)):
        rows = store.rows(split)
        assert len(rows) == store.index.num_rows[split] == size
        for row in rows:
            tokens = tokenizer.encode(Image.open(two_classes / row["key"]), resize=SIZE)
            assert row["tokens"].tolist() == tokens.flatten().tolist()
            assert store.stamp.class_names[row["label"]] == Path(row["key"]).parent.name
    store.check_tokenizer(tokenizer.fingerprint)
    stamp = store.stamp
    assert (stamp.vocab_size, stamp.grids, stamp.tokens_per_image) == (32, [[4, 4]], 16)
    assert (stamp.image_size, stamp.image_channels, stamp.tokenizer) == (SIZE, 3, None)
    assert len(store.shards["train"]) == 4
    assert len(store.shards["validation"]) == 2


def test_in_the_fast_mode_tokens_are_those_of_the_fast_tokenizer_and_the_store_is_the_tokenizers(
    tiny_tokenizer, two_classes, tmp_path
):
    tokenizer, generator = ImageTokenizer.from_pretrained(tiny_tokenizer), torch.Generator().manual_seed(0)
    for tensor in (*tokenizer.parameters(), tokenizer.quantizer.codebook):
        tensor.data = torch.randn(tensor.shape, generator=generator)  # those too that start at nought
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = settings(str(tmp_path / "tokenizer"), two_classes, tmp_path / "store", fast=True)
    store = encode(made)
    store.check_tokenizer(tokenizer.fingerprint)
    assert store.stamp.fast
    fast, changed = deepcopy(tokenizer).fast(), 0
    for row in store.rows("train"):
        picture = Image.open(two_classes / row["key"])
        assert row["tokens"].tolist() == fast.encode(picture, resize=SIZE).flatten().tolist()
        changed += row["tokens"].tolist() != tokenizer.encode(picture, resize=SIZE).flatten().tolist()
    assert changed > 0  # or it would show nothing
    with pytest.raises(UserError, match="fast"):
        encode(replace(made, fast=False))


def test_nothing_in_a_store_but_run_yaml_names_a_local_folder(tiny_tokenizer, two_classes, tmp_path):
    folder = Path(encode(settings(tiny_tokenizer, two_classes, tmp_path / "store")).folder)
    files = [path for path in folder.iterdir() if path.name != "run.yaml"]
    assert len(files) == 8
    for path in files:
        assert not any(str(place).encode() in path.read_bytes() for place in (two_classes, tiny_tokenizer, tmp_path))


def test_grey_tokenizers_and_pictures_of_all_sizes(tmp_path, two_classes):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny_config(image_channels=1, resize=20))
    tokenizer.save_pretrained(tmp_path / "grey")
    store = encode(settings(str(tmp_path / "grey"), two_classes, tmp_path / "store"))
    for key, tokens in by_key(store, "validation").items():
        assert tokens == tokenizer.encode(Image.open(two_classes / key), resize=SIZE).flatten().tolist()
    assert store.stamp.image_channels == 1


def test_a_published_tokenizer_is_named_by_its_repo_id(tiny_tokenizer, two_classes, tmp_path):
    published = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    (published / "run.yaml").write_text("push_to_hub: org/tiny\n")
    assert encode(settings(str(published), two_classes, tmp_path / "store")).stamp.tokenizer == "org/tiny"


# The plan, workers, ranks, kills and signals.


@given(num_rows=st.integers(0, 200), rows_per_shard=st.integers(1, 60))
def test_the_plan_holds_each_row_once_in_order(num_rows, rows_per_shard):
    rows = datasets.Dataset.from_dict({"image": list(range(num_rows))})
    shards = plan_shards({"train": ImageSource(rows, "image", None, None)}, rows_per_shard)
    assert [number for shard in shards for number in shard.rows] == list(range(num_rows))
    assert all(len(shard.rows) == rows_per_shard for shard in shards[:-1])
    assert [shard.name for shard in shards] == [
        f"train-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))
    ]


@pytest.fixture(scope="module")
def crops(tiny_tokenizer, two_classes, tmp_path_factory) -> StoreRun:
    """Settings whose store is large enough to be interrupted, and is there."""
    config = settings(
        tiny_tokenizer, two_classes, tmp_path_factory.mktemp("crops") / "store", views="random_crops", num_crops=20
    )
    encode(config)
    return config


def test_workers_and_batches_leave_the_store_as_it_is(crops, tmp_path):
    other = replace(crops, output_dir=str(tmp_path / "store"), num_workers=3, batch_size=50)
    encode(other)
    assert contents(tmp_path / "store") == contents(crops.output_dir)


def test_two_ranks_make_the_store_of_one(crops, tmp_path):
    config = replace(crops, output_dir=str(tmp_path / "store"), num_workers=1)
    done = run(command(config, *TWO_RANKS))
    assert done.returncode == 0, done.stderr
    assert "shard 3/3: " in done.stderr  # of six: there really were two
    assert contents(tmp_path / "store") == contents(crops.output_dir)


def test_a_killed_program_started_again_makes_the_missing_shards_and_nothing_twice(crops, tmp_path):
    folder = tmp_path / "store"
    arguments = command(replace(crops, output_dir=str(folder), num_workers=2, batch_size=2))
    code, told = interrupt(arguments, signal.SIGKILL, at="shard 1/6: ")
    assert code == -signal.SIGKILL, told
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 1 <= len(finished) < 6
    assert not (folder / INDEX_NAME).exists()
    (folder / ".train-00003-of-00004.parquet.1.part").write_bytes(b"left by the killed one")
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert f"shard {len(finished)}/6" not in done.stderr
    assert f"shard {len(finished) + 1}/6" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(folder) == contents(crops.output_dir)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("send", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_cleanly_and_the_same_settings_go_on(crops, tmp_path, send):
    folder = tmp_path / "store"
    config = replace(crops, output_dir=str(folder), num_workers=1, batch_size=2)
    code, told = interrupt(command(config), send, at="shard 1/6: ")
    assert code == 130, told
    assert told.splitlines()[-1].endswith(f"finished shards are in {folder}, the same command goes on")
    assert "Traceback" not in told
    assert 1 <= len(list(folder.glob("*.parquet"))) < 6
    assert not list(folder.glob(".*"))
    encode(config)
    assert contents(folder) == contents(crops.output_dir)


def test_progress_tells_shards_images_speed_and_time_left(tiny_tokenizer, two_classes, tmp_path, capsys):
    encode(settings(tiny_tokenizer, two_classes, tmp_path / "store"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"shard {number}/6" for number in range(1, 7)]
    assert lines[-1].split(", ")[0] == "shard 6/6: 19 images"
    assert all("images/s" in line and line.endswith(" left") for line in lines)


def test_on_a_terminal_a_bar_counts_the_images(tiny_tokenizer, two_classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    encode(settings(tiny_tokenizer, two_classes, tmp_path / "store"))
    told = capsys.readouterr().err
    assert "19/19" in told
    assert "shard " not in told


def test_a_finished_store_says_so_and_changes_nothing(crops, caplog):
    before = {path: path.stat().st_mtime_ns for path in Path(crops.output_dir).iterdir()}
    with caplog.at_level("INFO"):
        encode(crops)
    assert "holds the finished token store" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in Path(crops.output_dir).iterdir()}


# Unreadable images.


@pytest.fixture
def damaged(tmp_path) -> Path:
    fill(tmp_path / "data/train", 10)
    fill(tmp_path / "data/validation", 2)
    for name in ("train/003.png", "train/007.png"):
        (tmp_path / "data" / name).write_bytes(b"damaged")
    return tmp_path / "data"


def test_unreadable_images_are_skipped_named_and_counted_over_interruptions(tiny_tokenizer, damaged, tmp_path, caplog):
    config = settings(
        tiny_tokenizer, damaged, tmp_path / "store", data_options=SourceSettings(max_corrupt_fraction=0.2)
    )
    store = encode(config)
    assert "train/003.png" in caplog.text
    assert set(by_key(store, "train")) == {f"train/{number:03d}.png" for number in range(10) if number not in (3, 7)}
    assert store.index.unreadable_images == {"train": 2, "validation": 0}
    (store.folder / INDEX_NAME).unlink()
    store.shards["train"][0].unlink()  # with one of the two; as if stopped before
    assert encode(config).index == store.index


def test_too_many_unreadable_images_stop_the_program_and_a_higher_limit_goes_on(tiny_tokenizer, damaged, tmp_path):
    config = settings(tiny_tokenizer, damaged, tmp_path / "store")
    with pytest.raises(RunError, match="2 of 10 images cannot be read, above data_options.max_corrupt_fraction=0.01"):
        encode(config)
    assert not (tmp_path / "store" / INDEX_NAME).exists()
    assert list((tmp_path / "store").glob("*.parquet"))
    config.data_options.max_corrupt_fraction = 0.2
    assert encode(config).index.unreadable_images["train"] == 2


def test_too_many_unreadable_images_are_found_though_no_single_start_met_them_all(tiny_tokenizer, damaged, tmp_path):
    config = settings(
        tiny_tokenizer, damaged, tmp_path / "store", data_options=SourceSettings(max_corrupt_fraction=0.2)
    )
    store = encode(config)
    (store.folder / INDEX_NAME).unlink()
    config.data_options.max_corrupt_fraction = 0.01
    with pytest.raises(RunError, match="2 of 10 images cannot be read"):
        encode(config)


def test_a_stream_that_cannot_be_read_any_further_is_one_line(tiny_tokenizer, tmp_path):
    for part in range(3):
        write_parquet(tmp_path / "data" / f"train-{part}.parquet", [png(picture(part))] * 3)
    write_parquet(tmp_path / "data" / "validation.parquet", [png(picture(9))])
    (tmp_path / "data" / "train-2.parquet").write_bytes(b"no parquet")
    config = settings(tiny_tokenizer, tmp_path / "data", tmp_path / "store", streaming=True, num_workers=1)
    with pytest.raises(RunError, match="cannot be read: .*finished shards are safe.*the same command goes on") as error:
        encode(config)
    assert "\n" not in str(error.value)
    assert len(list((tmp_path / "store").glob("*.parquet"))) >= 1
    assert not list((tmp_path / "store").glob(".*"))


# What is refused.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("image_size=9", "image_size=9 must be a positive multiple of downsample_factor=2"),
        ("tokenizer=./nowhere", "train one first with `accelerate launch train/vqvae.py`, or give"),
        ("tokenizer=runs/vqvae", "there is no such folder"),
        ("data=./nowhere", "read as a path"),
        ("views=all", "views"),
        ("rows_per_shard=0", "rows_per_shard=0 must be >= 1"),
        ("push_to_hub=a/b", "card.license=..."),
        ("push_to_hub=a/b card.license=mit card.data_license=mit", "must come with card.data=..."),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2_before_anything_is_written(
    changed, message, tiny_tokenizer, two_classes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = [f"tokenizer={tiny_tokenizer}", f"data={two_classes}", "image_size=8", "output_dir=store", *changed.split()]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *given])
    with pytest.raises(SystemExit) as exit_:
        launch(main, StoreRun)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def unfinish(store: TokenStore) -> None:
    (store.folder / INDEX_NAME).unlink()
    store.shards["train"][-1].unlink()


@pytest.mark.parametrize("finished", [False, True])
def test_a_retrained_tokenizer_is_refused_with_both_fingerprints(tiny_tokenizer, two_classes, tmp_path, finished):
    retrained = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    config = settings(str(retrained), two_classes, tmp_path / "store")
    store = encode(config)
    if not finished:
        unfinish(store)
    torch.manual_seed(1)
    ImageTokenizer(tiny_config()).save_pretrained(retrained)
    prints = f"{store.stamp.tokenizer_fingerprint}.* is now {open_tokenizer(str(retrained)).fingerprint}"
    with pytest.raises(UserError, match=f"{prints}; give another output_dir=..., or delete"):
        encode(config)


def test_data_that_has_changed_since_is_refused(tiny_tokenizer, tmp_path):
    fill(tmp_path / "data/train", 6)
    fill(tmp_path / "data/validation", 2)
    config = settings(tiny_tokenizer, tmp_path / "data", tmp_path / "store")
    unfinish(encode(config))
    fill(tmp_path / "data/train", 6, first=10)
    with pytest.raises(UserError, match="does not fit data=.*, which has changed since; give another output_dir"):
        encode(config)


def test_a_damaged_shard_is_refused_with_the_way_out(tiny_tokenizer, two_classes, tmp_path):
    config = settings(tiny_tokenizer, two_classes, tmp_path / "store")
    store = encode(config)
    unfinish(store)
    store.shards["train"][0].write_bytes(b"half a shard")
    with pytest.raises(UserError, match="00000-of-00004.parquet is damaged .*delete it and give the same command"):
        encode(config)
    store.shards["train"][0].unlink()
    assert encode(config).index == store.index


def test_a_lost_shard_of_a_finished_store_is_made_again(tiny_tokenizer, two_classes, tmp_path):
    config = settings(tiny_tokenizer, two_classes, tmp_path / "store")
    store = encode(config)
    expected = contents(store.folder)
    store.shards["train"][1].write_bytes(b"half a shard")
    with pytest.raises(UserError, match="00001-of-00004.parquet is damaged .*delete it; then give the same command"):
        encode(config)
    store.shards["train"][1].unlink()
    encode(config)
    assert contents(store.folder) == expected


def test_a_tokenizer_and_a_store_may_lie_under_the_home_folder(tiny_tokenizer, two_classes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer")
    config = settings("~/tokenizer", two_classes, Path("~/store"))
    AcceleratorState._reset_state(reset_partial_state=True)
    encode_dataset(config, Accelerator(cpu=True))
    assert TokenStore.open(tmp_path / "store").stamp.tokenizer is None
    assert not (tmp_path / "~").exists()


def test_a_tokenizer_published_without_its_owner_is_not_named(tiny_tokenizer, tmp_path):
    published = Path(shutil.copytree(tiny_tokenizer, tmp_path / "tokenizer"))
    (published / "run.yaml").write_text("push_to_hub: tiny\n")
    assert repo_id_of(str(published)) is None


@pytest.mark.parametrize("change", [{"image_size": 10}, {"views": "flip"}, {"seed": 1}, {"rows_per_shard": 5}])
def test_a_folder_with_other_settings_is_refused(crops, change):
    with pytest.raises(UserError, match="holds a run with other settings"):
        encode(replace(crops, **change))


def test_a_full_disk_is_one_line_and_finished_shards_stay(crops, tmp_path):
    config = replace(crops, output_dir=str(tmp_path / "store"), num_workers=0, rows_per_shard=14)
    failed = run(["bash", "-c", f"ulimit -f 4; exec {' '.join(map(repr, command(config)))}"])  # files of at most 4 KiB
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "make room and give the same command again" in failed.stderr.splitlines()[-1]
    assert len(encode(config).shards["train"]) == 1
