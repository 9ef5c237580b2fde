"""AutoregressivePrior.generate: what it draws, beside sums over all grids and a slow way, and what it refuses."""

import math
from copy import deepcopy

import pytest
import torch
from enlarged_priors import ALL_GRIDS, make_prior, seeded, unconditional_twin
from scipy.stats import chisquare

from prior.sampling import draw, guide, keep_top_k, keep_top_p

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prior():
    return make_prior()


@pytest.fixture(scope="module")
def larger():
    return make_prior(vocab_size=7, grid_size=[3, 4], num_classes=3)


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


# What is refused


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
        ({"labels": [["cat"]]}, r"labels=\[\['cat'\]\]; the rule is integers"),
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


def test_a_prefix_may_be_a_list(prior):
    drawn = [prior.generate([0], prefix=given, generator=seeded()) for given in ([[1, 2]], torch.tensor([[1, 2]]))]
    assert torch.equal(*drawn)


def test_weights_that_are_not_numbers_are_told_and_give_no_tokens(prior):
    damaged = deepcopy(prior)
    torch.nn.init.constant_(damaged.head.weight, math.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        damaged.generate([0])


def test_guidance_is_refused_where_the_null_class_was_never_trained():
    with pytest.raises(ValueError, match="needs a prior trained with class_dropout above 0"):
        make_prior(class_dropout=0.0).generate([0], guidance_scale=2.0)
