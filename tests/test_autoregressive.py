"""AutoregressivePrior: its distribution, what generate draws from it, saving, and what it refuses.

Small enough to list all 81 grids of 2 x 2 tokens out of 3, so that every claim is checked against sums over them.
"""

import json
import math
from copy import deepcopy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from scipy.stats import chisquare
from torch.nn import functional as F

from prior import PRIORS, AutoregressivePrior, PriorConfig
from prior.sampling import draw, guide, keep_top_k, keep_top_p
from tokenizer import ImageTokenizer

TINY = {"vocab_size": 3, "grid_size": [2, 2], "num_classes": 2, "width": 16, "num_layers": 2, "num_heads": 2}
ALL_GRIDS = torch.tensor(list(product(range(3), repeat=4))).view(81, 2, 2)


def make_prior(**changes):
    """A tiny prior in eval mode, its weights enlarged: fresh ones make nearly uniform distributions."""
    torch.manual_seed(0)
    prior = AutoregressivePrior(PriorConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(15 if parameter.ndim > 1 else 1)
    return prior


def unconditional_twin(prior):
    """An unconditional prior with the weights of a conditional one, its only class the null class."""
    twin = make_prior(num_classes=0, grid_size=prior.config.grid_size, vocab_size=prior.config.vocab_size)
    weights = prior.state_dict()
    twin.load_state_dict(weights | {"class_embedding.weight": weights["class_embedding.weight"][-1:]})
    return twin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors of a few numbers: a second thread costs more than it does."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


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


# What generate draws


def slow_probabilities(prior, label, temperature=1.0, top_k=None, top_p=None, guidance_scale=1.0):
    """Of all 81 grids under sampling settings, from whole forward passes; the null class from a model of its own."""
    with torch.no_grad():
        logits = prior(ALL_GRIDS, [label] * 81)  # (81, 4, 3)
        null = unconditional_twin(prior)(ALL_GRIDS)
    result = torch.ones(81)
    for position in range(4):
        step = (null + guidance_scale * (logits - null))[:, position] / temperature
        step = step if top_k is None else keep_top_k(step, top_k)
        step = step if top_p is None else keep_top_p(step, top_p)
        result *= step.softmax(dim=1).gather(1, ALL_GRIDS.flatten(1)[:, position, None])[:, 0]
    return result


def assert_drawn_from(grids, probabilities):
    """Chi-square of grids (B, 2, 2) against the probabilities (81,), rare grids counted together."""
    numbers = (grids.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    counts, expected = torch.bincount(numbers, minlength=81).double(), probabilities.double() * len(grids)
    assert (counts[probabilities == 0] == 0).all()
    rare = expected < 10
    counts, expected = (torch.cat([part[~rare], part[rare].sum()[None]]) for part in (counts, expected))
    possible = expected > 0
    assert possible.sum() > 3
    assert chisquare(counts[possible], expected[possible] * counts.sum() / expected.sum()).pvalue > 1e-3


def test_the_defaults_sample_the_models_own_distribution(prior):
    for label in range(2):
        grids = prior.generate(labels=[label] * 10_000, generator=seeded(label), batch_size=2500)
        assert_drawn_from(grids, prior.log_prob(ALL_GRIDS, [label] * 81).exp().detach())


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.8}, {"guidance_scale": 2.0}, {"guidance_scale": 0.5}]
)
def test_each_setting_samples_the_distribution_that_its_definition_gives(prior, settings):
    grids = prior.generate(labels=[1] * 10_000, generator=seeded(), batch_size=2500, **settings)
    assert_drawn_from(grids, slow_probabilities(prior, 1, **settings))


def test_a_completion_keeps_the_prefix_and_samples_the_rest_given_it(prior):
    prefix = torch.tensor([[2, 0]]).repeat(10_000, 1)
    grids = prior.generate(labels=[0] * 10_000, prefix=prefix, generator=seeded(), batch_size=2500)
    assert torch.equal(grids.flatten(1)[:, :2], prefix)
    probabilities = prior.log_prob(ALL_GRIDS, [0] * 81).exp().detach()
    probabilities[(ALL_GRIDS.flatten(1)[:, :2] != prefix[0]).any(dim=1)] = 0
    assert_drawn_from(grids, probabilities / probabilities.sum())


def slow_generate(prior, labels, seed, guidance_scale=1.0):
    """One grid after the other, each token from whole passes without a cache, guidance from two models."""
    twin, num_tokens = unconditional_twin(prior), prior.config.num_tokens
    uniforms = torch.rand(len(labels), num_tokens, generator=seeded(seed), dtype=torch.float64)
    first, last = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale, guidance_scale)
    grids = torch.zeros(len(labels), num_tokens, dtype=torch.int64)
    for grid, row, label in zip(grids, uniforms, labels, strict=True):
        for position in range(num_tokens):
            scale = first + (last - first) * position / (num_tokens - 1)
            logits = guide(prior(grid[None], [label])[:, position], twin(grid[None])[:, position], scale)
            grid[position] = draw(logits, row[position : position + 1])[0]
    return grids.view(-1, *prior.config.grid_size)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 3.0, (1.0, 4.0), (2.0, 0.0)])
def test_cache_batches_and_guidance_in_one_pass_give_the_grids_of_the_slow_way(larger, guidance_scale):
    labels = [0, 1, 2, 2, 1]
    with torch.no_grad():
        expected = slow_generate(larger, labels, 3, guidance_scale)
    found = larger.generate(labels=labels, generator=seeded(3), guidance_scale=guidance_scale, batch_size=2)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 100])
def test_the_same_seed_gives_the_same_grids_at_every_batch_size(larger, batch_size):
    labels = [0, 1, 2] * 3
    expected = larger.generate(labels=labels, generator=seeded(), guidance_scale=1.5, batch_size=9)
    found = larger.generate(labels=labels, generator=seeded(), guidance_scale=1.5, batch_size=batch_size)
    assert torch.equal(found, expected)


def test_no_more_than_a_batch_goes_through_the_network_at_once(larger):
    sizes = set()
    with larger.token_embedding.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0]))):
        larger.generate([0] * 7, generator=seeded(), guidance_scale=2.0, batch_size=3)
    assert sizes == {6, 2}  # with and without the class


def test_another_seed_gives_other_grids_and_no_generator_follows_the_global_one(larger):
    labels = [0] * 20
    assert not torch.equal(larger.generate(labels, generator=seeded(0)), larger.generate(labels, generator=seeded(1)))
    torch.manual_seed(5)
    first = larger.generate(labels)
    torch.manual_seed(5)
    assert torch.equal(larger.generate(labels), first)


@pytest.mark.parametrize("num_given", [0, 1, 4, 7, 12])
def test_a_grid_completed_from_its_own_beginning_under_its_seed_is_itself(larger, num_given):
    whole = larger.generate(labels=[0, 1, 2], generator=seeded())
    prefix = whole.flatten(1)[:, :num_given]
    assert torch.equal(larger.generate(labels=[0, 1, 2], prefix=prefix, generator=seeded()), whole)


def test_a_prefix_may_be_whole_rows(larger):
    rows = torch.randint(7, (2, 2, 4))
    found = larger.generate(labels=[0, 1], prefix=rows, generator=seeded())
    assert torch.equal(found[:, :2], rows)
    assert torch.equal(found, larger.generate(labels=[0, 1], prefix=rows.flatten(1), generator=seeded()))


def test_guidance_scale_one_is_no_guidance_and_zero_the_unconditional_model(larger):
    labels, twin = [0, 1, 2, 0], unconditional_twin(larger)
    plain = larger.generate(labels, generator=seeded())
    assert torch.equal(larger.generate(labels, generator=seeded(), guidance_scale=(1.0, 1.0)), plain)
    unguided = larger.generate(labels, generator=seeded(), guidance_scale=0.0)
    assert torch.equal(unguided, twin.generate(num_samples=4, generator=seeded()))


def test_top_k_of_one_takes_the_most_likely_token_each_time(larger):
    grids = larger.generate(labels=[0, 1, 2], top_k=1)
    assert torch.equal(larger(grids, [0, 1, 2]).argmax(dim=2), grids.flatten(1))


def test_the_number_of_grids_comes_from_labels_prefix_or_num_samples(larger):
    twin = unconditional_twin(larger)
    assert twin.generate().shape == (1, 3, 4)
    assert twin.generate(num_samples=3).shape == (3, 3, 4)
    assert twin.generate(prefix=torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 3, 4)


def test_generating_needs_no_eval_mode_and_keeps_the_mode():
    prior = make_prior(dropout=0.5, class_dropout=0.5)
    expected = prior.generate([0, 1] * 20, generator=seeded())
    assert torch.equal(prior.train().generate([0, 1] * 20, generator=seeded()), expected)
    assert prior.training


def test_the_progress_bar_counts_every_token_and_is_silent_unless_asked(larger, capsys):
    larger.generate([0, 1, 2], batch_size=2)
    assert capsys.readouterr().err == ""
    larger.generate([0, 1, 2], prefix=torch.zeros(3, 2, dtype=torch.int64), batch_size=2, progress=True)
    assert "30/30" in capsys.readouterr().err


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
    ("num_classes", "told", "call"),
    [(0, 0, "generate(num_samples=1)"), (2, 0, "generate(labels=[0])"), (2, 2, "generate(labels=[0])")],
    ids=["no classes", "classes of the prior alone", "classes of both"],
)
def test_the_code_on_the_model_card_draws_a_picture(num_classes, told, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = ImageTokenizer(tiny_config(quantizer={"name": "ema_vq", "codebook_size": 3}, num_classes=told))
    tokenizer.save_pretrained("folder/of/its/tokenizer")
    made_for = {"tokenizer_fingerprint": tokenizer.fingerprint}
    make_prior(num_classes=num_classes, **made_for).save_pretrained("name")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "labels=None; this prior has 2 classes"),
        ({"labels": [0, 5]}, r"labels run from 0 to 5; they must lie in \[0, 2\)"),
        ({"labels": 1}, r"labels of shape \(\); the rule is one per grid"),
        ({"labels": []}, "0 by labels: at least one grid"),
        ({"labels": [0], "num_samples": 2}, "1 by labels, 2 by num_samples; give the same number"),
        ({"labels": [0], "prefix": torch.zeros(1, 5, dtype=torch.int64)}, "prefix of 5 tokens is longer than the grid"),
        ({"labels": [0], "prefix": torch.zeros(1, 3, 2, dtype=torch.int64)}, "prefix of 6 tokens is longer"),
        ({"labels": [0], "prefix": torch.zeros(1, 1, 3, dtype=torch.int64)}, r"or first rows \(B, n, 2\)"),
        ({"labels": [0], "prefix": torch.full((1, 1), 3)}, "prefix tokens run from 3 to 3"),
        ({"labels": [0], "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"labels": [0], "batch_size": 1.5}, "batch_size=1.5 must be at least 1"),
        ({"num_samples": 2.0}, "2.0 by num_samples: at least one grid must be asked for, by a whole number"),
        ({"num_samples": "2"}, "2 by num_samples: at least one grid"),
        ({"labels": "cat"}, "labels='cat'; the rule is integers"),
        ({"labels": [0], "prefix": [["a"]]}, r"prefix=\[\['a'\]\]; the rule is integers"),
        ({"labels": [0], "temperature": 0}, "temperature=0 must be"),
        ({"labels": [0], "temperature": "1"}, "temperature='1' must be"),
        ({"labels": [0], "top_p": "x"}, "top_p='x' must lie"),
        ({"labels": [0], "guidance_scale": None}, "guidance_scale=None must be"),
        ({"labels": [0], "batch_size": True}, "batch_size=True must be"),
        ({"labels": [0], "prefix": torch.zeros(1, dtype=torch.int64)}, r"prefix of shape \(1,\); the rule is first"),
        ({"labels": [0], "prefix": torch.tensor(1)}, r"prefix of shape \(\); the rule is first"),
        ({"labels": [0], "top_k": 0}, "top_k=0 must be"),
        ({"labels": [0], "top_p": 2.0}, "top_p=2.0 must lie"),
        ({"labels": [0], "guidance_scale": -1.0}, "guidance_scale=-1.0 must be"),
    ],
)
def test_generate_refuses_what_the_model_cannot_follow(prior, arguments, message):
    with pytest.raises(ValueError, match=message):
        prior.generate(**arguments)


def test_in_training_on_an_accelerator_nothing_waits_for_values(prior):
    """The meta device has none, so that any look at one fails."""
    away, tokens, labels = (each.to("meta") for each in (deepcopy(prior), GRID, torch.tensor([0])))
    assert away.train()(tokens, labels).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        away.eval()(tokens, labels)


def test_a_prefix_may_be_a_list(prior):
    drawn = [prior.generate([0], prefix=given, generator=seeded()) for given in ([[1, 2]], torch.tensor([[1, 2]]))]
    assert torch.equal(*drawn)


def test_weights_that_are_not_numbers_are_told_and_give_no_tokens(prior):
    damaged = deepcopy(prior)
    torch.nn.init.constant_(damaged.head.weight, math.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        damaged.generate([0])


def test_labels_and_guidance_are_refused_by_an_unconditional_prior():
    prior = make_prior(num_classes=0)
    for call in (lambda: prior(GRID, [0]), lambda: prior.log_prob(GRID, [0]), lambda: prior.generate([0])):
        with pytest.raises(ValueError, match=r"labels were given to an unconditional prior .*leave them out"):
            call()
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs classes; leave it at 1"):
        prior.generate(guidance_scale=2.0)


def test_guidance_is_refused_where_the_null_class_was_never_trained():
    with pytest.raises(ValueError, match="needs a prior trained with class_dropout above 0"):
        make_prior(class_dropout=0.0).generate([0], guidance_scale=2.0)


def test_numpy_tokens_as_a_store_gives_them_are_read(larger):
    tokens = np.random.default_rng(0).integers(0, 7, (2, 12)).astype(np.uint16)
    torch.testing.assert_close(larger(tokens, np.array([0, 1])), larger(torch.tensor(tokens.astype(np.int64)), [0, 1]))
