"""The two-level hierarchy: figure 2a of VQ-VAE-2 written out plainly, its placement, losses, gradients and numbers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latents import DIM, latents_of
from test_residual import nearest
from torch.nn import functional as F

from tokenizer.quantizers import HierarchicalQuantizer

EACH = {"name": "ema_vq", "codebook_size": 16}
GRID = (8, 6)


def hierarchical(**changes) -> HierarchicalQuantizer:
    """With weights everywhere: residual blocks start at zero."""
    torch.manual_seed(0)
    made = HierarchicalQuantizer(DIM, **{"each": EACH, "width": 8} | changes).train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def placed(quantizer):
    for seed in range(3):
        quantizer.train()(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
    return quantizer


def convolved(features, convolution, **options):
    return F.conv2d(features, convolution.weight, convolution.bias, **options)


def through_block(block, features):
    hidden = convolved(F.silu(features), block.conv1, padding=1)
    return features + convolved(F.silu(hidden), block.conv2, padding=1)


def straight_through(latents, codebook):
    """The nearest codes with the gradient of the latents, and their indices, by all distances."""
    indices = nearest(latents.detach().movedim(1, -1).flatten(0, 2), codebook).view(len(latents), *latents.shape[2:])
    codes = codebook[indices].movedim(-1, 1)
    return latents + (codes - latents).detach(), indices, codes


def written_out(quantizer, latents):
    """Figure 2a: what the decoder sees, the indices and the commitment of each level."""
    first, block, last = quantizer.to_top
    top_latents = convolved(through_block(block, convolved(latents, first, stride=2, padding=1)), last)
    top, top_indices, top_codes = straight_through(top_latents, quantizer.top.codebook)
    hidden = through_block(quantizer.from_top.block, convolved(top, quantizer.from_top.conv_in, padding=1))
    rows, columns = (torch.arange(side) // 2 for side in latents.shape[2:])
    decoded = convolved(hidden[:, :, rows][:, :, :, columns], quantizer.from_top.conv_out, padding=1)
    bottom_latents = convolved(torch.cat([latents, decoded], 1), quantizer.to_bottom)
    bottom, bottom_indices, bottom_codes = straight_through(bottom_latents, quantizer.bottom.codebook)
    seen = convolved(torch.cat([bottom, decoded], 1), quantizer.merge)
    distances = [(top_latents - top_codes).square().mean(), (bottom_latents - bottom_codes).square().mean()]
    return seen, torch.cat([top_indices.flatten(1), bottom_indices.flatten(1)], 1), 0.25 * sum(distances)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grid", [(8, 6), (3, 5), (1, 1)])
def test_it_is_figure_2a_written_out_its_commitment_and_all_gradients_too(training, grid):
    quantizer = placed(hierarchical()).train(training)
    latents, direction = latents_of(9, 2, DIM, *grid).requires_grad_(), latents_of(3, 2, DIM, *grid)
    output = quantizer(latents)
    seen, indices, commitment = written_out(quantizer, latents)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, seen)
    torch.testing.assert_close(output.losses["commitment"], commitment)
    assert output.losses.keys() == {"commitment"}
    given = [latents, *quantizer.parameters()]
    found = torch.autograd.grad((output.quantized * direction).sum() + output.losses["commitment"], given)
    expected = torch.autograd.grad((seen * direction).sum() + commitment, given)
    for one, other in zip(found, expected, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_bottom_depends_on_the_top_and_the_top_not_on_the_bottom():
    quantizer, latents = placed(hierarchical()).eval(), latents_of(9, 2, DIM, *GRID)
    top, bottom = quantizer.levels(quantizer(latents).indices, GRID)
    with torch.no_grad():
        quantizer.bottom.ema_sum.add_(1.0)
        assert torch.equal(quantizer.levels(quantizer(latents).indices, GRID)[0], top)
        quantizer.bottom.ema_sum.sub_(1.0)
        quantizer.top.ema_sum.neg_()  # the same places, read as other codes
    changed = quantizer.levels(quantizer(latents).indices, GRID)
    assert not torch.equal(changed[1], bottom)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_the_top_has_half_the_sides_rounded_up(height, width):
    assert hierarchical().grids(height, width) == [(-(-height // 2), -(-width // 2)), (height, width)]


def test_codes_are_numbered_by_the_level_that_they_belong_to():
    quantizer = hierarchical()
    assert quantizer.num_codes == 32
    assert quantizer.vocab_size == 16
    for grid in (GRID, (3, 5)):
        indices = quantizer(latents_of(1, 2, DIM, *grid)).indices
        (rows, columns), _ = quantizer.grids(*grid)
        numbers = quantizer.code_numbers(indices, grid)
        assert torch.equal(numbers[:, : rows * columns], indices[:, : rows * columns])
        assert torch.equal(numbers[:, rows * columns :], indices[:, rows * columns :] + 16)


def test_the_bottom_is_placed_on_what_it_is_given_once_the_top_is_placed():
    quantizer, latents = hierarchical(each=EACH | {"placement": 0.5}), latents_of(0, 4, DIM, 8, 8)
    quantizer(latents)
    assert not quantizer.step(0.25)
    assert not quantizer.placed
    plain = copy.deepcopy(quantizer)
    quantizer(latents)
    assert quantizer.step(0.5)  # the codes jumped
    assert quantizer.placed

    plain.top(plain.to_top(latents))
    plain.top.step(0.5)
    codes = plain.top.eval()(plain.to_top(latents)).quantized
    plain.bottom(plain.to_bottom(torch.cat([latents, plain.from_top(codes, (8, 8))], 1)))
    plain.bottom.step(0.5)
    torch.testing.assert_close(quantizer.top.codebook, plain.top.codebook)
    torch.testing.assert_close(quantizer.bottom.codebook, plain.bottom.codebook)


def test_before_the_placement_the_networks_learn_with_nothing_quantized():
    quantizer, latents = hierarchical(each=EACH | {"placement": 0.5}), latents_of(0)
    output = quantizer(latents)
    top = quantizer.from_top(quantizer.to_top(latents), (3, 5))
    bottom = quantizer.to_bottom(torch.cat([latents, top], 1))
    torch.testing.assert_close(output.quantized, quantizer.merge(torch.cat([bottom, top], 1)))
    output.quantized.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_at_first_a_mixture_of_the_top_is_added_to_one_level_by_itself():
    torch.manual_seed(0)
    quantizer = HierarchicalQuantizer(DIM, {"name": "lfq"})
    own, top = latents_of(1), latents_of(2)
    for network in (quantizer.to_bottom, quantizer.merge):
        added = network(torch.cat([own, top], 1)) - own
        torch.testing.assert_close(added, network(torch.cat([torch.zeros_like(own), top], 1)))
        assert added.abs().mean() > 0.1


def test_each_level_may_be_any_quantizer_with_one_index_a_place():
    for each in ({"name": "fsq", "levels": [4, 3, 3, 3]}, {"name": "lfq"}, {"name": "vq", "codebook_size": 8}):
        quantizer = placed(hierarchical(each=each)).eval()
        output = quantizer(latents_of(1, 2, DIM, *GRID))
        assert torch.equal(quantizer.indices_to_codes(output.indices, GRID), output.quantized)


@pytest.mark.parametrize(
    ("given_value", "message"),
    [
        ({"width": 0}, "width=0 must be at least 1 channel"),
        ({"each": {"name": "residual"}}, "each.name='residual' is built of other quantizers; a part of 'hierarchical'"),
    ],
)
def test_impossible_hyperparameters_are_named(given_value, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalQuantizer(DIM, **given_value)
