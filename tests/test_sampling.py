"""The steps from logits to tokens beside references written with loops."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prior.sampling import draw, guidance_scales, guide, keep_top_k, keep_top_p, sample, with_temperature

CUT = -math.inf
rows = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8)
fast = settings(max_examples=200, deadline=None)


def probabilities(row):
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def plain_top_k(row, top_k):
    smallest = sorted(row, reverse=True)[: min(top_k, len(row))][-1]
    return [value if value >= smallest else CUT for value in row]


def plain_top_p(row, top_p):
    """Also the distance of the nearest sum from top_p, where rounding may decide."""
    total, margin = 0.0, math.inf
    for value, probability in sorted(zip(row, probabilities(row), strict=True), reverse=True):
        smallest, total = value, total + probability
        margin = min(margin, abs(total - top_p))
        if total >= top_p:
            break
    return [value if value >= smallest else CUT for value in row], margin


@fast
@given(rows, st.integers(1, 10))
def test_top_k_equals_the_plain_reference(row, top_k):
    assert keep_top_k(torch.tensor([row]), top_k)[0].tolist() == plain_top_k(row, top_k)


@fast
@given(rows, st.floats(0.01, 0.99))
def test_top_p_equals_the_plain_reference(row, top_p):
    expected, margin = plain_top_p(row, top_p)
    assume(margin > 1e-5)
    assert keep_top_p(torch.tensor([row]), top_p)[0].tolist() == expected


@fast
@given(rows, st.floats(1e-6, 1.0))
def test_the_nucleus_holds_the_most_likely_token_and_at_least_top_p(row, top_p):
    kept = keep_top_p(torch.tensor([row]), top_p)[0]
    held = torch.tensor([row])[0].softmax(dim=0)[kept > CUT].sum().item()
    assert kept.max().item() == max(row)
    assert held >= top_p - 1e-5


def test_rows_are_cut_each_by_itself():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    assert keep_top_k(logits, 2).tolist() == [[CUT, 1, 2], [5, 0, 0]]  # the tie stays
    assert keep_top_p(logits, 0.8).tolist() == [[CUT, 1, 2], [5, CUT, CUT]]


def test_temperature_raises_probabilities_to_its_inverse():
    logits = torch.randn(3, 5)
    expected = logits.softmax(dim=1) ** (1 / 0.7)
    expected /= expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(with_temperature(logits, 0.7).softmax(dim=1), expected)
    torch.testing.assert_close(with_temperature(logits, 1.0), logits, rtol=0, atol=0)


@fast
@given(rows, st.floats(0, 1, exclude_max=True))
def test_the_draw_equals_walking_along_the_probabilities(row, uniform):
    total, margin, expected = 0.0, math.inf, None
    for token, probability in enumerate(probabilities(row)):
        total += probability
        margin = min(margin, abs(total - uniform))
        if expected is None and uniform < total:
            expected = token
    assume(margin > 1e-5)
    assert draw(torch.tensor([row]), torch.tensor([uniform], dtype=torch.float64)).tolist() == [expected]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_that_was_cut_is_never_drawn_at_either_end(uniform):
    logits = torch.tensor([[CUT, 0.0, CUT, 1.0, CUT]])
    token = draw(logits, torch.tensor([uniform], dtype=torch.float64)).item()
    assert token in (1, 3)


def test_each_step_follows_the_one_before():
    logits, uniforms = torch.randn(500, 6), torch.rand(500, dtype=torch.float64)
    expected = draw(keep_top_p(keep_top_k(with_temperature(logits, 0.8), 4), 0.7), uniforms)
    assert torch.equal(sample(logits, uniforms, temperature=0.8, top_k=4, top_p=0.7), expected)
    assert torch.equal(sample(logits, uniforms, temperature=1.0, top_k=None, top_p=None), draw(logits, uniforms))


def test_top_k_of_one_takes_the_most_likely_token():
    logits = torch.randn(50, 6)
    chosen = sample(logits, torch.rand(50, dtype=torch.float64), temperature=1.0, top_k=1, top_p=None)
    assert torch.equal(chosen, logits.argmax(dim=1))


def test_guidance_moves_from_the_null_logits_through_the_conditional_ones():
    conditional, null = torch.randn(2, 3, 5)
    torch.testing.assert_close(guide(conditional, null, 0.0), null)
    torch.testing.assert_close(guide(conditional, null, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, null, 3.0), 3 * conditional - 2 * null)


def test_a_guidance_scale_is_constant_or_runs_from_first_to_last():
    assert guidance_scales(2.0, 3) == [2.0, 2.0, 2.0]
    assert guidance_scales((1.0, 4.0), 4) == [1.0, 2.0, 3.0, 4.0]
    assert guidance_scales((1.0, 4.0), 1) == [1.0]


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature} must be .* above 0; .* top_k=1"):
        with_temperature(torch.zeros(1, 3), temperature)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True])
def test_a_top_k_that_keeps_nothing_or_counts_nothing_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must be a whole number of tokens, at least 1"):
        keep_top_k(torch.zeros(1, 3), top_k)


@pytest.mark.parametrize("top_p", [0, -0.1, 1.1, math.nan])
def test_a_top_p_that_is_no_probability_is_refused(top_p):
    with pytest.raises(ValueError, match=rf"top_p={top_p} must lie in \(0, 1\]"):
        keep_top_p(torch.zeros(1, 3), top_p)


@pytest.mark.parametrize("scale", [-1.0, math.nan, (1.0, math.inf), (1.0, 2.0, 3.0)])
def test_a_guidance_scale_that_is_negative_or_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match=r"guidance_scale=.* must be one number or \(first, last\), finite"):
        guidance_scales(scale, 4)
