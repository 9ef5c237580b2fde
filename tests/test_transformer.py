"""The network beside slow, obvious references. Shapes as in prior/transformer.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from prior.transformer import (
    PLAIN_LENGTH,
    Attention,
    RMSNorm,
    SwiGLU,
    Transformer,
    attend,
    rotary_angles,
    rotate,
)

WIDTH, NUM_HEADS = 16, 2
PLACES = torch.cartesian_prod(torch.arange(3), torch.arange(4))  # (12, 2)
shifts = st.tuples(st.integers(0, 30), st.integers(0, 30))


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    transformer = Transformer(WIDTH, num_layers=3, num_heads=NUM_HEADS, dropout=0.0).eval()
    for parameter in transformer.parameters():  # large weights, so that a mistake is not lost in the residual stream
        torch.nn.init.normal_(parameter, std=0.5)
    return transformer


def score(query, key, query_place, key_place):
    angles = rotary_angles(torch.tensor([query_place, key_place]), len(query))
    rotated_query, rotated_key = rotate(query[None], angles[:1]), rotate(key[None], angles[1:])
    return (rotated_query @ rotated_key.mT).item()


@settings(max_examples=50, deadline=None)
@given(shifts, shifts, shifts)
def test_attention_scores_depend_only_on_the_offsets_in_row_and_column(query_place, key_place, shift):
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    moved = [[place[0] + shift[0], place[1] + shift[1]] for place in (query_place, key_place)]
    expected = score(query, key, query_place, key_place)
    assert score(query, key, *moved) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("place", [(0, 1), (1, 0), (0, 2), (2, 1), (1, 2)])
def test_different_offsets_give_different_scores(place):
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert abs(score(query, key, place, (0, 0)) - score(query, key, (0, 0), (0, 0))) > 1e-3
    assert abs(score(query, key, place, (0, 0)) - score(query, key, place[::-1], (0, 0))) > 1e-3


def test_rotation_equals_turning_complex_numbers_one_by_one():
    vectors = torch.randn(len(PLACES), 8)
    rotated = rotate(vectors, rotary_angles(PLACES, 8))
    for vector, turned, (row, column) in zip(vectors, rotated, PLACES.tolist(), strict=True):
        for pair, angle in enumerate([row, row * 100**-0.5, column, column * 100**-0.5]):
            expected = complex(vector[pair], vector[pair + 4]) * complex(math.cos(angle), math.sin(angle))
            assert complex(turned[pair], turned[pair + 4]) == pytest.approx(expected, abs=1e-5)


def test_angles_stay_exact_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rotary_angles(PLACES, 16)
    torch.testing.assert_close(found, rotary_angles(PLACES, 16), rtol=0, atol=0)


def test_nothing_is_turned_at_the_origin():
    vectors = torch.randn(1, 8)
    torch.testing.assert_close(rotate(vectors, rotary_angles(torch.zeros(1, 2), 8)), vectors, rtol=0, atol=0)


def test_attention_equals_a_loop_over_queries_and_heads():
    torch.manual_seed(0)
    attention, hidden = Attention(WIDTH, NUM_HEADS), torch.randn(2, len(PLACES), WIDTH)
    torch.nn.init.normal_(attention.query_norm.weight)
    torch.nn.init.normal_(attention.key_norm.weight)
    angles, head_width = rotary_angles(PLACES, WIDTH // NUM_HEADS), WIDTH // NUM_HEADS
    expected = torch.zeros_like(hidden)
    for image in range(2):
        queries, keys, values = attention.expand(hidden[image]).split(WIDTH, dim=1)
        for head in range(NUM_HEADS):
            part = slice(head * head_width, (head + 1) * head_width)
            query = rotate(attention.query_norm(queries[:, part]), angles)
            key = rotate(attention.key_norm(keys[:, part]), angles)
            for i in range(len(PLACES)):
                weights = (key[: i + 1] @ query[i] / math.sqrt(head_width)).softmax(dim=0)
                expected[image, i, part] = weights @ values[: i + 1, part]
    torch.testing.assert_close(attention(hidden, angles, None), attention.project(expected))


@pytest.mark.parametrize("length", [1, 5, PLAIN_LENGTH + 1])
def test_attention_in_bfloat16_and_its_gradients_are_those_in_float64_up_to_rounding(length):
    torch.manual_seed(0)
    rounded = [torch.randn(2, 3, length, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [each.detach().double().requires_grad_() for each in rounded]
    expected, found = F.scaled_dot_product_attention(*exact, is_causal=True), attend(*rounded)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    towards = torch.randn_like(found)
    gradients = torch.autograd.grad(found, rounded, towards), torch.autograd.grad(expected, exact, towards.double())
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0.05, atol=0.05)


def test_rms_norm_follows_its_formula_in_float32():
    norm, hidden = RMSNorm(8), 100 * torch.randn(5, 8)
    torch.nn.init.normal_(norm.weight)
    expected = hidden / (hidden.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(hidden), expected)
    hidden = hidden.bfloat16()
    torch.testing.assert_close(norm(hidden), norm(hidden.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(("width", "inner_width"), [(256, 768), (1024, 2816), (1536, 4096)])
def test_the_feed_forward_width_is_that_of_llamagen(width, inner_width):
    with torch.device("meta"):
        assert SwiGLU(width).project.in_features == inner_width


def test_swiglu_follows_its_formula():
    layer, hidden = SwiGLU(8), torch.randn(5, 8)
    gate, value = layer.expand.weight.chunk(2)
    expected = (hidden @ gate.T * torch.sigmoid(hidden @ gate.T) * (hidden @ value.T)) @ layer.project.weight.T
    torch.testing.assert_close(layer(hidden), expected)


@pytest.mark.parametrize("changed", range(0, 12, 3))
def test_an_input_reaches_itself_and_all_later_outputs_and_no_earlier_one(transformer, changed):
    hidden = torch.randn(1, len(PLACES), WIDTH)
    before = transformer(hidden, PLACES)
    hidden[:, changed] += 1
    difference = (transformer(hidden, PLACES) - before).abs().amax(dim=(0, 2))
    assert (difference[:changed] == 0).all()
    assert (difference[changed:] > 1e-5).all()


def test_the_residual_stream_starts_with_the_same_scale_at_every_depth():
    hidden, places = torch.randn(2, 64, 64), torch.cartesian_prod(torch.arange(8), torch.arange(8))
    growth = {}
    for num_layers in (2, 32):
        torch.manual_seed(0)
        transformer = Transformer(64, num_layers, num_heads=2, dropout=0.0)
        transformer.norm = torch.nn.Identity()
        growth[num_layers] = (transformer(hidden, places) - hidden).std().item()
    assert growth[32] == pytest.approx(growth[2], rel=0.5)


def test_activation_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    transformer, hidden = Transformer(WIDTH, num_layers=2, num_heads=2, dropout=0.5), torch.randn(2, len(PLACES), WIDTH)
    gradients = []
    for transformer.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        transformer.zero_grad()
        F.mse_loss(transformer(hidden, PLACES), torch.ones_like(hidden)).backward()
        gradients.append([parameter.grad.clone() for parameter in transformer.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
