"""Codes that are placed among the latents and revived, whatever moves them otherwise."""

import pytest
import torch
from latents import DIM, latents_of, trained
from torch.utils.checkpoint import checkpoint

from tokenizer import QUANTIZERS
from tokenizer.quantizers.placement import PlacedQuantizer

PLACED = sorted(name for name, choice in QUANTIZERS.items() if issubclass(choice, PlacedQuantizer))
BUFFERS = {"ema_vq": {"ema_sum"}}  # beside those of all


@pytest.fixture(params=PLACED)
def make(request):
    def quantizer(**hyperparameters) -> PlacedQuantizer:
        torch.manual_seed(0)
        return QUANTIZERS[request.param](DIM, **({"codebook_size": 16} | hyperparameters)).train()

    quantizer.name = request.param
    return quantizer


def test_the_learned_codebooks_are_placed_too():
    assert {"ema_vq", "vq", "softmax_vq"} <= set(PLACED)


def test_the_first_step_places_the_codes_among_the_data(make):
    quantizer = make(codebook_size=64)
    centres = 10 * latents_of(0, 8, DIM)
    latents = (centres.repeat(64, 1) + 0.01 * latents_of(1, 512, DIM)).T.reshape(1, DIM, 16, 32)
    quantizer(latents)
    quantizer.step()
    distances = torch.cdist(quantizer.codebook, centres)
    assert distances.min(1).values.max() < 0.1  # every code near a cluster
    assert distances.min(0).values.max() < 0.1  # every cluster has a code


def test_until_the_codes_are_placed_training_passes_the_latents_on(make):
    quantizer = make(placement=0.5)
    latents = latents_of(0, 4, DIM, 8, 8)
    for progress in (0.0, 0.25):
        given = latents.clone().requires_grad_()
        output = quantizer.train()(given)
        assert torch.equal(output.quantized, latents)
        assert all(loss == 0 for loss in output.losses.values())
        (output.quantized.sum() + sum(output.losses.values())).backward()
        assert torch.equal(given.grad, torch.ones_like(latents))
        # Nought, not None: DistributedDataParallel waits for the gradient of every parameter.
        assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in quantizer.parameters())
        assert not quantizer.step(progress)
        assert not torch.equal(quantizer.eval()(latents).quantized, latents)
    quantizer.train()(latents)
    assert quantizer.step(0.5)  # the codes jumped
    output = quantizer(latents)
    assert torch.equal(output.quantized, quantizer.indices_to_codes(output.indices))
    assert not quantizer.step(0.75)


def test_a_code_that_nothing_chooses_is_moved_onto_the_data(make):
    quantizer = trained(make())
    with torch.no_grad():
        quantizer.put(torch.full((1, DIM), 1e3), torch.tensor([3]))
    assert quantizer.codebook.norm(dim=1).max() > 100
    quantizer.ema_count[3] = 0.0
    quantizer(latents_of(9, 4, DIM, 8, 8))
    quantizer.step()
    candidates = latents_of(9, 4, DIM, 8, 8).movedim(1, -1).flatten(0, -2)
    assert torch.cdist(quantizer.codebook[3:4], candidates).min() < 1e-3
    torch.testing.assert_close(quantizer.ema_count[3], quantizer.ema_count.mean(), rtol=0.1, atol=0.0)


def test_codes_in_use_are_never_put_elsewhere(make):
    quantizer = trained(make(revival_threshold=0.0))
    moved = []
    quantizer.put = lambda codes, which: moved.extend(which.tolist())
    quantizer(latents_of(9, 1, DIM, 1, 1))
    quantizer.step()
    assert moved == []


def test_normalized_codes_and_outputs_lie_on_the_unit_sphere_and_are_the_nearest_by_cosine(make):
    quantizer, latents = trained(make(normalize=True)), latents_of(1)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))
    output = quantizer.eval()(latents)
    torch.testing.assert_close(output.quantized.norm(dim=1), torch.ones(2, 3, 5))
    cosines = torch.einsum("bdhw,kd->bhwk", latents / latents.norm(dim=1, keepdim=True), quantizer.codebook)
    assert torch.equal(output.indices, cosines.argmax(-1))


def test_accumulated_batches_count_as_one_batch(make):
    one, two = trained(make(revival_threshold=0.0)), trained(make(revival_threshold=0.0))
    latents = latents_of(5, 4, DIM, 4, 4)
    one(latents)
    for half in latents.split(2):
        two(half)
    one.step(), two.step()
    torch.testing.assert_close(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_does_not_count_a_batch_twice(make, use_reentrant):
    plain, checkpointed = trained(make()), trained(make())
    latents = latents_of(5, 4, DIM, 4, 4).requires_grad_()
    plain(latents).quantized.sum().backward()
    checkpoint(lambda x: checkpointed(x).quantized, latents, use_reentrant=use_reentrant).square().sum().backward()
    assert len(plain.pending.sums) == len(checkpointed.pending.sums) >= 1
    for one, other in zip(plain.pending.sums, checkpointed.pending.sums, strict=True):
        assert torch.equal(one, other)


def test_whether_codes_are_placed_is_asked_anew_of_a_state_that_is_loaded(make):
    quantizer, fresh = trained(make()), make()
    assert quantizer.placed
    quantizer.load_state_dict(fresh.state_dict())
    assert not quantizer.placed
    fresh.load_state_dict(trained(make()).state_dict())
    assert fresh.placed


def test_pending_statistics_are_no_buffers(make):
    quantizer = make()
    names = set(dict(quantizer.named_buffers()))
    quantizer(latents_of(1))
    assert quantizer.pending is not None
    expected = {"num_steps", "ema_count"} | BUFFERS.get(make.name, set())
    assert set(dict(quantizer.named_buffers())) == names == expected


@pytest.mark.parametrize(
    ("given_value", "message"),
    [
        ({"codebook_size": 1}, "codebook_size=1 must be at least 2"),
        ({"commitment_weight": -1.0}, "commitment_weight=-1.0 must not be negative"),
        ({"placement": -0.1}, "share of the run"),
        ({"revival_threshold": 1.5}, "share of the mean count"),
    ],
)
def test_impossible_hyperparameters_are_named(make, given_value, message):
    with pytest.raises(ValueError, match=message):
        make(**given_value)
