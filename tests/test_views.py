"""What becomes of a picture on its way into a token store: its views and their keys."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_data import png, write_parquet
from tiny_stores import SIZE, by_key, encode, settings

from tokenizer import ImageTokenizer
from tokenizer.images import convert, pil_to_tensor, resize_short_side
from train.data import CropMaker
from train.settings import DataSettings, StoreRun, TokenizerRun
from train.sources import ImageSource
from train.views import ViewMaker, folder_named, key_of, num_views, path_within

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerator", "own_cache"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine with a single core
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # fork, Python >= 3.12
]


# Views.


def test_flipped_rows_are_the_tokens_of_the_mirror_image(tiny_tokenizer, two_classes, tmp_path):
    store = encode(settings(tiny_tokenizer, two_classes, tmp_path / "store", views="flip"))
    tokenizer, rows = ImageTokenizer.from_pretrained(tiny_tokenizer), by_key(store, "train")
    assert len(rows) == 28
    for key in [key for key in rows if not key.endswith("#flip")]:
        mirrored = Image.open(two_classes / key).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        squares = [
            tokenizer.encode(Image.open(two_classes / key), resize=SIZE),
            tokenizer.encode(mirrored, resize=SIZE),
        ]
        assert rows[key] == squares[0].flatten().tolist()
        prepared = [
            view for _, view in maker(tiny_tokenizer, views="flip").views(Image.open(two_classes / key), True, (0,))
        ]
        assert torch.equal(prepared[1], prepared[0].flip(2))
        assert rows[f"{key}#flip"] == tokenizer.encode(prepared[1]).flatten().tolist()
    assert not any("#" in key for key in by_key(store, "validation"))


def maker(tiny_tokenizer: str, **changes: Any) -> ViewMaker:
    return ViewMaker(
        settings(tiny_tokenizer, "data", Path("store"), **changes), ImageTokenizer.from_pretrained(tiny_tokenizer)
    )


def test_ten_crops_are_corners_centre_and_their_mirror_images_of_a_slightly_larger_picture(tiny_tokenizer):
    image = picture(3, 30, 20)
    views = dict(maker(tiny_tokenizer, views="ten_crop", image_size=10).views(image, True, (0,)))
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


def test_random_crops_differ_and_half_of_them_are_mirrored(tiny_tokenizer):
    views = list(maker(tiny_tokenizer, views="random_crops", num_crops=400).views(picture(1, 40, 30), True, (0,)))
    assert len({crop.numpy().tobytes() for _, crop in views}) > 300
    assert 150 < sum(suffix.endswith("#flip") for suffix, _ in views) < 250
    other = list(
        maker(tiny_tokenizer, views="random_crops", num_crops=400, seed=1).views(picture(1, 40, 30), True, (0,))
    )
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


def test_the_default_store_holds_crops_of_the_embedded_photographs(tiny_tokenizer, tmp_path):
    config = settings(tiny_tokenizer, "photographs", tmp_path / "store", num_crops=2)
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
def test_rows_of_parquet_have_unique_keys_and_their_own_tokens(tiny_tokenizer, tmp_path, streaming):
    images = [picture(number) for number in range(9)]
    for part in range(3):
        content = [{"bytes": png(image), "path": "same.png"} for image in images[3 * part : 3 * part + 3]]
        write_parquet(tmp_path / "data" / f"train-{part}.parquet", content)
    write_parquet(tmp_path / "data" / "validation.parquet", [png(picture(99))])
    store = encode(settings(tiny_tokenizer, tmp_path / "data", tmp_path / "store", streaming=streaming, num_workers=2))
    tokenizer, rows = ImageTokenizer.from_pretrained(tiny_tokenizer), by_key(store, "train")
    places = [f"{row // 3}/{row % 3}" if streaming else str(row) for row in range(9)]
    assert list(rows) == [f"same.png@train/{place}" for place in places]
    assert [*rows.values()] == [tokenizer.encode(image, resize=SIZE).flatten().tolist() for image in images]
    assert store.stamp.class_names is None
    assert set(store.rows("train")["label"]) == {-1}
    assert list(by_key(store, "validation")) == ["validation/0/0" if streaming else "validation/0"]
