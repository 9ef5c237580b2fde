"""AutoregressivePrior: its distribution, training, saving, and what it refuses; generate is in test_drawing.py.

Small enough to list all 81 grids of 2 x 2 tokens out of 3, so that every claim is checked against sums over them.
"""

import json
from collections import UserList
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from enlarged_priors import ALL_GRIDS, make_prior, seeded, unconditional_twin
from torch.nn import functional as F

from prior import PRIORS, AutoregressivePrior
from tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prior():
    return make_prior()


@pytest.fixture(scope="module")
def larger():
    return make_prior(vocab_size=7, grid_size=[3, 4], num_classes=3)


# Tokens of every shape

LAYOUTS = {
    "codebooks": ({"grid_size": [2, 3], "num_codebooks": 2}, (2, 3, 2)),
    "scales": ({"grid_size": [2, 3], "coarser_grids": [[1, 1], [1, 2]]}, (9,)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_every_shape_are_one_sequence_and_come_back_in_their_shape(layout):
    changes, shape = LAYOUTS[layout]
    prior = make_prior(**changes)
    tokens = prior.generate(labels=[0, 1], generator=seeded())
    num_tokens = tokens[0].numel()
    assert tokens.shape == (2, *shape)
    assert prior(tokens, [0, 1]).shape == (2, num_tokens, 3)
    assert torch.equal(prior.log_prob(tokens, [0, 1]), prior.log_prob(tokens.flatten(1), [0, 1]))
    first = tokens[:, :1] if len(shape) > 1 else tokens[:, :4]  # a row, or the first tokens
    assert torch.equal(prior.generate(labels=[0, 1], prefix=first, generator=seeded()), tokens)
    with pytest.raises(ValueError, match=rf"\(1, 2, 3\); the rule is \(B, .*{num_tokens}\)"):
        prior(torch.zeros(1, 2, 3, dtype=torch.int64), [0])


def test_tokens_of_a_place_share_its_coordinates_and_coarse_ones_lie_in_the_middle_of_what_they_cover():
    codebooks = make_prior(grid_size=[1, 2], num_codebooks=2).coordinates()
    assert codebooks.tolist() == [[0, 0], [1, 1], [1, 1], [1, 2]]
    scales = make_prior(grid_size=[2, 4], coarser_grids=[[1, 1], [1, 2]]).coordinates()
    assert scales.tolist() == [
        *([0, 0], [1.5, 2.5], [1.5, 1.5], [1.5, 3.5]),
        *([1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [2, 3]),
    ]


# The model's distribution


@pytest.mark.parametrize("num_classes", [0, 2])
def test_the_probabilities_of_all_grids_sum_to_one_for_every_class(num_classes):
    prior = make_prior(num_classes=num_classes)
    for label in range(num_classes) if num_classes else [None]:
        labels = None if label is None else [label] * 81
        probabilities = prior.log_prob(ALL_GRIDS, labels).exp()
        assert probabilities.shape == (81,)
        assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
        assert probabilities.std() > 0.001  # not the uniform distribution, for which this would be easy


def test_log_prob_sums_the_logits_that_were_chosen(larger):
    tokens, labels = torch.randint(7, (2, 3, 4)), torch.tensor([0, 2])
    logits = larger(tokens, labels)
    assert logits.shape == (2, 12, 7)
    assert logits.dtype == torch.float32
    for grid, rows, found in zip(tokens, logits, larger.log_prob(tokens, labels), strict=True):
        terms = [row.log_softmax(dim=0)[token] for row, token in zip(rows, grid.flatten(), strict=True)]
        torch.testing.assert_close(found, sum(terms))


@pytest.mark.parametrize("changed", [0, 1, 5, 10, 11])
def test_a_token_changes_all_later_logits_and_neither_its_own_nor_an_earlier_one(larger, changed):
    tokens = torch.randint(7, (1, 12))
    other = tokens.clone()
    other[0, changed] = (tokens[0, changed] + 1) % 7
    difference = (larger(tokens, [1]) - larger(other, [1])).abs().amax(dim=(0, 2))
    assert (difference[: changed + 1] == 0).all()
    assert (difference[changed + 1 :] > 1e-5).all()


def test_a_class_goes_by_its_name_as_by_its_number(tmp_path):
    named = make_prior(class_names=["tabby cat", "dog"])
    tokens = torch.randint(3, (3, 2, 2))
    assert torch.equal(named(tokens, ["dog", "tabby cat", 1]), named(tokens, [1, 0, 1]))
    for dogs in (("dog",) * 3, UserList(["dog"] * 3), np.array(["dog"] * 3), np.ones(3, dtype=int)):
        assert torch.equal(named.log_prob(tokens, dogs), named.log_prob(tokens, [1] * 3))
    named.save_pretrained(tmp_path)
    loaded = AutoregressivePrior.from_pretrained(tmp_path)
    by_name = loaded.generate(["dog"] * 40, generator=seeded())
    assert torch.equal(by_name, named.generate([1] * 40, generator=seeded()))
    assert not torch.equal(by_name, named.generate(["tabby cat"] * 40, generator=seeded()))


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        ({"class_names": ["tabby cat", "dog"]}, ["taby cat"], "label 'taby cat' is no name .*mean 'tabby cat'"),
        ({"class_names": ["tabby cat", "dog"]}, ["zebra"], "'zebra' is no name .*prior.config.class_names lists them"),
        ({"class_names": ["tabby cat", "dog"]}, "dog", r"one per grid, in a tensor or a list: give \['dog'\]"),
        ({}, ["dog"], r"its classes have none, give numbers in \[0, 2\)"),
        ({"num_classes": 0}, ["dog"], "labels were given to an unconditional prior .*; leave them out"),
    ],
)
def test_a_name_that_no_class_has_is_refused_with_the_nearest(classes, labels, message):
    prior = make_prior(**classes)
    for call in (lambda: prior.generate(labels), lambda: prior.log_prob(torch.zeros(1, 2, 2, dtype=int), labels)):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_class_changes_every_logit(larger):
    tokens = torch.randint(7, (1, 12))
    assert ((larger(tokens, [0]) - larger(tokens, [1])).abs().amax(dim=(0, 2)) > 1e-5).all()


def test_the_same_tokens_at_another_place_get_other_logits():
    tokens, prior = torch.zeros(1, 12, dtype=torch.int64), make_prior(num_classes=0, grid_size=[3, 4])
    logits = prior(tokens)[0]
    assert (torch.cdist(logits, logits) + torch.eye(12) > 1e-4).all()


def test_sequences_small_integer_types_and_lists_of_labels_are_read_as_grids_are(larger):
    tokens = torch.randint(7, (2, 3, 4))
    expected = larger(tokens, torch.tensor([0, 2]))
    for same in (tokens.flatten(1), tokens.to(torch.uint16), tokens.to(torch.int8)):
        torch.testing.assert_close(larger(same, [0, 2]), expected, rtol=0, atol=0)


# Training


def test_a_gradient_reaches_every_parameter():
    prior = make_prior(class_dropout=0.5).train()
    tokens, labels = ALL_GRIDS[:40], torch.arange(40) % 2
    F.cross_entropy(prior(tokens, labels).mT, tokens.flatten(1)).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name
    assert (prior.class_embedding.weight.grad != 0).any(dim=1).all()


def test_training_drops_the_configured_share_of_labels_and_evaluation_none():
    prior = make_prior(class_dropout=0.3, dropout=0.0, grid_size=[1, 1]).train()
    torch.manual_seed(0)
    with torch.no_grad():
        logits = prior(torch.zeros(10_000, 1, 1, dtype=torch.int64), torch.zeros(10_000, dtype=torch.int64))[:, 0]
        kept = prior.eval()(torch.zeros(1, 1, 1, dtype=torch.int64), [0])[0, 0]
        null = unconditional_twin(prior)(torch.zeros(1, 1, 1, dtype=torch.int64))[0, 0]
    is_null, is_kept = (torch.isclose(logits, row, atol=1e-5).all(dim=1) for row in (null, kept))
    assert (is_null ^ is_kept).all()
    assert is_null.float().mean().item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 10_000) ** 0.5)


def test_log_prob_never_depends_on_dropout_and_keeps_mode_and_gradient():
    prior = make_prior(dropout=0.5, class_dropout=0.5)
    expected = prior.log_prob(ALL_GRIDS, [0] * 81)
    found = prior.train().log_prob(ALL_GRIDS, [0] * 81)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert prior.training
    assert found.requires_grad


def test_bf16_autocast_gives_float32_logits_near_those_of_float32(larger):
    tokens, labels = torch.randint(7, (2, 3, 4)), [0, 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = larger(tokens, labels)
        assert larger.generate(labels=labels, guidance_scale=2.0).shape == (2, 3, 4)
    assert logits.dtype == torch.float32
    exact = larger(tokens, labels)
    assert (logits - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_a_prior_held_in_bf16_generates():
    prior = make_prior().bfloat16()
    assert prior(ALL_GRIDS, [0] * 81).dtype == torch.float32
    assert prior.generate(labels=[0, 1]).shape == (2, 2, 2)


def test_a_compiled_prior_is_one_graph_with_the_same_logits_and_state_dict():
    prior = make_prior()
    expected, names = prior(ALL_GRIDS, torch.zeros(81, dtype=torch.int64)), list(prior.state_dict())
    prior.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(prior(ALL_GRIDS, torch.zeros(81, dtype=torch.int64)), expected)
    assert list(prior.state_dict()) == names


# Saving


def test_a_saved_prior_comes_back_with_the_same_logits_config_and_fingerprint(prior, tmp_path):
    prior.save_pretrained(tmp_path)
    loaded = PRIORS["autoregressive"].from_pretrained(tmp_path)
    assert loaded.config == prior.config
    assert loaded.fingerprint == prior.fingerprint
    assert not loaded.training
    torch.testing.assert_close(loaded(ALL_GRIDS, [1] * 81), prior(ALL_GRIDS, [1] * 81), rtol=0, atol=0)
    assert torch.equal(loaded.generate([0, 1], generator=seeded()), prior.generate([0, 1], generator=seeded()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(num_head=2), "unknown key 'num_head'.*did you mean 'num_heads'"),
        (lambda config: config.pop("class_dropout"), "lacks class_dropout"),
        (lambda config: config.update(width=32), "has shape"),
        (lambda config: config.update(num_layers=3), "tensors missing"),
        (lambda config: config.update(model="ImageTokenizer"), "load it with ImageTokenizer"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(prior, tmp_path, change, message):
    prior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoregressivePrior.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("classes", "told", "call"),
    [
        ({"num_classes": 0}, 0, "generate(num_samples=1)"),
        ({}, 0, "generate(labels=[0])"),
        ({}, 2, "generate(labels=[0])"),
        ({"class_names": ["LABELS {source} 'SHAPE'", "cat"]}, 0, """generate(labels=["LABELS {source} 'SHAPE'"])"""),
    ],
    ids=["no classes", "classes of the prior alone", "classes of both", "classes with names"],
)
def test_the_code_on_the_model_card_draws_a_picture(classes, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = ImageTokenizer(tiny_config(quantizer={"name": "ema_vq", "codebook_size": 3}, num_classes=told))
    tokenizer.save_pretrained("folder/of/its/tokenizer")
    made_for = {"tokenizer_fingerprint": tokenizer.fingerprint}
    make_prior(**classes, **made_for).save_pretrained("name")
    card = Path("name/README.md").read_text()
    assert f"prior.{call}" in card
    names: dict = {}
    exec(compile(card.partition("```python\n")[2].partition("```")[0], "README.md", "exec"), names)
    assert names["tokens"].shape == (1, 2, 2)
    assert names["pictures"].shape == (1, 3, 4, 4)
    make_prior(tokenizer="org/tokens", **made_for).save_pretrained("published", source="org/name")
    card = Path("published/README.md").read_text()
    assert 'AutoregressivePrior.from_pretrained("org/name")' in card
    assert "ImageTokenizer.from_pretrained(prior.config.tokenizer)" in card


def test_a_prior_accepts_the_fingerprint_of_its_tokenizer_and_names_both_for_another():
    own, other = "a" * 64, "b" * 64
    make_prior(tokenizer_fingerprint=own).check_tokenizer(own)
    with pytest.raises(ValueError, match=f"{other}.*{own}.*load that tokenizer .org/name"):
        make_prior(tokenizer="org/name", tokenizer_fingerprint=own).check_tokenizer(other)
    with pytest.raises(ValueError, match=f"{other}.*None"):
        make_prior().check_tokenizer(other)


# What is refused


GRID = torch.zeros(1, 2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        (GRID + 3, [0], r"tokens run from 3 to 3; they must lie in \[0, 3\)"),
        (GRID - 1, [0], r"tokens run from -1 to -1; they must lie in \[0, 3\)"),
        (GRID.float(), [0], "tokens of torch.float32; the rule is integers"),
        (GRID.bool(), [0], "tokens of torch.bool; the rule is integers"),
        (GRID[:, :1], [0], r"tokens of shape \(1, 1, 2\); the rule is \(B, 2, 2\) or \(B, 4\)"),
        (GRID[0, 0], [0], r"tokens of shape \(2,\); the rule is"),
        (GRID[:0], [], "with B at least 1"),
        (GRID[..., None], [0], r"tokens of shape \(1, 2, 2, 1\); the rule is .*use the tokenizer that it was"),
        (GRID, None, "labels=None; this prior has 2 classes, give one label per grid"),
        (GRID, [2], r"labels run from 2 to 2; they must lie in \[0, 2\)"),
        (GRID, [-1], r"labels run from -1 to -1; they must lie in \[0, 2\)"),
        (GRID, [0.0], "labels of torch.float32; the rule is integers"),
        (GRID, [0, 1], r"labels of shape \(2,\); the rule is one per grid, \(1,\)"),
    ],
)
def test_tokens_and_labels_that_the_config_does_not_describe_are_refused(prior, tokens, labels, message):
    for method in (prior.forward, prior.log_prob):
        with pytest.raises(ValueError, match=message):
            method(tokens, labels)


def test_in_training_on_an_accelerator_nothing_waits_for_values(prior):
    """The meta device has none, so that any look at one fails."""
    away, tokens, labels = (each.to("meta") for each in (deepcopy(prior), GRID, torch.tensor([0])))
    assert away.train()(tokens, labels).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        away.eval()(tokens, labels)


def test_labels_and_guidance_are_refused_by_an_unconditional_prior():
    prior = make_prior(num_classes=0)
    for call in (lambda: prior(GRID, [0]), lambda: prior.log_prob(GRID, [0]), lambda: prior.generate([0])):
        with pytest.raises(ValueError, match=r"labels were given to an unconditional prior .*leave them out"):
            call()
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs classes; leave it at 1"):
        prior.generate(guidance_scale=2.0)


def test_numpy_tokens_as_a_store_gives_them_are_read(larger):
    tokens = np.random.default_rng(0).integers(0, 7, (2, 12)).astype(np.uint16)
    torch.testing.assert_close(larger(tokens, np.array([0, 1])), larger(torch.tensor(tokens.astype(np.int64)), [0, 1]))
