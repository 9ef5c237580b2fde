"""The multiscale quantizer: the pyramid of algorithms 1 and 2 written out plainly, its placement and its losses."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantizers import DIM, latents_of
from test_residual import nearest
from torch.nn import functional as F

from tokenizer.quantizers import MultiscaleQuantizer
from tokenizer.quantizers.multiscale import shrunk

EACH = {"name": "ema_vq", "codebook_size": 16}


def multiscale(**changes) -> MultiscaleQuantizer:
    torch.manual_seed(0)
    made = MultiscaleQuantizer(DIM, **{"each": EACH, "scales": (1, 2, 4), "num_convolutions": 2} | changes).train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def placed(quantizer, batches: int = 3):
    for seed in range(batches):
        quantizer.train()(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
    return quantizer


@pytest.mark.parametrize("training", [False, True])
def test_each_scale_takes_the_nearest_codes_to_the_averaged_residual_as_in_algorithm_1(training):
    quantizer = placed(multiscale()).train(training)
    codebook, latents = quantizer.part.codebook, latents_of(9, 2, DIM, 8, 12)
    output = quantizer(latents)
    left, start, pyramid = latents, 0, []
    for rows, columns, convolution in [(2, 3, 0), (4, 6, 0), (8, 12, 1)]:
        mean = left.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).mean((3, 5))
        chosen = nearest(mean.movedim(1, -1).flatten(0, 2), codebook).view(2, rows * columns)
        assert torch.equal(chosen, output.indices[:, start : start + rows * columns])
        start += rows * columns
        codes = codebook[chosen].mT.unflatten(2, (rows, columns))
        codes = F.interpolate(codes, (8, 12), mode="bicubic") if rows < 8 else codes
        left = left - (0.5 * codes + 0.5 * quantizer.convolutions[convolution](codes))
        pyramid.append(left.square().mean())
    assert start == output.indices.shape[1]
    torch.testing.assert_close(output.quantized, latents - left)
    torch.testing.assert_close(output.losses["pyramid"], sum(pyramid) / 3)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_the_last_grid_is_that_of_the_latents_and_the_sides_never_fall(height, width):
    grids = MultiscaleQuantizer(DIM, EACH).grids(height, width)
    assert len(grids) == 10
    assert grids[-1] == (height, width)
    assert all(1 <= rows <= more for (rows, _), (more, _) in pairwise(grids))
    assert all(1 <= columns <= more for (_, columns), (_, more) in pairwise(grids))


def test_on_sixteen_by_sixteen_the_defaults_are_the_680_tokens_of_the_paper():
    grids = MultiscaleQuantizer(DIM, EACH).grids(16, 16)
    assert grids == [(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    assert sum(rows * columns for rows, columns in grids) == 680


@pytest.mark.parametrize(("num_convolutions", "built"), [(0, 0), (2, 2), (4, 3)])
def test_no_scale_has_more_than_one_convolution_and_each_convolution_has_a_scale(num_convolutions, built):
    quantizer = placed(multiscale(num_convolutions=num_convolutions))
    assert len(quantizer.convolutions) == built
    quantizer(latents_of(1, 2, DIM, 8, 8)).losses["pyramid"].backward() if built else None
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


def test_the_codes_are_placed_on_the_residuals_of_all_scales():
    quantizer = multiscale(each=EACH | {"placement": 0.5})
    latents = latents_of(0, 8, DIM, 8, 8)
    output = quantizer(latents)
    assert torch.equal(output.quantized, latents)
    assert output.losses == {"commitment": 0, "pyramid": 0}
    assert not quantizer.step(0.25)
    assert not quantizer.placed
    quantizer(latents)
    assert quantizer.step(0.5)  # the codes jumped
    output = quantizer.eval()(latents)
    assert (output.quantized - latents).square().mean() < 0.6 * latents.square().mean()
    assert len(output.indices.unique()) > 12


def test_before_the_placement_every_parameter_still_gets_a_gradient_which_is_zero():
    quantizer = multiscale(each=EACH | {"placement": 0.5})
    sum(quantizer(latents_of(0)).losses.values()).backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in quantizer.parameters())


def test_the_codebook_learns_from_the_inputs_of_all_scales():
    quantizer = placed(multiscale(each=EACH | {"revival_threshold": 0.0}))
    plain, latents = copy.deepcopy(quantizer.part), latents_of(5, 2, DIM, 4, 8)
    indices = quantizer(latents).indices
    sums = quantizer.sums(indices, (4, 8)).detach()
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
    for scale, grid in enumerate([(1, 2), (2, 4), (4, 8)]):
        plain(shrunk(latents - before[:, scale], grid))
    torch.testing.assert_close(quantizer.part.pending.sums, plain.pending.sums)
    assert len(quantizer.part.pending.vectors) == indices.numel()


def test_the_pyramid_teaches_the_convolutions_alone():
    quantizer, latents = placed(multiscale()), latents_of(1, 2, DIM, 8, 8).requires_grad_()
    output = quantizer(latents)
    output.losses["pyramid"].backward()
    assert latents.grad is None
    sums, target = quantizer.sums(output.indices, (8, 8)), latents.detach()
    for parameter in quantizer.parameters():
        (expected,) = torch.autograd.grad((sums - target[:, None]).square().mean(), parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, expected)


def test_the_commitment_is_that_of_the_averaged_residuals():
    quantizer, latents = placed(multiscale()), latents_of(1, 2, DIM, 8, 8).requires_grad_()
    output = quantizer(latents)
    sums = quantizer.sums(output.indices, (8, 8)).detach()
    before = torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], dim=1)
    errors = []
    for scale, side in enumerate((2, 4, 8)):
        mean = F.avg_pool2d(latents - before[:, scale], 8 // side).flatten(2)
        errors.append(mean)
    codes = quantizer.part.codebook[output.indices].mT
    expected = 0.25 * (torch.cat(errors, dim=2) - codes).square().mean()
    torch.testing.assert_close(output.losses["commitment"], expected)
    gradients = [torch.autograd.grad(each, latents)[0] for each in (output.losses["commitment"], expected)]
    torch.testing.assert_close(*gradients)


def test_without_convolutions_codes_are_only_upsampled():
    quantizer = placed(multiscale(num_convolutions=0)).eval()
    output = quantizer(latents_of(9, 2, DIM, 8, 8))
    assert list(quantizer.parameters()) == []
    codes = quantizer.part.indices_to_codes(output.indices[:, :4].view(2, 2, 2))
    torch.testing.assert_close(
        quantizer.indices_to_codes(output.indices[:, :4], (8, 8)), F.interpolate(codes, (8, 8), mode="bicubic")
    )


@pytest.mark.parametrize(
    ("given_value", "message"),
    [
        ({"scales": ()}, r"scales=\[\] must be whole numbers that rise from at least 1"),
        ({"scales": (0, 2)}, r"scales=\[0, 2\] must be whole numbers that rise"),
        ({"scales": (1, 3, 3)}, r"scales=\[1, 3, 3\] must be whole numbers that rise"),
        ({"num_convolutions": -1}, "num_convolutions=-1 must be at least 0"),
        ({"convolution_weight": 1.5}, r"convolution_weight=1.5 must lie in \[0, 1\]"),
        ({"each": {"name": "residual"}}, "each.name='residual' is built of other quantizers; a part of 'multiscale'"),
    ],
)
def test_impossible_hyperparameters_are_named(given_value, message):
    with pytest.raises(ValueError, match=message):
        MultiscaleQuantizer(DIM, **given_value)
