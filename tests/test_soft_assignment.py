"""Hard codes with a soft gradient: equal to the dense formula in chunks of any size, and never of its size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from soft_reference import dense_hard_codes

from tokenizer.quantizers import search
from tokenizer.quantizers.soft_assignment import hard_codes, logits_by_chunk, soft_statistics


@pytest.fixture
def chunk_of(monkeypatch):
    return lambda numbers: monkeypatch.setattr(search, "DISTANCES_PER_CHUNK", {"cpu": numbers})


def problem(
    seed: int, num_vectors: int = 9, num_codes: int = 7, dim: int = 3, dtype=torch.float64
) -> list[torch.Tensor]:
    """Queries, keys, bias and values, each with a gradient; components of values are one more."""
    shapes = [(num_vectors, dim), (num_codes, dim), (num_codes,), (num_codes, dim + 1)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def temperature_of(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    num_vectors=st.integers(1, 20),
    num_codes=st.integers(2, 30),
    dim=st.integers(1, 5),
    chunk=st.integers(1, 200),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
    noise_seed=st.sampled_from([None, 5]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_the_dense_formula(
    num_vectors, num_codes, dim, chunk, temperature, noise_seed, seed
):
    given_values, temperature = problem(seed, num_vectors, num_codes, dim), temperature_of(temperature)
    direction = torch.randn(num_vectors, dim + 1, dtype=torch.float64)
    whole = search.DISTANCES_PER_CHUNK
    search.DISTANCES_PER_CHUNK = {"cpu": chunk}
    try:
        with torch.no_grad():
            pieces = [
                torch.cat([logits for _, logits in logits_by_chunk(*given_values[:3], temperature, noise)])
                for noise in (None, noise_seed)
            ]
        codes, indices = hard_codes(*given_values, temperature, noise_seed)
        gradients = torch.autograd.grad((codes * direction).sum(), given_values)
    finally:
        search.DISTANCES_PER_CHUNK = whole
    noise = (pieces[1] - pieces[0]) * temperature
    expected, soft = dense_hard_codes(*given_values, temperature, noise)
    assert torch.equal(codes, given_values[3][indices])
    assert torch.equal(indices, soft.argmax(1))
    torch.testing.assert_close(codes, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * direction).sum(), given_values))


def test_the_gradient_by_logits_is_the_slope_of_the_soft_codes_by_finite_differences():
    *softmax, values = problem(0)
    temperature, direction = temperature_of(0.5), torch.randn(9, 4, dtype=torch.float64)

    def soft(*shifted: torch.Tensor) -> torch.Tensor:
        queries, keys, bias = shifted
        return ((((queries @ keys.t() + bias) / temperature).softmax(1) @ values) * direction).sum()

    codes, _ = hard_codes(*softmax, values, temperature)
    gradients = torch.autograd.grad((codes * direction).sum(), softmax)
    steps = [torch.randn_like(each) for each in softmax]
    with torch.no_grad():
        ahead, behind = (
            soft(*(each + sign * 1e-6 * step for each, step in zip(softmax, steps, strict=True))) for sign in (1, -1)
        )
    slope = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_the_statistics_are_those_of_the_dense_softmax_and_their_gradients_those_of_finite_differences(chunk, chunk_of):
    chunk_of(chunk)
    softmax, temperature = problem(1)[:3], temperature_of(0.7)
    queries, keys, bias = softmax
    probabilities = ((queries @ keys.t() + bias) / temperature).softmax(1)
    mean, entropy = soft_statistics(*softmax, temperature)
    torch.testing.assert_close(mean, probabilities.mean(0))
    torch.testing.assert_close(entropy, torch.special.entr(probabilities).sum(1).mean())
    assert torch.autograd.gradcheck(lambda *given_values: soft_statistics(*given_values, temperature), softmax)


def test_statistics_stay_finite_where_probabilities_vanish():
    softmax = problem(2, dtype=torch.float32)[:3]
    mean, entropy = soft_statistics(*softmax, torch.tensor(1e-4))
    gradients = torch.autograd.grad(mean.square().sum() + entropy, softmax)
    assert all(each.isfinite().all() for each in (mean, entropy, *gradients))


def test_no_tensor_of_forward_or_backward_is_larger_than_a_chunk(chunk_of):
    chunk_of(4096)
    *softmax, values = problem(0, num_vectors=1000, num_codes=64, dim=3, dtype=torch.float32)
    temperature = torch.tensor(1.0)
    with LargestTensor() as fast:
        codes, _ = hard_codes(*softmax, values, temperature, 3)
        mean, entropy = soft_statistics(*softmax, temperature)
        (codes.sum() + mean.square().sum() + entropy).backward()
    assert fast.numbers == 4096
    with LargestTensor() as dense:
        dense_hard_codes(*softmax, values, temperature)[0].sum().backward()
    assert dense.numbers == 64000  # the measure would see it


@pytest.mark.parametrize("number", [1, 2, 3, 15, 16, 17, 40])
@pytest.mark.parametrize(("num_codes", "dim"), [(300, 5), (1024, 64)])
def test_the_logits_of_a_vector_do_not_depend_on_the_number_of_others(number, num_codes, dim):
    torch.manual_seed(0)
    queries, keys, bias = torch.randn(100, dim), torch.randn(num_codes, dim), torch.randn(num_codes)
    few, all_of_them = (
        torch.cat([logits for _, logits in logits_by_chunk(vectors, keys, bias, torch.ones(()))])
        for vectors in (queries[:number], queries)
    )
    assert torch.equal(few, all_of_them[:number])


def test_a_tie_goes_to_the_lowest_index():
    keys, values = torch.tensor([[0.0], [1.0], [1.0]]), torch.arange(3.0)[:, None]
    codes, indices = hard_codes(torch.ones(1, 1), keys, torch.zeros(3), values, torch.tensor(1.0))
    assert indices.tolist() == [1]
    assert codes.tolist() == [[1.0]]


def test_noise_draws_indices_by_their_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    queries, keys = torch.ones(20000, 1), torch.zeros(4, 1)
    _, indices = hard_codes(queries, keys, logits, keys, torch.tensor(0.3), noise_seed=0)
    shares, expected = torch.bincount(indices, minlength=4) / 20000, logits.softmax(0)
    deviations = (expected * (1 - expected) / 20000).sqrt()
    assert ((shares - expected).abs() < 4 * deviations).all()


def test_a_backward_pass_under_autocast_is_in_float32():
    given_values, temperature = problem(0, dtype=torch.float32), torch.tensor(1.0)
    found = []
    for enabled in (True, False):
        codes, _ = hard_codes(*given_values, temperature)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(codes.square().sum(), given_values))
    assert all(torch.equal(inside, outside) for inside, outside in zip(*found, strict=True))
