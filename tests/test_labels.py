"""Conditional models: the doors take the class of each image, and refuse what is none; unconditional ones refuse it."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY_AUTOENCODER, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tokenizer import ImageTokenizer, ImageVAE, VAEConfig
from tokenizer.image_model import ImageModel
from train.optimization import Trainee

NUM_CLASSES = 3
FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vae_config(**changes) -> VAEConfig:
    return VAEConfig(**{"latent_dim": 4, "autoencoder": TINY_AUTOENCODER} | changes)


CONFIGS = {ImageTokenizer: tiny_config, ImageVAE: vae_config}


def model_of(kind: type[ImageModel], **changes) -> ImageModel:
    """Random weights everywhere: class tables and residual blocks start at zero."""
    torch.manual_seed(0)
    model = kind(CONFIGS[kind](**{"num_classes": NUM_CLASSES} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=CONFIGS, ids=lambda kind: kind.__name__)
def model(request) -> ImageModel:
    return model_of(request.param)


def images_of(batch: int, seed: int = 0, height: int = 6, width: int = 10) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@FEW
@given(labels=st.lists(st.integers(0, NUM_CLASSES - 1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_decoding_what_was_encoded_under_the_same_labels_is_forward_to_the_bit(model, labels, seed):
    images = images_of(len(labels), seed)
    decoded = model.decode(model.encode(images, labels=labels), labels=labels)
    assert torch.equal(decoded, model(images, torch.tensor(labels)).reconstructions.clamp(0, 1))


def test_an_image_and_its_class_give_the_same_whatever_the_batch_around_them(model):
    images, labels = images_of(7), [0, 1, 2, 0, 2, 1, 1]
    alone = torch.cat([model.encode(image, labels=label) for image, label in zip(images, labels, strict=True)])
    assert torch.equal(model.encode(images, labels=labels), alone)
    chosen = [5, 0, 2]
    assert torch.equal(model.encode(images[chosen], labels=torch.tensor(labels)[chosen]), alone[chosen])


def test_labels_are_a_tensor_of_any_integers_a_list_or_one_number_for_all(model):
    images = images_of(3)
    expected = model.encode(images, labels=torch.tensor([2, 2, 2]))
    for labels in ([2, 2, 2], 2, torch.tensor(2), torch.tensor([2, 2, 2], dtype=torch.uint8)):
        assert torch.equal(model.encode(images, labels=labels), expected)
    decoded = model.decode(expected, labels=[1, 1, 1])
    assert torch.equal(model.decode(expected, labels=1), decoded)
    assert torch.equal(model.decode(expected[0], labels=1), model.decode(expected[:1], labels=[1]))


def test_the_class_changes_what_is_encoded_and_what_is_decoded(model):
    image = images_of(1)
    latents = [model.encode_latents(image, torch.tensor([label])) for label in range(NUM_CLASSES)]
    assert all(not torch.equal(latents[0], other) for other in latents[1:])
    code = model.encode(image, labels=0)
    pictures = [model.decode(code, labels=label) for label in range(NUM_CLASSES)]
    assert all(not torch.equal(pictures[0], other) for other in pictures[1:])


def test_the_shift_is_what_one_hot_planes_beside_the_input_of_a_convolution_come_to(model):
    encoder, labels = model.autoencoder.encoder, torch.tensor([2, 0])
    patches = encoder.patchify(2 * images_of(2) - 1)
    planes = F.one_hot(labels, NUM_CLASSES)[:, :, None, None].expand(-1, -1, *patches.shape[2:]).float()
    kernel = torch.zeros(encoder.conv_in.out_channels, NUM_CLASSES, 3, 3)
    kernel[:, :, 1, 1] = encoder.classes.table.weight.T  # the middle alone, so that the border does not differ
    kernel = torch.cat([encoder.conv_in.weight, kernel], dim=1)
    expected = F.conv2d(torch.cat([patches, planes], dim=1), kernel, encoder.conv_in.bias, padding=1)
    torch.testing.assert_close(encoder.classes(encoder.conv_in(patches), labels), expected)


def test_a_new_model_is_the_same_for_every_class_and_every_class_learns():
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        model = kind(config(num_classes=NUM_CLASSES)).eval()
        images = images_of(2)
        assert torch.equal(model.encode(images, labels=0), model.encode(images, labels=2))
        output = model.train()(images, torch.tensor([0, 2]))
        (output.reconstructions - images).square().mean().backward()
        for half in (model.autoencoder.encoder, model.autoencoder.decoder):
            moved = half.classes.table.weight.grad.abs().sum(1) > 0
            assert moved.tolist() == [True, False, True]


def test_samples_are_decoded_draws_of_the_prior_under_their_labels():
    vae = model_of(ImageVAE)
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    drawn = vae.sample(3, 8, torch.Generator().manual_seed(1), labels=[0, 1, 2])
    assert torch.equal(drawn, vae.decode(latents, labels=[0, 1, 2]))
    mean, _ = vae.moments(images_of(2), labels=[1, 0])
    assert torch.equal(mean, vae.encode(images_of(2), labels=[1, 0]))


WRONG = {
    "missing": (None, r"labels=None; this model knows 3 classes: give labels=..., integers in \[0, 3\), one for each"),
    "too large": ([0, 3], r"labels run from 0 to 3; the rule is integers in \[0, 3\)"),
    "negative": (torch.tensor([-1, 0]), "labels run from -1 to 0"),
    "too few": ([1], r"labels of shape \(1,\) for 2 images"),
    "too many": ([1, 1, 1], r"labels of shape \(3,\) for 2 images"),
    "of two axes": ([[1, 1]], r"labels of shape \(1, 2\) for 2 images"),
    "none at all": ([], "labels of torch.float32"),
    "floats": ([0.0, 1.0], "labels of torch.float32; the rule is integers"),
    "truth values": ([True, False], "labels of torch.bool"),
    "a name": ("cat", "labels='cat'; the rule is integers"),
}


def doors(model: ImageModel, labels: object) -> list:
    """Every public method that takes labels, called for two images."""
    plain = {} if model.config.num_classes == 0 else {"labels": [0, 1]}
    code = model.encode(images_of(2), **plain)
    calls = [
        lambda: model(images_of(2), labels),
        lambda: model.encode(images_of(2), labels=labels),
        lambda: model.decode(code, labels=labels),
    ]
    if isinstance(model, ImageVAE):
        calls += [lambda: model.moments(images_of(2), labels=labels), lambda: model.sample(2, 8, labels=labels)]
    return calls


@pytest.mark.parametrize("case", WRONG)
def test_every_door_refuses_what_are_no_labels(model, case):
    labels, message = WRONG[case]
    for call in doors(model, labels):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_door_of_an_unconditional_model_refuses_labels(kind):
    for call in doors(model_of(kind, num_classes=0), [0, 1]):
        with pytest.raises(ValueError, match=r"unconditional model \(num_classes=0\); leave them out"):
            call()


@torch.no_grad()
def test_in_training_on_an_accelerator_nothing_waits_for_labels(model):
    """The meta device has no values, so that any look at one fails."""
    away, labels = copy.deepcopy(model).to("meta"), torch.tensor([0, 1], device="meta")
    assert away.train().classes(labels, 2).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        away.eval().classes(labels, 2)


def test_forward_with_labels_compiles_into_one_graph(model):
    images, labels = images_of(2), torch.tensor([0, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, labels).reconstructions, model(images, labels).reconstructions)


def test_a_saved_model_comes_back_and_its_card_tells_of_labels(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert (loaded.fingerprint, loaded.decoder_fingerprint) == (model.fingerprint, model.decoder_fingerprint)
    images = images_of(2)
    assert torch.equal(loaded.encode(images, labels=[2, 1]), model.encode(images, labels=[2, 1]))
    assert 'picture.jpg"), labels=0)' in (tmp_path / "model/README.md").read_text()


def test_the_tables_belong_to_the_halves_that_they_shift(model):
    before = model.fingerprint, model.decoder_fingerprint
    with torch.no_grad():
        model.autoencoder.decoder.classes.table.weight += 1
    assert model.fingerprint == before[0]
    assert model.decoder_fingerprint != before[1]
    with torch.no_grad():
        model.autoencoder.encoder.classes.table.weight += 1
    assert model.fingerprint != before[0]


def test_the_optimizer_takes_the_tables_for_embeddings_which_muon_does_not_move(model):
    groups = Trainee(model, 1e-3, (0.9, 0.99), weight_decay=0.1, orthogonal=True).groups()
    tables = {id(half.classes.table.weight) for half in (model.autoencoder.encoder, model.autoencoder.decoder)}
    (group,) = [each for each in groups if tables & {id(weight) for weight in each["params"]}]
    assert {id(weight) for weight in group["params"]} == tables
    assert not group["orthogonal"]


def test_a_tokenizer_saved_before_there_were_classes_is_unconditional_with_its_fingerprint(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("num_classes") == 0
    path.write_text(json.dumps(values | {"format_version": 1}))
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.config.num_classes == 0
    assert loaded.fingerprint == tokenizer.fingerprint
    assert "num_classes" not in loaded.config.identity()
    assert asdict(loaded.config) == asdict(tokenizer.config)


@pytest.mark.parametrize("config", CONFIGS.values())
def test_a_number_of_classes_that_cannot_be_is_refused(config):
    with pytest.raises(ValueError, match="num_classes=-1 must be at least 1, or 0 for an unconditional model"):
        config(num_classes=-1)
