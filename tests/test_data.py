"""How every kind of picture comes out, and in which order the crops come. What can be opened: test_sources.py.

Run as a program it is one of two ranks and writes what that rank sees: `test_data.py FOLDER`.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import picture, tiny_config
from pictures_on_disk import both_ways, fill, flat, numbers, png, settings, take, write_parquet, write_stream
from PIL import Image
from processes import TWO_RANKS, run

from tokenizer.images import pil_to_tensor, to_batch
from train.config import RunError, UserError
from train.data import MappedCrops, evaluation_batches, holding_signals, outlive_signals
from train.settings import DataSettings, TokenizerRun
from train.sources import CorruptCounter, check_readable, find_columns, open_sources, open_splits

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine with a single core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # fork, Python >= 3.12
]
# (shards, rows in each): the rows of an epoch for each worker of each of two ranks
STREAMS = {(1, 12): [[6], [6]], (3, 5): [[5, 3], [5, 2]], (4, 3): [[3, 3], [3, 3]], (6, 4): [[8, 4], [8, 4]]}


@pytest.fixture(scope="module", autouse=True)
def own_state(tmp_path_factory):
    """Caches in a temporary folder, and an Accelerate that remembers no other test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # 5 s for each epoch
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def order(config: TokenizerRun, number: int) -> list[int]:
    return [number for crops, _ in take(config, number) for number in numbers(crops)]


def same(batches: list[Any], others: list[Any]) -> bool:
    pairs = list(zip(batches, others, strict=True))
    return all(torch.equal(mine[0], other[0]) and mine[1] == other[1] for mine, other in pairs)


# Pictures of every kind.


def kinds_of_pictures() -> dict[str, tuple[Image.Image, dict[str, Any], Image.Image]]:
    """Name: a picture as its file holds it, how it is saved, and the RGB picture that people see."""
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], dtype=np.uint8)
    flag = Image.fromarray(colours.repeat(8, 0).repeat(8, 1))
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey, white, palette = Image.fromarray(ramp), Image.new("RGB", (16, 16), "white"), flag.quantize(4)
    red = palette.getpixel((0, 0))
    colours[0, 0] = 255
    without_red = Image.fromarray(colours.repeat(8, 0).repeat(8, 1))
    lower_half = Image.fromarray(np.where(ramp < 128, 0, 255).astype(np.uint8))
    half = flag.copy()
    half.putalpha(lower_half)
    turned = Image.Exif()
    turned[0x0112] = 6  # the file holds it a quarter turn to the left of how it is seen
    return {
        "grey.png": (grey, {}, grey.convert("RGB")),
        "alpha.png": (half, {}, Image.composite(flag, white, lower_half)),
        "palette.png": (palette, {}, flag),
        "clear_palette.png": (palette, {"transparency": red}, without_red),
        "clear_bytes.png": (palette, {"transparency": bytes([255] * red + [0])}, without_red),
        "16_bit.png": (Image.fromarray(ramp.astype(np.uint16) * 257), {}, grey.convert("RGB")),
        "cmyk.jpg": (flag.convert("CMYK"), {"quality": 100, "subsampling": 0}, flag),
        "turned.png": (flag.rotate(90), {"exif": turned}, flag),
    }


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", kinds_of_pictures())
def test_every_kind_of_picture_comes_out_as_it_is_seen(tmp_path, name, channels):
    stored, how, seen = kinds_of_pictures()[name]
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        stored.save(tmp_path / split / name, **how)
    model, options = tiny_config(image_channels=channels), DataSettings(flip=False)
    config = settings(tmp_path, image_size=16, model=model, data_options=options)
    expected = pil_to_tensor(seen if channels == 3 else seen.convert("L")).int()
    whole = [images for images, _ in evaluation_batches(*open_sources(config), config, 2)]
    for images in (take(config, 1)[0][0], *whole):
        assert (images.int() - expected).abs().max() <= (3 if name == "cmyk.jpg" else 0)


# Unreadable pictures.


@both_ways
@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.filterwarnings("ignore:unclosed file .*005.png:ResourceWarning")  # left to the collector by `datasets`
def test_an_unreadable_image_is_skipped_counted_and_named_and_the_batch_stays_full(tmp_path, kind, streaming, caplog):
    fill(tmp_path / "folder" / "train", *map(picture, range(12)))
    fill(tmp_path / "folder" / "validation", flat(0))
    damaged = tmp_path / "folder" / "train" / "005.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    content = [{"bytes": png(flat(number)), "path": "005.png"} for number in range(10)]  # as from many folders
    write_stream(tmp_path / "parquet", [[*content, {"bytes": b"damaged", "path": "005.png"}, None]])
    config = settings(tmp_path / kind, streaming=streaming, data_options=DataSettings(max_corrupt_fraction=0.5))
    source, _ = open_sources(config)
    check_readable(source, config.data)
    counter = CorruptCounter(config, source, set())
    for crops, corrupt in take(config, 8):
        assert crops.shape == (4, 3, 8, 8)
        counter.add(len(crops), [(name, "damaged") for name in corrupt])
    assert len(counter.names) == len(caplog.records) == (1 if kind == "folder" else 2)
    assert "005.png" in caplog.text


def test_too_many_unreadable_images_stop_the_run(picture_folder):
    config = settings(picture_folder)
    counter = CorruptCounter(config, open_sources(config)[0], set())
    counter.add(4, [("a.png", "truncated")])
    counter.add(4, [("a.png", "truncated")])
    with pytest.raises(RunError, match=r"2 of 15 images .* data_options.max_corrupt_fraction=0.01; the log names them"):
        counter.add(4, [("b.png", "truncated")])


def test_a_resumed_stream_counts_its_images_from_where_it_was(picture_folder):
    config = settings(picture_folder, streaming=True)
    source, known = open_splits(config)[0], {f"{number}.png" for number in range(17)}
    CorruptCounter(config, source, known, images_seen=2000).add(4, [("18.png", "truncated")])
    with pytest.raises(RunError, match="18 of 1000 images"):
        CorruptCounter(config, source, known).add(4, [("18.png", "truncated")])


def test_what_a_worker_met_is_one_line(picture_folder):
    config = settings(picture_folder)

    def failing() -> Iterator[Any]:
        raise RunError("Caught RunError in DataLoader worker process 1.\nOriginal ...\ntrain.config.RunError: no image")
        yield

    with pytest.raises(RunError, match="^no image$"):
        list(CorruptCounter(config, open_sources(config)[0], set()).watch(failing()))


def test_rows_without_a_path_are_counted_by_their_numbers(tmp_path):
    write_parquet(tmp_path / "train.parquet", [png(flat(1))] + [None, b"gone"] * 2)
    config = settings(tmp_path / "train.parquet", data_options=DataSettings(max_corrupt_fraction=1.0))
    names = set().union(*(corrupt for _, corrupt in take(config, 4)))
    assert len(names) == 3  # of four, one is held out
    assert all(name.startswith("row ") for name in names)


@both_ways
def test_nothing_but_unreadable_images_is_refused(tmp_path, streaming):
    fill(tmp_path / "validation", flat(0))
    (tmp_path / "train").mkdir()
    for number in range(3):
        (tmp_path / "train" / f"{number}.png").write_bytes(b"no picture")
    Image.new("F", (8, 8)).save(tmp_path / "train" / "range_unknown.tif")
    config = settings(tmp_path, streaming=streaming)
    with pytest.raises(UserError, match=rf"^data={tmp_path}: none of the first 4 images can be read, such as .*0.png"):
        check_readable(open_sources(config)[0], config.data)


def test_a_stream_of_the_hub_is_not_decoded_ahead_of_its_unreadable_images(tmp_path):
    fill(tmp_path, *map(flat, range(3)))
    (tmp_path / "001.png").write_bytes(b"damaged")
    rows = datasets.load_dataset(str(tmp_path), split="train", streaming=True).decode(num_threads=2)  # as from the Hub
    source = find_columns(rows, "org/name", DataSettings())
    assert [Path(source.name(row)).name for row in source.rows] == ["000.png", "001.png", "002.png"]


def test_a_worker_of_a_stream_whose_share_is_unreadable_stops_the_run(tmp_path):
    write_stream(tmp_path, [[b"no", b"picture"]])
    with pytest.raises(RunError, match="none of a worker's 2 images can be read, such as an image"):
        take(settings(tmp_path, streaming=True), 1)


# Crops and their order.


def test_crops_are_a_function_of_seed_epoch_and_index(tmp_path):
    fill(tmp_path, *[picture(0, 40, 40)] * 4)
    configs = [settings(tmp_path, seed=seed) for seed in (0, 0, 1)]
    crops, again, other = (MappedCrops(open_sources(config)[0], config) for config in configs)
    samples = list(itertools.product(range(3), repeat=2))
    seen = {sample: crops[sample][0] for sample in samples}
    assert all(torch.equal(again[sample][0], seen[sample]) for sample in reversed(samples))
    assert len({tuple(crop.flatten().tolist()) for crop in seen.values()}) == len(samples)
    assert not any(torch.equal(other[sample][0], seen[sample]) for sample in samples)


def test_half_of_the_crops_are_mirrored(tmp_path):
    fill(tmp_path, *[Image.fromarray(np.array([[0] * 4 + [255] * 4] * 8, dtype=np.uint8))] * 3)
    assert 70 <= sum(order(settings(tmp_path, batch_size=200), 1)) // 255 <= 130
    assert sum(order(settings(tmp_path, batch_size=200, data_options=DataSettings(flip=False)), 1)) == 0


def test_small_images_are_enlarged_and_resize_is_applied(tmp_path):
    image = picture(0, 40, 40)
    fill(tmp_path / "small", *[flat(9, 3, 5)] * 2)
    fill(tmp_path / "large", image, image)
    assert order(settings(tmp_path / "small"), 1) == [9] * 4
    config = settings(tmp_path / "large", model=tiny_config(resize=8), data_options=DataSettings(flip=False))
    whole = pil_to_tensor(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert torch.equal(take(config, 1)[0][0], whole.expand(4, 3, 8, 8))


@both_ways
def test_each_epoch_holds_each_image_once_in_an_order_of_its_own(tmp_path, streaming):
    content = [png(flat(number)) for number in range(30)]
    write_stream(tmp_path, [content[:10], content[10:20], content[20:]])
    options = {"streaming": streaming, "batch_size": 6, "data_options": DataSettings(shuffle_buffer=4)}
    seen = order(settings(tmp_path, **options), 10)
    assert sorted(seen[:30]) == sorted(seen[30:]) == list(range(30))
    assert seen[:30] != seen[30:]
    assert seen == order(settings(tmp_path, **options), 10) != order(settings(tmp_path, **options, seed=5), 10)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_restarts_leave_the_crops_as_they_are(picture_folder, num_workers):
    undisturbed = take(settings(picture_folder), 9)  # of 15 images, so that batches span epochs
    config = settings(picture_folder, num_workers=num_workers)
    assert all(same(take(config, 9 - done, done), undisturbed[done:]) for done in (0, 2, 5))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["damaged", "lopsided"])
def test_a_restarted_stream_goes_on_as_if_undisturbed(tmp_path, kind, num_workers):
    content = [{"bytes": png(picture(number)), "path": "same.png"} for number in range(15)]
    if kind == "damaged":
        content[7]["bytes"] = b"damaged"
    write_stream(tmp_path, [content[:5], content[5:10], content[10:]] if kind == "damaged" else [[], content])
    options = DataSettings(shuffle_buffer=4)
    config = settings(tmp_path, streaming=True, batch_size=3, num_workers=num_workers, data_options=options)
    undisturbed = take(config, 13)
    assert any(corrupt for _, corrupt in undisturbed) == (kind == "damaged")
    for done in (0, 1, 4, 7, 10):
        known = set().union(*(corrupt for _, corrupt in undisturbed[:done]))
        assert same(take(config, 13 - done, done, known), undisturbed[done:])


# Two ranks.


def rank_story(folder: Path) -> dict[str, Any]:
    """What this rank sees of every data set in the folder."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    story = {"num_processes": Accelerator(cpu=True).num_processes}
    story["mapped"] = [crops.flatten(1).tolist() for crops, _ in take(settings(folder / "mapped", num_workers=2), 8)]
    options = {"streaming": True, "batch_size": 1, "data_options": DataSettings(shuffle_buffer=4)}
    for shards, rows in STREAMS:
        story[f"{shards}x{rows}"] = order(settings(folder / f"{shards}x{rows}", num_workers=2, **options), 32)
    try:
        story["short"] = order(settings(folder / "short", **options), 3)
    except RunError as error:
        story["short"] = str(error)
    return story


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    fill(folder / "mapped", *map(picture, range(16)))
    for shards, rows in STREAMS:
        content = [[png(flat(rows * shard + row)) for row in range(rows)] for shard in range(shards)]
        write_stream(folder / f"{shards}x{rows}", content)
    write_stream(folder / "short", [[png(flat(9))]])
    done = run([sys.executable, *TWO_RANKS, __file__, str(folder)])
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_see_what_one_with_twice_the_batch_sees(two_ranks):
    folder, ranks = two_ranks
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    alone = [crops.flatten(1).tolist() for crops, _ in take(settings(folder / "mapped", batch_size=8), 8)]
    assert [first + second for first, second in zip(*(rank["mapped"] for rank in ranks), strict=True)] == alone


@pytest.mark.parametrize("stream", STREAMS)
def test_ranks_and_workers_share_each_epoch_of_a_stream(two_ranks, stream):
    shards, rows = stream
    first, second = [], []
    for rank, lengths in zip(two_ranks[1], STREAMS[stream], strict=True):
        for worker, length in enumerate(lengths):
            share = rank[f"{shards}x{rows}"][worker :: len(lengths)]  # workers take turns
            first += share[:length]
            second += share[length : 2 * length]
    assert sorted(first) == sorted(second) == list(range(shards * rows))
    assert first != second


def test_a_rank_without_any_image_of_a_stream_says_so(two_ranks):
    message = "the stream holds no image for rank 1; start fewer processes"
    assert [rank["short"] for rank in two_ranks[1]] == [[9, 9, 9], message]


# Validation.


def test_validation_pictures_are_whole_and_in_order_and_share_batches_by_size(tmp_path, caplog):
    sizes = [(20, 20), (21, 20), (20, 20), (25, 20), (25, 20), (1100, 9), (8, 8)]
    fill(tmp_path / "train", flat(0))
    fill(tmp_path / "validation", *[flat(number, *size) for number, size in enumerate(sizes)])
    (tmp_path / "validation" / "004.png").write_bytes(b"damaged")
    config = settings(tmp_path, batch_size=2)
    batches = [images for images, _ in evaluation_batches(*open_sources(config), config, 4)]
    assert [tuple(batch.shape[2:]) for batch in batches] == [(20, 20), (20, 20), (20, 24), (8, 1024), (8, 8)]
    assert [number for batch in batches for number in numbers(batch)] == [0, 1, 2, 3, 5, 6]
    assert "validation image skipped" in caplog.text
    assert "004.png" in caplog.text


@pytest.mark.parametrize("resize", [None, 10])
def test_validation_pictures_are_prepared_as_encode_prepares_them(tmp_path, resize):
    fill(tmp_path / "train", flat(0))
    fill(tmp_path / "validation", picture(1, 27, 23))
    config = settings(tmp_path, model=tiny_config(resize=resize))
    ((batch, labels),) = evaluation_batches(*open_sources(config), config, 2)
    assert labels is None
    assert torch.equal(batch / 255, to_batch(picture(1, 27, 23), 3, 2, resize))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    (folder / f"{rank}.json").write_text(json.dumps(rank_story(folder)))


def test_a_worker_lives_through_a_signal_that_comes_before_it_is_ready():
    def start(worker: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        outlive_signals(worker)

    loader = torch.utils.data.DataLoader(range(3), batch_size=None, num_workers=1, worker_init_fn=start)
    with holding_signals():
        batches = iter(loader)
    assert list(batches) == [0, 1, 2]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}
