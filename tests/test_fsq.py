"""Finite scalar quantization against the paper's formula, its digits and its refusals."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.quantizers.fsq import FiniteScalarQuantizer


def latents_of(seed: int, dim: int, size: int = 40) -> torch.Tensor:
    """(1, D, 1, size), wide enough to reach every level."""
    return 2 * torch.randn(1, dim, 1, size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(levels=st.lists(st.integers(3, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_codes_and_indices_are_those_of_the_paper_a_component_at_a_time(levels, seed):
    latents = latents_of(seed, len(levels))
    output = FiniteScalarQuantizer(len(levels), levels)(latents)
    for place in range(latents.shape[3]):
        index = 0
        for number, size in enumerate(levels):
            half, offset = (size - 1) / 2, 0.0 if size % 2 else 0.5
            value = latents[0, number, 0, place].item()
            level = round(math.tanh(value + math.atanh(offset / half)) * half - offset)
            assert output.quantized[0, number, 0, place].item() == pytest.approx(level / (size // 2))
            index += (level + size // 2) * math.prod(levels[:number])
        assert output.indices[0, 0, place].item() == index


@pytest.mark.parametrize("levels", [[3, 4, 5], [8, 5], [7]])
def test_each_index_has_a_code_of_its_own_and_component_0_is_the_least_significant_digit(levels):
    quantizer = FiniteScalarQuantizer(len(levels), levels)
    codes = quantizer.indices_to_codes(torch.arange(quantizer.vocab_size).view(1, 1, -1))[0, :, 0].T
    grids = [[(digit - size // 2) / (size // 2) for digit in range(size)] for size in levels]
    expected = [code[::-1] for code in itertools.product(*grids[::-1])]  # the last factor of a product runs fastest
    torch.testing.assert_close(codes, torch.tensor(expected))
    assert codes.min() >= -1
    assert codes.max() <= 1


@pytest.mark.parametrize("size", [3, 4, 1000, 1001, 3000, 65536])
def test_latents_far_out_reach_the_outermost_levels_and_none_beyond_and_zero_the_middle(size):
    quantizer = FiniteScalarQuantizer(1, size)
    indices = quantizer(torch.tensor([-1e9, -30.0, 0.0, 30.0, 1e9]).view(1, 1, 1, 5)).indices.flatten().tolist()
    assert indices == [0, 0, size // 2, size - 1, size - 1]


@pytest.mark.parametrize("size", [5, 6])
def test_the_gradient_is_that_of_the_bound_whose_slope_the_formula_gives(size):
    latents = latents_of(0, 1).requires_grad_()
    quantizer = FiniteScalarQuantizer(1, size)
    quantizer(latents).quantized.sum().backward()
    half, offset = (size - 1) / 2, 0.0 if size % 2 else 0.5
    shifted = latents.detach() + math.atanh(offset / half)
    torch.testing.assert_close(latents.grad, half / (size // 2) / torch.cosh(shifted).square())


def test_two_to_the_62_codes_are_counted_and_decoded_without_overflow():
    quantizer = FiniteScalarQuantizer(31, 4)
    assert quantizer.vocab_size == 2**62
    latents = torch.full((1, 31, 1, 1), 1e9)
    output = quantizer(latents)
    assert output.indices.item() == 2**62 - 1
    assert torch.equal(quantizer.indices_to_codes(output.indices), output.quantized)


def test_one_number_of_levels_is_that_of_every_component():
    assert FiniteScalarQuantizer(3, 5).vocab_size == FiniteScalarQuantizer(3, [5, 5, 5]).vocab_size == 125


def test_codes_survive_a_cast_of_the_model_to_bfloat16():
    levels = [1000, 7]
    latents, quantizer = latents_of(0, 2), FiniteScalarQuantizer(2, levels)
    expected = quantizer(latents).indices
    assert torch.equal(quantizer.to(torch.bfloat16)(latents).indices, expected)
    assert not quantizer.state_dict()


@pytest.mark.parametrize(
    ("dim", "levels", "message"),
    [
        (4, [8, 8, 8], r"levels=\[8, 8, 8\] has 3 numbers and codebook_dim is 4; .* set codebook_dim=3"),
        (2, [8, 2], "at least 3; components of two levels are lfq's"),
        (1, [70000], "at most 65536"),
        (32, 4, "are 18,446,744,073,709,551,616 codes; .* take fewer levels"),
        (0, 4, "codebook_dim=0 must be at least 1"),
    ],
)
def test_impossible_levels_are_named(dim, levels, message):
    with pytest.raises(ValueError, match=message):
        FiniteScalarQuantizer(dim, levels)
