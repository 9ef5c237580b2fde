"""Conditional models through the programs: labels come from the data, and what the class decides is left to it."""

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from contenders import SavedTokenizer
from datasets import ClassLabel
from generation import GenerationRun, reconstructed
from labelled_images import LabelledImages
from PIL import Image
from processes import TWO_RANKS, assert_close_runs, records, run
from quantizers import checked
from safetensors.torch import load_file
from test_data import flat, numbers, png, write_parquet
from tiny_runs import TINY_VAE, assert_resumes_to_the_bit, train_here, train_vae

from tokenizer import ImageTokenizer, ImageVAE
from tokenizer.image_model import ImageModel
from train import token_prior
from train.config import UserError, parse
from train.data import evaluation_batches, training_batches
from train.encode_dataset import encode_dataset
from train.settings import PriorRun, StoreRun, TokenizerRun
from train.sources import open_sources
from train.token_store import TokenStore

ROOT = Path(__file__).parents[1]
COLOURS = {"blue": (0, 0, 1), "green": (0, 1, 0), "red": (1, 0, 0)}  # in the order of the classes
pytestmark = pytest.mark.usefixtures("fresh_accelerator", "own_cache")


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    """Three folders of pictures of four quarters, each dark or light, whose class decides the colour."""
    folder, random = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 3)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                levels = random.choice([90, 250], (2, 2)).repeat(8, 0).repeat(8, 1)
                pixels = levels[..., None] * np.array(colour)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def labelled(folder: Path, labels: list[int | None], names: list[str]) -> str:
    """A pattern of parquet files whose pictures tell their number; one validation picture of class 0."""
    kind = ClassLabel(names=names)
    contents = [png(flat(number)) for number in range(len(labels))]
    for shard in range(2):
        write_parquet(folder / f"train-{shard}.parquet", contents[shard::2], kind=(kind, labels[shard::2]))
    write_parquet(folder / "validation.parquet", [png(flat(50))], kind=(kind, [0]))
    return str(folder)


def settings(data: str, **changes) -> TokenizerRun:
    run = TokenizerRun(data=data, image_size=8, batch_size=4, num_workers=0, **changes)
    run.model.num_classes = 3
    return run


# The data.


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_every_crop_comes_with_the_class_of_its_picture_after_a_resume_too(tmp_path, streaming):
    labels = [0, 1, 2, 2, 1, 0, 0, 1, 2, 1]
    config = settings(labelled(tmp_path, labels, ["a", "b", "c"]), streaming=streaming)
    AcceleratorState._reset_state(reset_partial_state=True)
    for done in (0, 3):
        batches = training_batches(open_sources(config)[0], config, Accelerator(cpu=True), done, set())
        for _, batch in zip(range(6), batches, strict=False):
            assert batch.labels.tolist() == [labels[number] for number in numbers(batch.crops)]
            assert batch.labels.dtype == torch.int64
    ((pictures, told),) = evaluation_batches(*open_sources(config), config, 4)
    assert (numbers(pictures), told.tolist()) == ([50], [0])


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_a_picture_without_a_class_is_passed_over_and_named(tmp_path, streaming):
    labels = [0, 1, None, 2, -1, 0]
    config = settings(labelled(tmp_path, labels, ["a", "b", "c"]), streaming=streaming)
    AcceleratorState._reset_state(reset_partial_state=True)
    batches, seen = training_batches(open_sources(config)[0], config, Accelerator(cpu=True), 0, set()), []
    for _, batch in zip(range(6), batches, strict=False):
        assert not {2, 4} & set(numbers(batch.crops))
        assert batch.labels.tolist() == [labels[number] for number in numbers(batch.crops)]
        seen += batch.corrupt
    assert len({name for name, _ in seen}) == 2
    assert {reason for _, reason in seen} == {"it has no class"}


def test_an_unconditional_run_is_told_no_labels(tmp_path):
    config = settings(labelled(tmp_path, [0, None, 1, 1], ["a", "b"]))
    config.model.num_classes = 0
    AcceleratorState._reset_state(reset_partial_state=True)
    batch = next(training_batches(open_sources(config)[0], config, Accelerator(cpu=True), 0, set()))
    assert batch.labels is None
    assert batch.corrupt == []


@pytest.mark.parametrize(
    ("num_classes", "data", "message"),
    [
        (2, "coloured", r"num_classes=2 asks for 2 classes, and data=.* has 3 classes \(blue, green, red\)"),
        (4, "coloured", "asks for 4 classes, and data=.* has 3 classes"),
        (2, "photographs", "asks for 2 classes, and data=photographs has no column of classes"),
    ],
)
def test_a_model_of_other_classes_than_the_data_is_refused_before_anything_is_written(
    num_classes, data, message, coloured, tmp_path
):
    with pytest.raises(UserError, match=message):
        train_here(coloured if data == "coloured" else data, tmp_path / "run", f"model.num_classes={num_classes}")
    assert not (tmp_path / "run").exists()


# What is learned.


SHORT = ["image_size=16", "steps=150", "batch_size=8", "eval_every=150", "save_every=150", "average.decay=0"]
SHORT += ["model.num_classes=3", "optimizer.name=adamw", "data_options.flip=false"]


def colour_under(model: ImageModel, code: torch.Tensor, label: int) -> int:
    """The class whose colour is the brightest when the code is decoded under a label."""
    return 2 - model.decode(code, labels=label).mean((0, 2, 3)).argmax().item()  # blue, green, red


def test_three_colours_share_two_tokens_and_the_label_tells_them_apart(coloured, tmp_path):
    one_bit = ["model.autoencoder.patch_size=16", "model.codebook_dim=1", "model.quantizer.codebook_size=2"]
    train_here(coloured, tmp_path / "run", *SHORT, *one_bit, "model.autoencoder.base_channels=32", "learning_rate=5e-3")
    tokenizer, classes_of = ImageTokenizer.from_pretrained(tmp_path / "run"), defaultdict(set)
    for label, name in enumerate(COLOURS):
        for path in (coloured / "validation" / name).iterdir():
            code = tokenizer.encode(Image.open(path), labels=label)  # (1, 1, 1): the one bit of a picture
            assert colour_under(tokenizer, code, label) == label
            classes_of[code.item()].add(label)
    assert max(map(len, classes_of.values())) >= 2  # so this holds of the same token under different labels


def test_where_the_latents_hold_nothing_they_have_the_colour_of_any_label(coloured, tmp_path):
    given = ["model.autoencoder.patch_size=8", "model.latent_dim=1", "loss.sigma=0.3", "model.posterior.beta=100"]
    train_vae(coloured, tmp_path / "run", *SHORT, *given, "learning_rate=1e-2")
    vae = ImageVAE.from_pretrained(tmp_path / "run")
    for label, name in enumerate(COLOURS):
        latents = vae.encode(Image.open(coloured / "validation" / name / "0.png"), labels=label)
        assert [colour_under(vae, latents, other) for other in range(3)] == [0, 1, 2]
    drawn = vae.sample(6, 16, labels=[0, 1, 2, 0, 1, 2])
    assert (2 - drawn.mean((2, 3)).argmax(1)).tolist() == [0, 1, 2, 0, 1, 2]


def test_two_ranks_equal_one_with_twice_the_batch(coloured, tmp_path):
    program = [str(ROOT / "train" / "vae.py"), *TINY_VAE, "model.num_classes=3", f"data={coloured}"]
    one = run([sys.executable, *program, "batch_size=8", "num_workers=0", f"output_dir={tmp_path / 'one'}"])
    two = run([sys.executable, *TWO_RANKS, *program, f"output_dir={tmp_path / 'two'}"])
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    left, right = records(tmp_path / "one")[-1], records(tmp_path / "two")[-1]
    for key in left:
        assert left[key] == pytest.approx(right[key], rel=1e-2, abs=1e-3), key
    table = load_file(tmp_path / "one/model.safetensors")["autoencoder.decoder.classes.table.weight"]
    assert (table.abs().sum(1) > 0).all()


@pytest.mark.parametrize("train", [train_here, train_vae], ids=["vqvae", "vae"])
def test_a_conditional_run_resumes_to_the_bit(train, coloured, tmp_path, monkeypatch):
    assert_resumes_to_the_bit(coloured, ["model.num_classes=3"], tmp_path, monkeypatch, train)


# From its tokens to a prior.


@pytest.fixture(scope="module")
def conditional(coloured, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("conditional")
    train_here(coloured, folder, "model.num_classes=3", "steps=1", "image_size=16")
    return str(folder)


def encoded(tokenizer: str, data: Path | str, output: Path, **changes) -> TokenStore:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = StoreRun(tokenizer=tokenizer, data=str(data), output_dir=str(output), image_size=16, num_workers=0)
    encode_dataset(replace(config, **changes), Accelerator(cpu=True))
    return TokenStore.open(output)


def test_a_store_holds_the_tokens_of_the_pictures_under_their_classes(conditional, coloured, tmp_path):
    tokenizer = ImageTokenizer.from_pretrained(conditional)
    rows = encoded(conditional, coloured, tmp_path / "store").rows("validation")
    assert len(rows) == 9
    for row in rows:
        label = list(COLOURS).index(row["key"].split("/")[1])
        tokens = tokenizer.encode(Image.open(coloured / row["key"]), labels=label)
        assert row["label"] == label
        assert row["tokens"].tolist() == tokens.flatten().tolist()


def test_data_of_other_classes_has_no_store(conditional, picture_folder, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer=.* asks for 3 classes, and data=.* has no column of classes"):
        encoded(conditional, picture_folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_prior_draws_through_a_conditional_tokenizer_by_class_and_never_without(conditional, coloured, tmp_path):
    encoded(conditional, coloured, tmp_path / "store")
    given = [f"tokens={tmp_path / 'store'}", f"tokenizer={conditional}", f"output_dir={tmp_path / 'prior'}", "steps=1"]
    given += ["model.width=8", "model.num_layers=1", "batch_size=2"]
    AcceleratorState._reset_state(reset_partial_state=True)
    token_prior.main(parse(PriorRun, given))
    with Image.open(tmp_path / "prior/samples/step_000001.png") as sheet:
        assert sheet.size == (3 * 128, 4 * 128)  # a column a class; three rows of the prior, one of the unigram code
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="decodes by the class of a picture, and conditional=false would draw"):
        token_prior.main(parse(PriorRun, [*given[:2], f"output_dir={tmp_path / 'other'}", "conditional=false"]))


# In the benchmarks.


def test_pictures_are_reconstructed_under_their_classes(conditional):
    tokenizer = ImageTokenizer.from_pretrained(conditional)
    pixels, labels = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 2, 1, 0, 2])
    rebuilt = reconstructed(tokenizer, LabelledImages(pixels, labels), GenerationRun(batch_size=2))
    expected = tokenizer.decode(tokenizer.encode(pixels, labels=labels), labels=labels)
    assert torch.equal(rebuilt.pixels, (expected * 255).round().to(torch.uint8))


def test_what_measures_pictures_alone_refuses_a_conditional_tokenizer_at_the_door(conditional):
    with pytest.raises(ValueError, match="must be told the class of each picture, and here pictures are all"):
        SavedTokenizer(conditional, torch.device("cpu"))
    with pytest.raises(UserError, match="model.num_classes=10 must be 0: pictures are measured without labels"):
        checked("model.num_classes=10")
