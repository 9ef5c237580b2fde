"""The codebook that learns by gradient, and SimVQ's, which is a learned map of a frozen one."""

import pytest
import torch
from latents import DIM, latents_of, trained
from torch.nn import functional as F

from tokenizer.quantizers.gradients import GRADIENTS
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.vq import VectorQuantizer

BOTH = pytest.mark.parametrize("choice", [VectorQuantizer, SimVQ])


def make(choice=VectorQuantizer, **hyperparameters) -> VectorQuantizer | SimVQ:
    torch.manual_seed(0)
    return trained(choice(DIM, **({"codebook_size": 16} | hyperparameters)))


@BOTH
def test_the_losses_are_mean_squared_distances_times_their_weights(choice):
    quantizer, latents = make(choice, codebook_weight=0.7, commitment_weight=0.3), latents_of(1)
    output = quantizer(latents)
    distance = (latents - output.quantized).square().mean()
    assert output.losses.keys() == {"codebook", "commitment"}
    torch.testing.assert_close(output.losses["codebook"], 0.7 * distance)
    torch.testing.assert_close(output.losses["commitment"], 0.3 * distance)


@BOTH
def test_the_commitment_reaches_the_latents_alone(choice):
    quantizer, latents = make(choice, commitment_weight=0.3), latents_of(1).requires_grad_()
    output = quantizer(latents)
    output.losses["commitment"].backward()
    torch.testing.assert_close(latents.grad, 0.3 * 2 * (latents - output.quantized).detach() / latents.numel())
    assert all(each.grad is None for each in quantizer.parameters())


def test_the_codebook_loss_draws_each_code_to_the_latents_that_chose_it_and_reaches_nothing_else():
    quantizer, latents = make(codebook_weight=0.7), latents_of(1).requires_grad_()
    output = quantizer(latents)
    output.losses["codebook"].backward()
    assert latents.grad is None
    for code in range(16):
        members = latents.detach().movedim(1, -1)[output.indices == code]
        expected = 0.7 * 2 * (quantizer.codebook[code] - members).sum(0) / latents.numel()
        torch.testing.assert_close(quantizer.codes.weight.grad[code], expected)


def test_the_codebook_loss_of_simvq_moves_the_map_and_nothing_else():
    quantizer, latents = make(SimVQ, codebook_weight=0.7), latents_of(1).requires_grad_()
    before = quantizer.frozen_codes.clone()
    output = quantizer(latents)
    output.losses["codebook"].backward()
    assert latents.grad is None
    assert [name for name, _ in quantizer.named_parameters()] == ["map.weight"]
    differences = (output.quantized - latents).detach().movedim(1, -1).flatten(0, -2)
    expected = 0.7 * 2 * differences.T @ quantizer.frozen_codes[output.indices.flatten()] / latents.numel()
    torch.testing.assert_close(quantizer.map.weight.grad, expected)
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    assert torch.equal(quantizer.frozen_codes, before)
    assert "frozen_codes" in quantizer.state_dict()


@BOTH
def test_what_moves_by_the_losses_lowers_them(choice):
    quantizer, latents = make(choice), latents_of(5, 4, DIM, 8, 8)
    optimizer, losses = torch.optim.Adam(quantizer.parameters(), lr=0.01), []
    for _ in range(50):
        loss = quantizer(latents).losses["codebook"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_simvq_searches_returns_and_looks_up_mapped_codes():
    quantizer, latents = make(SimVQ), latents_of(1)
    with torch.no_grad():
        quantizer.map.weight.copy_(3 * torch.eye(DIM).roll(1, 0))
    mapped = 3 * quantizer.frozen_codes.roll(1, 1)
    torch.testing.assert_close(quantizer.codebook, mapped)
    output = quantizer.eval()(latents)
    vectors = latents.movedim(1, -1)
    assert torch.equal(output.indices, torch.cdist(vectors.flatten(0, -2), mapped).argmin(1).view(2, 3, 5))
    found = quantizer.indices_to_codes(output.indices)
    torch.testing.assert_close(found, mapped[output.indices].movedim(-1, 1))
    assert torch.equal(found, output.quantized)
    assert not torch.allclose(found, quantizer.frozen_codes[output.indices].movedim(-1, 1))


@BOTH
@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
def test_the_gradient_of_the_output_passes_by_the_chosen_estimator_and_reaches_no_code(choice, gradient):
    quantizer, latents, direction = make(choice, gradient=gradient), latents_of(1).requires_grad_(), latents_of(2)
    output = quantizer(latents)
    (output.quantized * direction).sum().backward()
    given = latents.detach().clone().requires_grad_()
    (GRADIENTS[gradient](given, output.quantized.detach()) * direction).sum().backward()
    torch.testing.assert_close(latents.grad, given.grad)
    assert all(each.grad is None for each in quantizer.parameters())


def test_on_the_sphere_the_gradient_of_codes_is_that_of_their_directions():
    quantizer, latents = make(normalize=True), latents_of(1)
    with torch.no_grad():
        quantizer.codes.weight.mul_(3.0)
    output = quantizer(latents)
    output.losses["codebook"].backward()
    weight = quantizer.codes.weight.detach().clone().requires_grad_()
    codes = (weight / weight.norm(dim=1, keepdim=True))[output.indices].movedim(-1, 1)
    F.mse_loss(codes, latents / latents.norm(dim=1, keepdim=True)).backward()
    torch.testing.assert_close(quantizer.codes.weight.grad, weight.grad)


def test_what_adam_remembers_of_a_code_bounds_its_steps_after_it_was_moved():
    """Why a moved code keeps its moments: unchosen, its momentum fades, and its steps stay a few learning rates."""
    weight, rate, steps = torch.nn.Parameter(torch.zeros(1)), 0.01, []
    optimizer = torch.optim.Adam([weight], lr=rate)
    for gradient in [1.0] * 20 + [0.0] * 1000 + [-1e3] * 20:  # in use, then dead, then moved far away
        weight.grad, before = torch.tensor([gradient]), weight.item()
        optimizer.step()
        steps.append(abs(weight.item() - before))
    assert max(steps[120:1020]) < 1e-3 * rate
    assert max(steps[1020:]) < 7 * rate


@BOTH
def test_impossible_weights_are_named(choice):
    for name in ("codebook_weight", "commitment_weight"):
        with pytest.raises(ValueError, match=f"{name}=-1.0 must not be negative"):
            choice(DIM, **{name: -1.0})
    with pytest.raises(ValueError, match="codebook_size=1 must be at least 2"):
        choice(DIM, codebook_size=1)
