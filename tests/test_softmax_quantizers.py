"""Quantizers whose gradient is that of a softmax: softmax_vq, gumbel_vq and ibq."""

import copy
import math

import pytest
import torch
from latents import DIM, latents_of, trained
from soft_reference import dense_hard_codes
from torch.nn import functional as F

from tokenizer.quantizers import gumbel_vq
from tokenizer.quantizers.gumbel_vq import GumbelVectorQuantizer
from tokenizer.quantizers.ibq import IndexBackpropagationQuantizer
from tokenizer.quantizers.search import nearest_codes
from tokenizer.quantizers.softmax_vq import SoftmaxVectorQuantizer


def make(choice, **hyperparameters):
    torch.manual_seed(0)
    return trained(choice(DIM, **({"codebook_size": 16} | hyperparameters)))


def flat(latents: torch.Tensor) -> torch.Tensor:
    return latents.movedim(1, -1).flatten(0, -2)


# softmax_vq


def test_softmax_vq_takes_the_nearest_code_whatever_the_temperature():
    for temperature in (0.01, 1.0, 100.0):
        quantizer, latents = make(SoftmaxVectorQuantizer, temperature=temperature), latents_of(1)
        found = quantizer.eval()(latents).indices
        assert torch.equal(found.flatten(), nearest_codes(flat(latents), quantizer.codebook.detach()))


def test_the_reconstruction_moves_the_codes_of_softmax_vq_by_index_and_by_softmax():
    quantizer, latents, direction = make(SoftmaxVectorQuantizer, temperature=0.5), latents_of(1), latents_of(2)
    (quantizer(latents).quantized * direction).sum().backward()
    codes = quantizer.codebook.detach().clone().requires_grad_()
    distances = (flat(latents)[:, None] - codes[None]).square().sum(-1)
    soft = (-distances / 0.5).softmax(1)
    hard = F.one_hot(soft.argmax(1), 16).float()
    ((hard - soft.detach() + soft) @ codes * flat(direction)).sum().backward()
    torch.testing.assert_close(quantizer.codes.weight.grad, codes.grad, rtol=1e-4, atol=1e-5)


def test_the_commitment_of_softmax_vq_reaches_the_latents_alone():
    quantizer, latents = make(SoftmaxVectorQuantizer, commitment_weight=0.3), latents_of(1).requires_grad_()
    output = quantizer(latents)
    assert output.losses.keys() == {"commitment"}
    output.losses["commitment"].backward()
    torch.testing.assert_close(latents.grad, 0.3 * 2 * (latents - output.quantized).detach() / latents.numel())
    assert all(each.grad is None for each in quantizer.parameters())


# gumbel_vq


def test_noise_is_drawn_in_training_alone_from_the_global_generator():
    quantizer, latents = make(GumbelVectorQuantizer), latents_of(1)
    likeliest = (flat(latents) @ quantizer.keys.weight.T + quantizer.bias).argmax(1)
    assert torch.equal(quantizer.eval()(latents).indices.flatten(), likeliest)
    quantizer.train()
    torch.manual_seed(1)
    first, second = (quantizer(latents).indices for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(quantizer(latents).indices, first)
    assert not torch.equal(first, second)


def test_each_rank_draws_noise_of_its_own(monkeypatch):
    quantizer, latents, found = make(GumbelVectorQuantizer), latents_of(1), []
    for rank in (0, 1):
        monkeypatch.setattr(gumbel_vq, "own_rank_and_number", lambda rank=rank: (rank, 2))
        torch.manual_seed(1)
        found.append(quantizer(latents).indices)
    assert not torch.equal(*found)


def test_the_temperature_falls_on_a_cosine_and_is_part_of_the_checkpoint():
    quantizer = GumbelVectorQuantizer(DIM, start_temperature=2.0, end_temperature=0.5).train()
    found = [quantizer.temperature.item()]
    for progress in (0.0, 1 / 3, 0.5, 2 / 3, 1.0):
        assert not quantizer.step(progress)
        found.append(quantizer.temperature.item())
    expected = [2.0, *(0.5 + 1.5 * (1 + math.cos(math.pi * share)) / 2 for share in (0.0, 1 / 3, 0.5, 2 / 3, 1.0))]
    assert found == pytest.approx(expected)
    quantizer.step(0.5)
    other = GumbelVectorQuantizer(DIM, start_temperature=2.0, end_temperature=0.5)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.temperature, quantizer.temperature)


def test_the_divergence_is_that_from_the_uniform_prior_and_its_gradient_that_of_the_formula():
    quantizer, latents = make(GumbelVectorQuantizer, kl_weight=0.7), latents_of(1).requires_grad_()
    parameters = [quantizer.keys.weight, quantizer.bias, latents]
    loss = quantizer(latents).losses["kl"]
    log_probabilities = (flat(latents) @ quantizer.keys.weight.T + quantizer.bias).log_softmax(1)
    expected = 0.7 * (log_probabilities.exp() * (log_probabilities - math.log(1 / 16))).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, [*parameters, quantizer.codes.weight], allow_unused=True)
    assert found[-1] is None
    torch.testing.assert_close(found[:-1], torch.autograd.grad(expected, parameters))


def test_a_uniform_distribution_costs_nothing():
    quantizer = make(GumbelVectorQuantizer)
    with torch.no_grad():
        quantizer.keys.weight.zero_()
    assert quantizer(latents_of(1)).losses["kl"].item() == pytest.approx(0.0, abs=1e-6)


# ibq


def ibq_terms(quantizer, latents: torch.Tensor, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of IBQ from dense formulas, with gradients by latents and codes."""
    vectors = flat(latents)
    soft_codes, soft = dense_hard_codes(vectors, codes, torch.zeros(len(codes)), codes, 1.0)
    hard = codes[soft.argmax(1)]
    sharp = ((vectors @ codes.T) / quantizer.entropy_temperature).softmax(1)
    return {
        "commitment": 0.8 * F.mse_loss(vectors, hard.detach()),
        "codebook": 0.6 * F.mse_loss(hard, vectors.detach()),
        "index": 0.7 * F.mse_loss(soft_codes, vectors),
        "entropy": 0.5 * (torch.special.entr(sharp).sum(1).mean() - torch.special.entr(sharp.mean(0)).sum()),
    }


WEIGHTS = {"commitment_weight": 0.8, "codebook_weight": 0.6, "index_weight": 0.7, "entropy_weight": 0.5}


@pytest.mark.parametrize("term", ["commitment", "codebook", "index", "entropy"])
def test_each_loss_of_ibq_has_the_value_and_the_gradients_of_its_formula(term):
    quantizer = make(IndexBackpropagationQuantizer, entropy_temperature=0.5, **WEIGHTS)
    latents = latents_of(1).requires_grad_()
    reached = [latents, quantizer.codes.weight]
    losses = quantizer(latents).losses
    expected = ibq_terms(quantizer, latents, quantizer.codes.weight)
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses[term], expected[term])
    found = torch.autograd.grad(losses[term], reached, allow_unused=True)
    assert [each is not None for each in found] == [term != "codebook", term != "commitment"]
    torch.testing.assert_close(found, torch.autograd.grad(expected[term], reached, allow_unused=True))


def test_the_entropy_penalty_has_finite_gradients_where_codes_have_no_probability_at_all():
    quantizer, latents = make(IndexBackpropagationQuantizer, codebook_size=256), 5 * latents_of(1)
    sharp = ((flat(latents) @ quantizer.codebook.T) / 0.01).softmax(1)
    assert (sharp.mean(0) == 0).any()
    quantizer(latents).losses["entropy"].backward()
    assert quantizer.codes.weight.grad.isfinite().all()


def test_every_code_of_ibq_learns_from_a_batch_that_chooses_few():
    quantizer = make(IndexBackpropagationQuantizer, codebook_size=64)
    output = quantizer(latents_of(1, 1, DIM, 2, 2))
    output.quantized.square().sum().backward()
    assert len(output.indices.unique()) <= 4
    assert (quantizer.codes.weight.grad.abs().sum(1) > 0).all()


def test_ibq_takes_the_code_of_the_largest_product():
    quantizer, latents = make(IndexBackpropagationQuantizer).eval(), latents_of(1)
    assert torch.equal(quantizer(latents).indices.flatten(), (flat(latents) @ quantizer.codebook.T).argmax(1))


def test_without_a_weight_the_entropy_is_not_computed():
    assert "entropy" not in make(IndexBackpropagationQuantizer, entropy_weight=0.0)(latents_of(1)).losses


# All


@pytest.mark.parametrize("choice", [SoftmaxVectorQuantizer, GumbelVectorQuantizer, IndexBackpropagationQuantizer])
def test_eval_mode_is_deterministic_and_leaves_the_generator_alone(choice):
    quantizer, state = make(choice).eval(), copy.deepcopy(torch.get_rng_state())
    assert torch.equal(quantizer(latents_of(1)).indices, quantizer(latents_of(1)).indices)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("choice", "given_value", "message"),
    [
        (SoftmaxVectorQuantizer, {"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        (GumbelVectorQuantizer, {"end_temperature": 0.0}, "end_temperature=0.0 must be greater than 0"),
        (GumbelVectorQuantizer, {"kl_weight": -1.0}, "kl_weight=-1.0 must not be negative"),
        (IndexBackpropagationQuantizer, {"entropy_temperature": -1.0}, "entropy_temperature=-1.0 must be greater"),
        (IndexBackpropagationQuantizer, {"index_weight": -1.0}, "index_weight=-1.0 must not be negative"),
    ],
)
def test_impossible_hyperparameters_are_named(choice, given_value, message):
    with pytest.raises(ValueError, match=message):
        choice(DIM, **given_value)
