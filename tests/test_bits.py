"""Bits and indices, and the entropies of soft bits against the dense formula over all codes.

Launched by path, this file is the program of one rank: `... test_bits.py FOLDER`.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TWO_RANKS
from torch import Tensor, distributed

from tokenizer.quantizers.bits import batch_entropy, bits_to_indices, indices_to_bits, sample_entropy


def logits_of(seed: int, num_vectors: int, num_bits: int, scale: float = 2.0) -> Tensor:
    """(N, D), never quite at nought over the batch."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(num_bits, generator=generator)
    return scale * (torch.randn(num_vectors, num_bits, generator=generator) + shift)


def dense_probabilities(logits: Tensor) -> Tensor:
    """Softmax (N, 2^D) in float64 over every code, by the sum of its bits' logits; bit 0 is the least significant."""
    num_bits = logits.shape[1]
    codes = torch.tensor([code[::-1] for code in itertools.product([0.0, 1.0], repeat=num_bits)]).double()
    return torch.softmax(logits.double() @ codes.T, dim=1)


def dense_entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.log()).sum(-1)


@settings(max_examples=50, deadline=None)
@given(num_bits=st.integers(1, 62), data=st.data())
def test_indices_are_the_sums_of_powers_of_two_with_channel_0_the_least_significant(num_bits, data):
    index = data.draw(st.integers(0, 2**num_bits - 1))
    bits = indices_to_bits(torch.tensor([[[index]]]), num_bits)
    assert bits.shape == (1, num_bits, 1, 1)
    assert sum(2**place for place, bit in enumerate(bits.flatten().tolist()) if bit) == index
    assert bits_to_indices(bits).item() == index


@settings(max_examples=30, deadline=None)
@given(num_vectors=st.integers(1, 20), num_bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_values_and_gradients_of_both_entropies_are_those_of_the_dense_formula(num_vectors, num_bits, seed):
    logits = logits_of(seed, num_vectors, num_bits)
    for fast, dense in [
        (sample_entropy, lambda given: dense_entropy(dense_probabilities(given)).mean()),
        (lambda given: batch_entropy(given, 8), lambda given: dense_entropy(dense_probabilities(given).mean(0))),
    ]:
        ours, reference = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value, expected = fast(ours), dense(reference)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
        value.backward(), expected.backward()
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(num_bits=st.integers(2, 8), bits_per_group=st.integers(1, 7), seed=st.integers(0, 99))
def test_grouped_the_batch_entropy_is_the_sum_of_exact_ones_and_bounds_the_whole(num_bits, bits_per_group, seed):
    logits = logits_of(seed, 30, num_bits)
    parts = [dense_entropy(dense_probabilities(part).mean(0)) for part in logits.split(bits_per_group, dim=1)]
    grouped, exact = batch_entropy(logits, bits_per_group).double(), batch_entropy(logits, num_bits).double()
    torch.testing.assert_close(grouped, sum(parts), rtol=1e-4, atol=1e-4)
    assert exact - 1e-4 <= grouped <= exact + sum(parts) - max(parts) + 1e-4


def test_grouped_the_batch_entropy_is_exact_where_the_groups_are_independent_over_the_batch():
    lower, upper = logits_of(0, 5, 2), logits_of(1, 7, 3)
    pairs = torch.cat([lower.repeat_interleave(7, 0), upper.repeat(5, 1)], dim=1)  # every lower with every upper
    torch.testing.assert_close(batch_entropy(pairs[:, :2], 2) + batch_entropy(pairs[:, 2:], 3), batch_entropy(pairs, 5))


def test_bits_that_are_certain_have_no_entropy_and_finite_gradients():
    logits = (1e6 * torch.tensor([[1.0, -1.0, 1.0]] * 4)).requires_grad_()
    value = sample_entropy(logits) + batch_entropy(logits, 3)
    value.backward()
    assert value == 0
    assert logits.grad.isfinite().all()


def run_rank(folder: Path) -> None:
    """The entropy over two ranks of halves of the logits, and the gradient as DistributedDataParallel averages it."""
    distributed.init_process_group("gloo")
    rank, both = distributed.get_rank(), logits_of(0, 24, 5)
    scale = torch.ones((), requires_grad=True)  # a parameter that the ranks share
    value = batch_entropy(both.chunk(2)[rank] * scale, 4)
    value.backward()
    distributed.all_reduce(scale.grad)
    torch.save((value.detach(), scale.grad / 2), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_have_the_batch_entropy_and_the_gradient_of_one_with_the_whole_batch(tmp_path):
    command = [sys.executable, *TWO_RANKS, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    scale = torch.ones((), requires_grad=True)
    expected = batch_entropy(logits_of(0, 24, 5) * scale, 4)
    expected.backward()
    for rank in (0, 1):
        value, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, scale.grad, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
