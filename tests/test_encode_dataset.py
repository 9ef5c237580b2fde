"""The program that makes token stores: real processes for kills, signals and ranks; the rest in this one."""

import json
import os
import re
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
from conftest import picture, tiny_config
from hub_server import in_own_process, serve_hub
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import TWO_RANKS, interrupt, run
from test_data import png, write_parquet

from tokenizer import ImageTokenizer
from tokenizer.images import convert, pil_to_tensor, resize_short_side
from train.config import RunError, UserError, launch, parse
from train.data import CropMaker
from train.encode_dataset import encode_dataset, main, open_tokenizer, repo_id_of
from train.settings import DataSettings, SourceSettings, StoreRun, TokenizerRun
from train.sources import ImageSource
from train.token_store import INDEX_NAME, TokenStore
from train.views import ViewMaker, folder_named, key_of, num_views, path_within, plan_shards

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "train" / "encode_dataset.py")
SIZE = 8  # pixels
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine with a single core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # fork, Python >= 3.12
]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))  # of the processes that tests start
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """The folder of a tokenizer, which halves the side."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    ImageTokenizer(tiny_config()).save_pretrained(folder)
    return str(folder)


def fill(folder: Path, num_images: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + num_images):
        picture(number, 12 + number % 5, 13).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes, 14 training and 5 validation images."""
    folder = tmp_path_factory.mktemp("data")
    for split, num_images in (("train", 7), ("validation", 2)):
        fill(folder / split / "cat", num_images)
        fill(folder / split / "dog", num_images + (split == "validation"), first=20)
    return folder


def settings(tokenizer: str, data: Path | str, output: Path, **changes: Any) -> StoreRun:
    changes = {"image_size": SIZE, "batch_size": 3, "rows_per_shard": 4, "num_workers": 0} | changes
    return StoreRun(tokenizer=tokenizer, data=str(data), output_dir=str(output), **changes)


def encode(config: StoreRun) -> TokenStore:
    """The store that the program makes in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert encode_dataset(config, Accelerator(cpu=True))
    return TokenStore.open(config.output_dir)


def command(config: StoreRun, *launcher: str) -> list[str]:
    plain = {key: value for key, value in asdict(config).items() if isinstance(value, (str, int)) and value != ""}
    return [sys.executable, *launcher, PROGRAM, "speed.threads=1", *(f"{key}={value}" for key, value in plain.items())]


def contents(folder: Path | str) -> dict[str, Any]:
    """All rows of every shard, and tokens.json."""
    shards = {path.name: pq.read_table(path).to_pylist() for path in sorted(Path(folder).glob("*.parquet"))}
    return shards | {INDEX_NAME: json.loads((Path(folder) / INDEX_NAME).read_text())}


def by_key(store: TokenStore, split: str) -> dict[str, list[int]]:
    rows = store.rows(split)[:]
    assert len(set(rows["key"])) == len(rows["key"])
    return dict(zip(rows["key"], rows["tokens"].tolist(), strict=True))


# What is in a store.


def test_the_tokens_are_those_of_encode_with_labels_classes_and_keys(saved, data, tmp_path):
    store, tokenizer = encode(settings(saved, data, tmp_path / "store")), ImageTokenizer.from_pretrained(saved)
    assert store.stamp.class_names == ["cat", "dog"]
    for split, size in (("train", 14), ("validation", 5)):
        rows = store.rows(split)
        assert len(rows) == store.index.num_rows[split] == size
        for row in rows:
            tokens = tokenizer.encode(Image.open(data / row["key"]), resize=SIZE)
            assert row["tokens"].tolist() == tokens.flatten().tolist()
            assert store.stamp.class_names[row["label"]] == Path(row["key"]).parent.name
    store.check_tokenizer(tokenizer.fingerprint)
    stamp = store.stamp
    assert (stamp.vocab_size, stamp.grids, stamp.tokens_per_image) == (32, [[4, 4]], 16)
    assert (stamp.image_size, stamp.image_channels, stamp.tokenizer) == (SIZE, 3, None)
    assert len(store.shards["train"]) == 4
    assert len(store.shards["validation"]) == 2


def test_in_the_fast_mode_tokens_are_those_of_the_fast_tokenizer_and_the_store_is_the_tokenizers(saved, data, tmp_path):
    tokenizer, generator = ImageTokenizer.from_pretrained(saved), torch.Generator().manual_seed(0)
    for tensor in (*tokenizer.parameters(), tokenizer.quantizer.codebook):
        tensor.data = torch.randn(tensor.shape, generator=generator)  # those too that start at nought
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    made = settings(str(tmp_path / "tokenizer"), data, tmp_path / "store", fast=True)
    store = encode(made)
    store.check_tokenizer(tokenizer.fingerprint)
    assert store.stamp.fast
    fast, changed = deepcopy(tokenizer).fast(), 0
    for row in store.rows("train"):
        picture = Image.open(data / row["key"])
        assert row["tokens"].tolist() == fast.encode(picture, resize=SIZE).flatten().tolist()
        changed += row["tokens"].tolist() != tokenizer.encode(picture, resize=SIZE).flatten().tolist()
    assert changed > 0  # or it would show nothing
    with pytest.raises(UserError, match="fast"):
        encode(replace(made, fast=False))


def test_nothing_in_a_store_but_run_yaml_names_a_local_folder(saved, data, tmp_path):
    folder = Path(encode(settings(saved, data, tmp_path / "store")).folder)
    files = [path for path in folder.iterdir() if path.name != "run.yaml"]
    assert len(files) == 8
    for path in files:
        assert not any(str(place).encode() in path.read_bytes() for place in (data, saved, tmp_path))


def test_grey_tokenizers_and_pictures_of_all_sizes(tmp_path, data):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny_config(image_channels=1, resize=20))
    tokenizer.save_pretrained(tmp_path / "grey")
    store = encode(settings(str(tmp_path / "grey"), data, tmp_path / "store"))
    for key, tokens in by_key(store, "validation").items():
        assert tokens == tokenizer.encode(Image.open(data / key), resize=SIZE).flatten().tolist()
    assert store.stamp.image_channels == 1


def test_a_published_tokenizer_is_named_by_its_repo_id(saved, data, tmp_path):
    published = Path(shutil.copytree(saved, tmp_path / "tokenizer"))
    (published / "run.yaml").write_text("push_to_hub: org/tiny\n")
    assert encode(settings(str(published), data, tmp_path / "store")).stamp.tokenizer == "org/tiny"


# Views.


def test_flipped_rows_are_the_tokens_of_the_mirror_image(saved, data, tmp_path):
    store = encode(settings(saved, data, tmp_path / "store", views="flip"))
    tokenizer, rows = ImageTokenizer.from_pretrained(saved), by_key(store, "train")
    assert len(rows) == 28
    for key in [key for key in rows if not key.endswith("#flip")]:
        mirrored = Image.open(data / key).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        squares = [tokenizer.encode(Image.open(data / key), resize=SIZE), tokenizer.encode(mirrored, resize=SIZE)]
        assert rows[key] == squares[0].flatten().tolist()
        prepared = [view for _, view in maker(saved, views="flip").views(Image.open(data / key), True, (0,))]
        assert torch.equal(prepared[1], prepared[0].flip(2))
        assert rows[f"{key}#flip"] == tokenizer.encode(prepared[1]).flatten().tolist()
    assert not any("#" in key for key in by_key(store, "validation"))


def maker(saved: str, **changes: Any) -> ViewMaker:
    return ViewMaker(settings(saved, "data", Path("store"), **changes), ImageTokenizer.from_pretrained(saved))


def test_ten_crops_are_corners_centre_and_their_mirror_images_of_a_slightly_larger_picture(saved):
    image = picture(3, 30, 20)
    views = dict(maker(saved, views="ten_crop", image_size=10).views(image, True, (0,)))
    larger = resize_short_side(convert(image, 3), 11)
    assert larger.size == (16, 11)  # 1.1 x 10 pixels
    boxes = [(0, 0), (6, 0), (0, 1), (6, 1), (3, 0)]  # left, top
    for number, (left, top) in enumerate(boxes):
        crop = pil_to_tensor(larger.crop((left, top, left + 10, top + 10)))
        assert torch.equal(views[f"#crop{number}"], crop)
        assert torch.equal(views[f"#crop{number}#flip"], crop.flip(2))
    assert len(views) == num_views(StoreRun(views="ten_crop"), "train") == 10


@given(row=st.tuples(st.integers(0, 2**40)), number=st.integers(0, 5), seed=st.integers(0, 9))
def test_random_crops_are_a_function_of_seed_row_and_number(row, number, seed):
    tokenizer = ImageTokenizer(tiny_config())
    config = settings("", "data", Path("store"), views="random_crops", num_crops=6, seed=seed)
    image = picture(1, 40, 30)
    suffix, crop = list(ViewMaker(config, tokenizer).views(image, True, row))[number]
    alone = replace(config, num_crops=number + 1)
    again = list(ViewMaker(alone, tokenizer).views(image, True, row))[number]
    assert suffix == again[0]
    assert torch.equal(crop, again[1])
    held_out = dict(ViewMaker(config, tokenizer).views(image, False, row))
    plain = held_out[f"#crop{number}"]  # the same square, never mirrored in the validation split
    assert torch.equal(crop, plain.flip(2) if suffix.endswith("#flip") else plain)


def test_random_crops_differ_and_half_of_them_are_mirrored(saved):
    views = list(maker(saved, views="random_crops", num_crops=400).views(picture(1, 40, 30), True, (0,)))
    assert len({crop.numpy().tobytes() for _, crop in views}) > 300
    assert 150 < sum(suffix.endswith("#flip") for suffix, _ in views) < 250
    other = list(maker(saved, views="random_crops", num_crops=400, seed=1).views(picture(1, 40, 30), True, (0,)))
    assert sum(torch.equal(a[1], b[1]) for a, b in zip(views, other, strict=True)) < 20


@pytest.mark.parametrize("resize", [None, 12, 30])
def test_random_crops_are_cut_as_the_tokenizers_training_crops_are(resize):
    tokenizer, image = ImageTokenizer(tiny_config(resize=resize)), picture(2, 25, 21)
    config = settings("", "data", Path("store"), views="random_crops", num_crops=4, seed=7)
    training = TokenizerRun(
        image_size=SIZE, seed=7, model=tiny_config(resize=resize), data_options=DataSettings(shuffle_colors=0.0)
    )
    crops = CropMaker(ImageSource(None, "image", None, None), training)
    for number, (_, crop) in enumerate(ViewMaker(config, tokenizer).views(image, True, (5,))):
        whole, _ = crops.picture({"image": {"bytes": png(image), "path": None}})
        assert torch.equal(crop, crops.crop(whole, 5, number))


def test_the_default_store_holds_crops_of_the_embedded_photographs(saved, tmp_path):
    config = settings(saved, "photographs", tmp_path / "store", num_crops=2)
    store = encode(config)
    assert config.views == "random_crops"
    assert store.index.num_rows == {"train": 18, "validation": 4}
    assert {key.partition("#")[0] for key in by_key(store, "validation")} == {"chelsea.png", "flower.jpg"}


# Keys.


@pytest.mark.parametrize(
    ("data", "path", "within"),
    [
        ("/data", "/data/cat/1.png", "cat/1.png"),
        ("/data/*/1*.png", "/data/cat/1.png", "cat/1.png"),
        ("/data", "/home/cache/extracted/1.png", None),
        ("/data", "zip://1.png::/data/pictures.zip", None),
        ("org/name", "hf://datasets/org/name@0123abc/train/cat/1.png", "train/cat/1.png"),
        ("org/name", "zip://1.png::hf://datasets/org/name@0123abc/train.zip", None),
        ("org/name", f"/cache/hub/datasets--org--name/snapshots/{'a' * 40}/train/1.png", "train/1.png"),
        ("photographs", "/usr/lib/skimage/data/astronaut.png", "astronaut.png"),
    ],
)
def test_a_key_is_the_path_inside_the_data(data, path, within):
    assert path_within(path, data) == within
    name = path.partition("::")[0].rpartition("/")[2]
    assert key_of({"bytes": None, "path": path}, data, "train", (7,), set()) == (within or f"{name}@train/7")


def test_keys_without_a_path_of_their_own_are_numbered():
    assert key_of({"bytes": b"", "path": "/secret/1.png"}, "/data", "train", (3, 7), set()) == "1.png@train/3/7"
    assert key_of({"bytes": b"", "path": None}, "/data", "validation", (7,), set()) == "validation/7"
    assert key_of(None, "/data", "train", (7,), set()) == "train/7"
    taken, value = set(), {"bytes": None, "path": "/data/1.png"}  # that the metadata of the data lists twice
    assert [key_of(value, "/data", "train", (row,), taken) for row in (0, 1)] == ["1.png", "1.png@train/1"]


def test_a_relative_folder_is_found_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.png").touch()
    assert folder_named(".") == folder_named("./one.png") == folder_named("*.png") == tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_parquet_have_unique_keys_and_their_own_tokens(saved, tmp_path, streaming):
    images = [picture(number) for number in range(9)]
    for part in range(3):
        content = [{"bytes": png(image), "path": "same.png"} for image in images[3 * part : 3 * part + 3]]
        write_parquet(tmp_path / "data" / f"train-{part}.parquet", content)
    write_parquet(tmp_path / "data" / "validation.parquet", [png(picture(99))])
    store = encode(settings(saved, tmp_path / "data", tmp_path / "store", streaming=streaming, num_workers=2))
    tokenizer, rows = ImageTokenizer.from_pretrained(saved), by_key(store, "train")
    places = [f"{row // 3}/{row % 3}" if streaming else str(row) for row in range(9)]
    assert list(rows) == [f"same.png@train/{place}" for place in places]
    assert [*rows.values()] == [tokenizer.encode(image, resize=SIZE).flatten().tolist() for image in images]
    assert store.stamp.class_names is None
    assert set(store.rows("train")["label"]) == {-1}
    assert list(by_key(store, "validation")) == ["validation/0/0" if streaming else "validation/0"]


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
def crops(saved, data, tmp_path_factory) -> StoreRun:
    """Settings whose store is large enough to be interrupted, and is there."""
    config = settings(saved, data, tmp_path_factory.mktemp("crops") / "store", views="random_crops", num_crops=20)
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
    assert code == 0, told
    assert told.splitlines()[-1].endswith(f"finished shards are in {folder}, the same command goes on")
    assert "Traceback" not in told
    assert 1 <= len(list(folder.glob("*.parquet"))) < 6
    assert not list(folder.glob(".*"))
    encode(config)
    assert contents(folder) == contents(crops.output_dir)


def test_progress_tells_shards_images_speed_and_time_left(saved, data, tmp_path, capsys):
    encode(settings(saved, data, tmp_path / "store"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"shard {number}/6" for number in range(1, 7)]
    assert lines[-1].split(", ")[0] == "shard 6/6: 19 images"
    assert all("images/s" in line and line.endswith(" left") for line in lines)


def test_on_a_terminal_a_bar_counts_the_images(saved, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    encode(settings(saved, data, tmp_path / "store"))
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


def test_unreadable_images_are_skipped_named_and_counted_over_interruptions(saved, damaged, tmp_path, caplog):
    config = settings(saved, damaged, tmp_path / "store", data_options=SourceSettings(max_corrupt_fraction=0.2))
    store = encode(config)
    assert "train/003.png" in caplog.text
    assert set(by_key(store, "train")) == {f"train/{number:03d}.png" for number in range(10) if number not in (3, 7)}
    assert store.index.unreadable_images == {"train": 2, "validation": 0}
    (store.folder / INDEX_NAME).unlink()
    store.shards["train"][0].unlink()  # with one of the two; as if stopped before
    assert encode(config).index == store.index


def test_too_many_unreadable_images_stop_the_program_and_a_higher_limit_goes_on(saved, damaged, tmp_path):
    config = settings(saved, damaged, tmp_path / "store")
    with pytest.raises(RunError, match="2 of 10 images cannot be read, above data_options.max_corrupt_fraction=0.01"):
        encode(config)
    assert not (tmp_path / "store" / INDEX_NAME).exists()
    assert list((tmp_path / "store").glob("*.parquet"))
    config.data_options.max_corrupt_fraction = 0.2
    assert encode(config).index.unreadable_images["train"] == 2


def test_too_many_unreadable_images_are_found_though_no_single_start_met_them_all(saved, damaged, tmp_path):
    config = settings(saved, damaged, tmp_path / "store", data_options=SourceSettings(max_corrupt_fraction=0.2))
    store = encode(config)
    (store.folder / INDEX_NAME).unlink()
    config.data_options.max_corrupt_fraction = 0.01
    with pytest.raises(RunError, match="2 of 10 images cannot be read"):
        encode(config)


def test_a_stream_that_cannot_be_read_any_further_is_one_line(saved, tmp_path):
    for part in range(3):
        write_parquet(tmp_path / "data" / f"train-{part}.parquet", [png(picture(part))] * 3)
    write_parquet(tmp_path / "data" / "validation.parquet", [png(picture(9))])
    (tmp_path / "data" / "train-2.parquet").write_bytes(b"no parquet")
    config = settings(saved, tmp_path / "data", tmp_path / "store", streaming=True, num_workers=1)
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
    changed, message, saved, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    given = [f"tokenizer={saved}", f"data={data}", "image_size=8", "output_dir=store", *changed.split()]
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
def test_a_retrained_tokenizer_is_refused_with_both_fingerprints(saved, data, tmp_path, finished):
    retrained = Path(shutil.copytree(saved, tmp_path / "tokenizer"))
    config = settings(str(retrained), data, tmp_path / "store")
    store = encode(config)
    if not finished:
        unfinish(store)
    torch.manual_seed(1)
    ImageTokenizer(tiny_config()).save_pretrained(retrained)
    prints = f"{store.stamp.tokenizer_fingerprint}.* is now {open_tokenizer(str(retrained)).fingerprint}"
    with pytest.raises(UserError, match=f"{prints}; give another output_dir=..., or delete"):
        encode(config)


def test_data_that_has_changed_since_is_refused(saved, tmp_path):
    fill(tmp_path / "data/train", 6)
    fill(tmp_path / "data/validation", 2)
    config = settings(saved, tmp_path / "data", tmp_path / "store")
    unfinish(encode(config))
    fill(tmp_path / "data/train", 6, first=10)
    with pytest.raises(UserError, match="does not fit data=.*, which has changed since; give another output_dir"):
        encode(config)


def test_a_damaged_shard_is_refused_with_the_way_out(saved, data, tmp_path):
    config = settings(saved, data, tmp_path / "store")
    store = encode(config)
    unfinish(store)
    store.shards["train"][0].write_bytes(b"half a shard")
    with pytest.raises(UserError, match="00000-of-00004.parquet is damaged .*delete it and give the same command"):
        encode(config)
    store.shards["train"][0].unlink()
    assert encode(config).index == store.index


def test_a_lost_shard_of_a_finished_store_is_made_again(saved, data, tmp_path):
    config = settings(saved, data, tmp_path / "store")
    store = encode(config)
    expected = contents(store.folder)
    store.shards["train"][1].write_bytes(b"half a shard")
    with pytest.raises(UserError, match="00001-of-00004.parquet is damaged .*delete it; then give the same command"):
        encode(config)
    store.shards["train"][1].unlink()
    encode(config)
    assert contents(store.folder) == expected


def test_a_tokenizer_published_without_its_owner_is_not_named(saved, tmp_path):
    published = Path(shutil.copytree(saved, tmp_path / "tokenizer"))
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


# The Hub.


def published(token: str, config: StoreRun) -> str:
    """What comes of the program with that token."""
    os.environ["HF_TOKEN"] = token  # which the client reads at each call
    try:
        encode(config)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "published"


def publishing_story() -> dict[str, Any]:
    """Publish the store of `settings.json`: with a wrong token, to a Hub that refuses once, and again; read it back."""
    config = parse(StoreRun, json.loads(Path("settings.json").read_text()))
    seen = {"wrong token": published("wrong", config), "written": Path("store").exists()}
    return seen | {"first": published("secret", config), "second": published("secret", config)} | reading_story()


def reading_story() -> dict[str, Any]:
    """Open the published store by its id."""
    store = TokenStore.open("me/grids")
    rows = store.rows("train")[:]
    return {"index": asdict(store.index), "tokens": rows["tokens"].tolist(), "keys": rows["key"].tolist()}


def test_a_store_is_published_and_read_back_by_its_id_even_offline(saved, data, tmp_path):
    card = ["push_to_hub=me/grids", "card.license=mit", "card.data=small pictures", "card.data_license=cc0-1.0"]
    given = [f"tokenizer={saved}", f"data={data}", f"image_size={SIZE}", "num_workers=0", "output_dir=store", *card]
    (tmp_path / "settings.json").write_text(json.dumps(given))
    with serve_hub(token="secret") as hub:
        hub.fail_commits[:] = [403]
        seen = in_own_process(publishing_story, tmp_path, hub.url)
        files = hub.repos["me/grids"][-1].files
    assert seen.pop("wrong token").startswith("UserError: push_to_hub=me/grids cannot be created")
    assert not seen.pop("written")
    assert re.match("RunError: .*403.*; all is safe in store, the same command tries again", seen.pop("first"))
    assert seen.pop("second") == "published"

    store = TokenStore.open(tmp_path / "store")
    assert files.keys() - {".gitattributes"} == {path.name for path in store.folder.iterdir()} - {"run.yaml"}
    for said in ("license: mit", 'load_dataset("me/grids"', "small pictures", "cc0-1.0", "validation-*.parquet"):
        assert said in files["README.md"].decode()
    assert seen["index"] == asdict(store.index)
    assert seen["tokens"] == store.rows("train")[:]["tokens"].tolist()
    assert seen["keys"] == store.rows("train")[:]["key"].tolist()
    assert in_own_process(reading_story, tmp_path, hub.url, offline="1") == seen  # nobody listens any more


def replacing_story() -> dict[str, Any]:
    """Publish two stores of the settings of `settings.json` under one id, of different shards; read it back."""
    os.environ["HF_TOKEN"] = "secret"
    for name, rows_per_shard in (("first", 4), ("second", 100)):
        given = [
            *json.loads(Path("settings.json").read_text()),
            f"output_dir={name}",
            f"rows_per_shard={rows_per_shard}",
        ]
        encode(parse(StoreRun, given))
    return reading_story()


def test_a_store_published_again_in_other_shards_leaves_none_of_the_old_ones(saved, data, tmp_path):
    card = ["push_to_hub=me/grids", "card.license=mit", "card.data=small pictures", "card.data_license=cc0-1.0"]
    given = [f"tokenizer={saved}", f"data={data}", f"image_size={SIZE}", "num_workers=0", *card]
    (tmp_path / "settings.json").write_text(json.dumps(given))
    with serve_hub(token="secret") as hub:
        seen = in_own_process(replacing_story, tmp_path, hub.url)
    assert len(seen["keys"]) == 14
    shards = [name for name in hub.repos["me/grids"][-1].files if name.endswith(".parquet")]
    assert shards == ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
