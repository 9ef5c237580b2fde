"""A run that goes on in this process: to the bit as if undisturbed, and never on other images."""

import shutil
from pathlib import Path

import pytest
from conftest import picture
from tiny_runs import assert_resumes_to_the_bit, ended_after, train_here

from train.config import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("settings", [["average.decay=0"], ["mixed_precision=bf16"], ["optimizer.name=muon"]])
def test_variants_resume_to_the_bit(settings, picture_folder, tmp_path, monkeypatch):
    assert_resumes_to_the_bit(picture_folder, settings, tmp_path, monkeypatch)


def test_a_streamed_run_resumes_to_the_bit(tmp_path, monkeypatch):
    for index in range(16):
        folder = tmp_path / "data" / ("validation" if index < 2 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        picture(index).save(folder / f"{index}.png")
    assert_resumes_to_the_bit(str(tmp_path / "data"), ["streaming=true", "num_workers=2"], tmp_path, monkeypatch)


@pytest.fixture
def begun(picture_folder, tmp_path, monkeypatch) -> Path:
    """A folder of pictures, and beside it a run on them that was ended early."""
    shutil.copytree(picture_folder, tmp_path / "pictures")
    with ended_after(5, monkeypatch):
        train_here(tmp_path / "pictures", tmp_path / "run")
    return tmp_path


def test_more_images_than_it_began_with_are_refused_and_without_them_it_goes_on(begun):
    added = begun / "pictures" / "16.png"
    picture(16).save(added)
    with pytest.raises(UserError, match="no longer what this run trains on: 16 training images, and there were 15;"):
        train_here(begun / "pictures", begun / "run")
    added.unlink()
    train_here(begun / "pictures", begun / "run")


@pytest.mark.parametrize(
    "change",
    [lambda path: path.rename(path.with_stem(f"new_{path.stem}")), lambda path: picture(99, 40, 30).save(path)],
    ids=["other names", "other pictures of the same names"],
)
def test_other_images_than_it_began_with_are_refused(begun, change):
    for path in [*(begun / "pictures").iterdir()]:
        change(path)
    with pytest.raises(UserError, match="15 training images as before, but others"):
        train_here(begun / "pictures", begun / "run")


def test_images_that_moved_with_their_folder_are_the_same(begun, monkeypatch):
    (begun / "elsewhere").mkdir()
    for name in ("pictures", "run"):
        (begun / name).rename(begun / "elsewhere" / name)
    run = begun / "elsewhere" / "run"
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace(str(begun), str(begun / "elsewhere")))
    train_here(begun / "elsewhere" / "pictures", run)
