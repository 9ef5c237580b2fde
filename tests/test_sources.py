"""What can be opened as images, and every refusal."""

import os
import pickle
import tempfile
from multiprocessing import get_context
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel
from pictures_on_disk import both_ways, fill, flat, png, settings, take, write_parquet, write_tar

from train.config import UserError
from train.settings import TokenizerRun
from train.sources import open_sources

pytestmark = [
    pytest.mark.usefixtures("own_cache", "fresh_accelerator"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # fork, Python >= 3.12
]


def test_the_embedded_validation_photographs_are_in_colour_and_never_trained_on():
    source, rows = open_sources(settings("photographs"))
    assert {Path(source.name(row)).name for row in rows} == {"chelsea.png", "flower.jpg"}
    everything = [*source.rows, *rows]
    assert len({Path(source.name(row)).read_bytes() for row in everything}) == len(everything) == 11
    for row in everything:
        red, _, blue = source.image(row).split()
        assert red != blue


@both_ways
def test_a_folder_gives_images_classes_and_splits(tmp_path, streaming):
    for split in ("train", "test"):
        fill(tmp_path / "plain" / split, flat(1), flat(2))
        for name in ("cat", "dog"):
            fill(tmp_path / "classes" / split.replace("test", "validation") / name, *[flat(3)] * 3)
    source, rows = open_sources(settings(tmp_path / "plain", streaming=streaming))
    assert (source.image_column, source.label_column, source.class_names) == ("image", None, None)
    assert len(list(source.rows)) == len(rows) == 2
    source, rows = open_sources(settings(tmp_path / "classes", streaming=streaming))
    assert (source.label_column, source.class_names) == ("label", ["cat", "dog"])
    assert [row["label"] for row in source.rows] == [0, 0, 0, 1, 1, 1]
    assert all("validation" in source.name(row) for row in rows)
    for key in ("split", "eval_split"):
        with pytest.raises(UserError, match=rf"^{key}=dev is not a split of .*; it has train, validation$"):
            open_sources(settings(tmp_path / "classes", streaming=streaming, **{key: "dev"}))


@both_ways
@pytest.mark.parametrize("pattern", ["folder", "folder/*.png", "*.parquet", "shards/*.tar"])
def test_data_without_a_validation_split_holds_out_a_seeded_part(tmp_path, pattern, streaming):
    fill(tmp_path / "folder", *map(flat, range(200)))
    (tmp_path / "shards").mkdir()
    for part in range(2):
        content = [png(flat(number)) for number in range(100 * part, 100 * part + 100)]
        write_parquet(tmp_path / f"{part}.parquet", content)
        write_tar(tmp_path / "shards" / f"{part}.tar", content)

    def opened(seed: int) -> list[list[str]]:
        source, rows = open_sources(settings(tmp_path / pattern, streaming=streaming, seed=seed))
        source = pickle.loads(pickle.dumps(source))  # the way to a worker
        return [[source.name(row) for row in part] for part in (source.rows, rows)]

    training, validation = opened(0)
    assert len({*training, *validation}) == len(training) + len(validation) == 200
    assert 1 <= len(validation) <= 12
    assert opened(0) == [training, validation] != opened(1)


@both_ways
def test_columns_are_found_by_their_type_or_named_by_the_user(tmp_path, streaming):
    content = [png(flat(number)) for number in range(100)]
    kinds = (ClassLabel(names=["x", "y"]), [0, 1] * 50)
    junk = (datasets.Image(), [{"bytes": b"junk", "path": None}] * 100)
    write_parquet(tmp_path / "one" / "0.parquet", content, "odd name", kind=kinds)
    write_parquet(tmp_path / "two" / "0.parquet", content, "left", right=junk, kind=kinds)
    source, _ = open_sources(settings(tmp_path / "one" / "*.parquet", streaming=streaming))
    assert (source.image_column, source.label_column, source.class_names) == ("odd name", "kind", ["x", "y"])
    config = settings(tmp_path / "two", streaming=streaming)
    for column, words in [
        (None, r"has 2 columns .*\(left, right\).*: data_options.image_column="),
        ("up", "image_column=up"),
    ]:
        config.data_options.image_column = column
        with pytest.raises(UserError, match=words):
            open_sources(config)
    config.data_options.image_column = "left"
    assert take(config, 1)[0][1] == set()  # the damaged column beside it is not looked at


@both_ways
def test_a_label_column_that_holds_no_classes_is_refused(tmp_path, streaming):
    write_parquet(tmp_path / "0.parquet", [png(flat(0))] * 2, "image", label=(datasets.Value("float64"), [0.5, 1.5]))
    config = settings(tmp_path, streaming=streaming)
    config.data_options.label_column = "label"
    with pytest.raises(UserError, match="label_column=label .*holds Value.*class_encode_column"):
        open_sources(config)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "doesn't contain any data files"),
        ("words", "has no column of images among text; choose one: data_options.image_column="),
        ("nowhere", "is read as a path, and there is no file or folder of that name"),
        ("nowhere/*.png", "is read as a path, and there is no file or folder of that name"),
        ("broken.parquet", r"read as a path to images, parquet or tar files\) cannot be read: Parquet magic bytes"),
        ("broken.tar", "cannot be read: "),
        ("single", "holds a single image"),
        ("nobody/nothing", r"read as a Hub id, for there is no such path\) cannot be read: "),
    ],
)
def test_data_that_cannot_be_opened_is_one_line_for_the_user(tmp_path, name, words):
    fill(tmp_path / "single", flat(0))
    for folder in ("empty", "words"):
        (tmp_path / folder).mkdir()
    for file in ("words/words.txt", "broken.parquet", "broken.tar"):
        (tmp_path / file).write_text("no pictures here")
    with pytest.raises(UserError, match=words) as refusal:
        open_sources(settings(name if name == "nobody/nothing" else tmp_path / name))
    assert "\n" not in str(refusal.value)


def test_a_stream_too_short_to_hold_out_an_image_says_so(tmp_path):
    write_parquet(tmp_path / "0.parquet", [b"two", b"rows"])
    with pytest.raises(UserError, match="has no image to validate on; name a split that has some: eval_split="):
        open_sources(settings(tmp_path, streaming=True))


def become_nobody() -> None:
    """To the administrator no folder is locked."""
    if os.getuid() == 0:
        os.setuid(65534)


def refusal_of(config: TokenizerRun) -> str:
    with pytest.raises(UserError) as refusal:
        open_sources(config)
    return str(refusal.value)


def test_a_locked_folder_is_refused():
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        locked = Path(outer, "locked")
        locked.mkdir(mode=0)
        with get_context("fork").Pool(1, initializer=become_nobody) as pool:
            assert f"data={locked} cannot be read: permission denied" in pool.apply(refusal_of, [settings(locked)])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `datasets` leaves a metadata file open
@pytest.mark.parametrize(
    ("told", "num_matching", "make"),
    [
        (
            "0 of its 3 image files are not read and 1 links",
            5,
            lambda at: (at / "b").symlink_to(at.parent / "elsewhere"),
        ),
        ("1 of its 3", 3, lambda at: (at / "a/metadata.csv").write_text("file_name,x\n000.png,1\n001.png,2\n")),
        ("3 of its 5", 5, lambda at: fill(at / "train_set", flat(7), flat(8))),
    ],
    ids=["a link to a folder", "a metadata file", "a folder named like a split"],
)
def test_image_files_that_datasets_passes_over_are_told_of_and_a_pattern_reads_them(
    told, num_matching, make, tmp_path, caplog
):
    fill(tmp_path / "elsewhere", flat(1), flat(2))
    fill(tmp_path / "data" / "a", flat(3), flat(4), flat(5))
    make(tmp_path / "data")
    open_sources(settings(tmp_path / "data"))
    assert told in caplog.text
    pattern = caplog.text.partition("by a pattern (")[2].partition(")")[0]
    caplog.clear()
    source, rows = open_sources(settings(pattern))
    assert len(source.rows) + len(rows) == num_matching
    assert caplog.text == ""


def test_a_folder_all_of_which_is_read_is_opened_without_a_word(tmp_path, caplog):
    for split in ("train", "test"):
        fill(tmp_path / split / "cat", flat(1), flat(2))
    fill(tmp_path / ".thumbnails", flat(3))
    fill(tmp_path / "__MACOSX", flat(3))
    open_sources(settings(tmp_path))
    assert caplog.text == ""


@pytest.mark.parametrize("data", ["may [2024]", "may [2024]/inside"])
def test_a_folder_in_whose_name_datasets_sees_a_pattern_is_refused(tmp_path, data):
    fill(tmp_path / "may [2024]/inside", flat(1), flat(2), flat(3))
    with pytest.raises(UserError, match="or in that of a folder around it, by which `datasets` would look for others"):
        open_sources(settings(tmp_path / data))


def test_a_pattern_is_read_in_a_folder_in_whose_name_datasets_would_see_one(tmp_path, monkeypatch):
    fill(tmp_path / "may [2024]/inside", flat(1), flat(2), flat(3))
    monkeypatch.chdir(tmp_path / "may [2024]")
    source, rows = open_sources(settings("inside/*.png"))
    assert len(source.rows) + len(rows) == 3
