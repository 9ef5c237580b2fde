"""The judging of samples, on tiny real models and pictures whose classes are plain to see."""

import json
from pathlib import Path

import generation
import numpy as np
import pytest
import tables
import torch
from classifier import accuracy, predict, shifted, train_classifier
from conftest import tiny_config
from generation import GenerationRun, command_of, main, recognised, share
from labelled_images import LabelledImages
from neighbours import CHUNK, distances_of, nearest
from PIL import Image

from prior import AutoregressivePrior, PriorConfig
from tokenizer import ImageTokenizer
from train.config import UserError, parse

CPU = torch.device("cpu")
SIDE, NAMES = 8, ["dark", "half", "light"]


def shades(num_images: int, seed: int = 0) -> LabelledImages:
    """Noisy pictures of class 0, 1, 2, 0, ..., told apart by their brightness."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % len(NAMES)
    noise = torch.randint(40, (num_images, 1, SIDE, SIDE), generator=random)
    return LabelledImages((noise + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def judge():
    return train_classifier(shades(300), len(NAMES), 30, seed=0, device=CPU)


def test_a_classifier_learns_classes_that_are_plain_to_see(judge):
    assert accuracy(judge, shades(99, seed=1)) == 1


def test_the_seed_decides_a_classifier_and_the_surroundings_do_not():
    weights = []
    for surroundings in (1, 2):
        torch.manual_seed(surroundings)
        trained = train_classifier(shades(30), len(NAMES), 3, seed=5, device=CPU)
        weights.append(list(trained.state_dict().values()))
        assert torch.initial_seed() == surroundings
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_training_picture_is_moved_whole_and_not_always_the_same_way():
    torch.manual_seed(0)
    pixels = torch.zeros(200, 1, SIDE, SIDE, dtype=torch.uint8)
    pixels[:, :, 3:5, 4] = 9
    moved = shifted(pixels)
    places = moved.flatten(1).bool().int().argmax(dim=1)  # of the first pixel that is lit
    assert (moved.flatten(1).sum(dim=1) == 18).all()
    assert set(places.tolist()) == {SIDE * row + column for row in range(1, 6) for column in range(2, 7)}


def test_a_generator_of_the_wrong_class_is_not_recognised(judge):
    samples = shades(90)
    found = recognised(judge, samples, NAMES)
    assert found["share"] == 1
    samples.pixels[samples.labels == 1] = samples.pixels[samples.labels == 2]
    found = recognised(judge, samples, NAMES)
    assert found["share"] == pytest.approx(2 / 3)
    assert [found["per_class"][name]["share"] for name in NAMES] == [1, 0, 1]


def test_predictions_do_not_depend_on_how_many_are_asked_for(judge):
    pixels = shades(1001).pixels
    assert torch.equal(predict(judge, pixels)[-3:], predict(judge, pixels[-3:]))


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (9, 10), (903, 1000), (1000, 1000)])
def test_the_interval_is_wilsons(hits, total):
    from scipy.stats import binomtest

    expected = binomtest(hits, total).proportion_ci(method="wilson")
    found = share(torch.arange(total) < hits)
    assert found["share"] == pytest.approx(hits / total)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_nearest_are_those_of_a_plain_search(monkeypatch):
    monkeypatch.setattr("neighbours.CHUNK", 7)
    random = torch.Generator().manual_seed(0)
    queries, references = (torch.randint(256, (n, 3, 4, 4), generator=random, dtype=torch.uint8) for n in (5, 30))
    distances, indices = nearest(queries, references, 4)
    for query, row, found in zip(queries, distances, indices, strict=True):
        every = [((query / 255 - reference / 255) ** 2).sum().sqrt().item() for reference in references]
        assert found.tolist() == sorted(range(30), key=every.__getitem__)[:4]
        assert row.tolist() == pytest.approx(sorted(every)[:4], rel=1e-5)


def test_a_copy_is_at_distance_nought_and_shows_in_the_figures():
    references = torch.randint(256, (CHUNK + 5, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    distances, indices = nearest(references[-2:], references, 1)
    assert distances.flatten().tolist() == [0, 0]
    assert indices.flatten().tolist() == [CHUNK + 3, CHUNK + 4]
    others = torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert distances_of(others, references)["percentile_1"] > 0
    assert distances_of(torch.cat([others, references[:3]]), references)["percentile_1"] == 0


def test_the_content_hash_tells_pictures_labels_and_order_apart():
    images = shades(6)
    relabelled = LabelledImages(images.pixels, images.labels.flip(0))
    hashes = {each.content_hash for each in (images, images[:5], images[torch.tensor([0, 2, 1, 3, 4, 5])], relabelled)}
    assert len(hashes) == 4
    assert shades(6).content_hash == images.content_hash


def save_split(folder: Path, images: LabelledImages) -> None:
    """An image folder with a folder per class."""
    for index, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels[0])).save(folder / NAMES[label] / f"{index:03d}.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `data` of three shades, and an untrained `tokenizer` and `prior` that belong together."""
    folder = tmp_path_factory.mktemp("generation")
    save_split(folder / "data" / "train", shades(60))
    save_split(folder / "data" / "test", shades(30, seed=1))
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny_config(image_channels=1))
    tokenizer.save_pretrained(folder / "tokenizer")
    side, fingerprint = SIDE // tokenizer.downsample_factor, tokenizer.fingerprint
    shape = {"width": 16, "num_layers": 1, "num_heads": 2}
    others = ["black", "grey", "silver"]
    priors = {"prior": (3, []), "two_classes": (2, []), "no_classes": (0, []), "other_classes": (3, others)}
    for name, (num_classes, names) in priors.items():
        known = {"class_names": names, "tokenizer_fingerprint": fingerprint}
        config = PriorConfig(32, [side, side], num_classes, **shape, **known)
        AutoregressivePrior(config).save_pretrained(folder / name)
    return folder


def arguments(files: Path, **changes: object) -> GenerationRun:
    values = {"prior": files / "prior", "tokenizer": files / "tokenizer", "data": files / "data"}
    values |= {"num_samples": 30, "classifier_steps": 3, "batch_size": 8} | changes
    return parse(GenerationRun, [f"{key}={value}" for key, value in values.items()])


def test_the_program_writes_its_record_and_both_sheets(files, tmp_path):
    main("tiny", arguments(files, named="org/shades", top_k=5), tmp_path)
    written = json.loads((tmp_path / "benchmarks/results/generation_tiny.json").read_text())
    protocol = written["protocol"]
    assert protocol["tokenizer"]["fingerprint"] == ImageTokenizer.from_pretrained(files / "tokenizer").fingerprint
    assert protocol["prior"]["fingerprint"] == AutoregressivePrior.from_pretrained(files / "prior").fingerprint
    assert (protocol["train"]["images"], protocol["test"]["images"]) == (60, 30)
    assert protocol["settings"]["data"] == "org/shades"
    assert str(files / "data") not in json.dumps(written)
    assert written["command"].endswith("data=org/shades num_samples=30 top_k=5 batch_size=8 classifier_steps=3")
    assert written["recognised"]["per_class"].keys() == set(NAMES)
    assert set(written["score_images"].values()) == {30}
    assert tables.generation_row(written).keys() >= {"recognised", "classification accuracy score", "samples/s"}
    for sheet, num_rows in (("samples", len(NAMES)), ("neighbours", 1 + generation.NUM_NEIGHBOURS)):
        with Image.open(tmp_path / f"docs/tiny_{sheet}.png") as picture:
            assert picture.size == (10 * 128, num_rows * 128)


def test_samples_are_those_of_the_prior_decoded_and_of_each_class_as_many(files):
    config = arguments(files, temperature=0.5, guidance_scale=2, seed=3)
    prior, tokenizer = generation.load_models(config, CPU)
    samples, _ = generation.draw(prior, tokenizer, config)
    assert samples.labels.bincount().tolist() == [10, 10, 10]
    generator = torch.Generator().manual_seed(3)
    grids = prior.generate(samples.labels, temperature=0.5, guidance_scale=2, generator=generator)
    pictures = tokenizer.decode(grids) * 255
    assert (samples.pixels - pictures).abs().max() <= 0.51


def test_a_reconstruction_is_that_of_its_own_picture(files):
    config, images = arguments(files), shades(20)
    _, tokenizer = generation.load_models(config, CPU)
    rebuilt = generation.reconstructed(tokenizer, images, config)
    assert (rebuilt.pixels - tokenizer.decode(tokenizer.encode(images.pixels)) * 255).abs().max() <= 0.51
    assert torch.equal(rebuilt.labels, images.labels)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_samples": 31}, "multiple of the prior's 3 classes"),
        ({"prior": "nowhere"}, "neither a folder here nor a model"),
        ({"temperature": 0}, "temperature=0.0 must be a finite number above 0"),
        ({"data": "photographs"}, "no column of classes"),
    ],
)
def test_what_cannot_be_is_one_clear_line(files, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        main("tiny", arguments(files, **changes), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        ("no_classes", "has no classes"),
        ("two_classes", "has 3 classes"),
        ("other_classes", "has a class 'dark' where the prior has 'black'"),
    ],
)
def test_a_prior_must_have_the_classes_of_the_data(files, tmp_path, prior, told):
    with pytest.raises(UserError, match=told):
        main("tiny", arguments(files, prior=files / prior), tmp_path)


def test_another_tokenizer_is_refused(files, tmp_path):
    torch.manual_seed(1)
    ImageTokenizer(tiny_config(image_channels=1)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="fingerprint"):
        main("tiny", arguments(files, tokenizer=tmp_path / "other"), tmp_path)


def test_the_command_names_models_data_and_what_is_not_default():
    config = GenerationRun(prior="runs/p", data="/somewhere", named="org/data", guidance_scale=1.5)
    assert command_of("x", config) == (
        "python benchmarks/generation.py x prior=runs/p tokenizer=runs/vqvae data=org/data guidance_scale=1.5"
    )


def test_a_readme_without_a_place_for_a_table_is_refused():
    with pytest.raises(ValueError, match="no place for the vqvae table"):
        tables.with_tables("a readme")


def test_tables_are_written_between_their_markers_and_nothing_else_changes():
    with_results = [name for name in tables.ROWS if tables.table(name)]
    assert with_results
    places = [
        f"<!-- {name} results, by benchmarks/tables.py -->#<!-- end of {name} results -->" for name in with_results
    ]
    before, middle, after = "begin\n", "\nmiddle\n", "\nend\n"
    filled = tables.with_tables(before + middle.join(place.replace("#", "old") for place in places) + after)
    expected = [
        place.replace("#", f"\n{tables.table(name)}\n") for place, name in zip(places, with_results, strict=True)
    ]
    assert filled == before + middle.join(expected) + after
    assert tables.with_tables(filled) == filled
