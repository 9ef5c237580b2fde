"""The quantizers of signs, lfq and bsq: each loss against the dense formula over all codes, and their memory."""

import math

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor
from torch.nn import functional as F

from tokenizer.quantizers import BinarySphericalQuantizer, FiniteScalarQuantizer, LookupFreeQuantizer

DIM = 6
SIGNS = {"lfq": LookupFreeQuantizer, "bsq": BinarySphericalQuantizer}
TEMPERATE = {"lfq": 0.3, "bsq": 2.0}  # inverse temperatures at which no soft code is certain


def latents_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (2, DIM, 3, 5), generator=torch.Generator().manual_seed(seed))


def placed(name: str, latents: Tensor) -> Tensor:
    """Latents (B, D, h, w) as vectors (N, D) in float64, of unit length for bsq."""
    vectors = latents.movedim(1, -1).flatten(0, 2).double()
    return vectors if name == "lfq" else vectors / vectors.norm(dim=1, keepdim=True)


def codebook(quantizer) -> Tensor:
    """Every code (K, D) in float64, in the order of the indices."""
    return quantizer.indices_to_codes(torch.arange(quantizer.vocab_size).view(1, 1, -1))[0, :, 0].T.double()


def dense(name: str, quantizer, latents: Tensor) -> dict[str, Tensor]:
    """The losses by a softmax over the squared distances to every code."""
    vectors, codes = placed(name, latents), codebook(quantizer)
    distances = (vectors[:, None] - codes).square().sum(-1)  # (N, K)
    soft = torch.softmax(-quantizer.inverse_temperature * distances, dim=1)
    mean = soft.mean(0)
    weight = quantizer.entropy_weight
    return {
        "sample_entropy": weight * -(soft * soft.log()).sum(1).mean(),
        "batch_entropy": weight * quantizer.diversity * (mean * mean.log()).sum(),
        "commitment": quantizer.commitment_weight * (vectors - codes[distances.argmin(1)]).square().mean(),
    }


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("term", ["sample_entropy", "batch_entropy", "commitment"])
def test_value_and_gradient_of_each_loss_are_those_of_the_dense_formula(name, term):
    settings = {"entropy_weight": 0.2, "diversity": 1.5, "commitment_weight": 0.5}
    quantizer = SIGNS[name](DIM, inverse_temperature=TEMPERATE[name], **settings).train()
    ours, reference = latents_of(1).requires_grad_(), latents_of(1).requires_grad_()
    loss, expected = quantizer(ours).losses[term], dense(name, quantizer, reference)[term]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    loss.backward(), expected.backward()
    assert reference.grad.abs().max() > 1e-5
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SIGNS)
def test_the_index_is_that_of_the_nearest_code_and_channel_0_is_its_least_significant_bit(name):
    quantizer = SIGNS[name](DIM)
    output = quantizer(latents_of(2))
    nearest = torch.cdist(placed(name, latents_of(2)), codebook(quantizer)).argmin(1)
    assert torch.equal(output.indices.flatten(), nearest)
    signs = (latents_of(2) > 0).long()
    assert torch.equal(output.indices, sum(2**place * signs[:, place] for place in range(DIM)))


def test_codes_of_lfq_are_signs_and_codes_of_bsq_are_signs_of_unit_length():
    lfq, bsq = codebook(LookupFreeQuantizer(DIM)), codebook(BinarySphericalQuantizer(DIM))
    assert torch.equal(lfq.abs(), torch.ones_like(lfq))
    torch.testing.assert_close(bsq, lfq / math.sqrt(DIM))


def test_the_soft_code_of_bsq_is_that_of_the_paper_at_half_its_tau():
    quantizer, tau = BinarySphericalQuantizer(DIM, entropy_weight=1.0, inverse_temperature=1.5).train(), 3.0
    soft = torch.softmax(tau * placed("bsq", latents_of(3)) @ codebook(quantizer).T, dim=1)
    expected = -(soft * soft.log()).sum(1).mean()
    torch.testing.assert_close(quantizer(latents_of(3)).losses["sample_entropy"].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SIGNS)
def test_entropies_are_of_training_alone_and_groups_change_the_batch_entropy_alone(name):
    options = {"inverse_temperature": TEMPERATE[name]}
    whole, grouped = (SIGNS[name](DIM, bits_per_group=size, **options).train() for size in (DIM, 2))
    latents = latents_of(4)
    latents[:, 3] = latents[:, 0]  # two groups that depend on each other
    one, other = whole(latents).losses, grouped(latents).losses
    assert other["batch_entropy"] < one["batch_entropy"] - 1e-4
    assert all(torch.equal(one[term], other[term]) for term in ("sample_entropy", "commitment"))
    assert set(whole.eval()(latents).losses) == {"commitment"}


@pytest.mark.parametrize("name", SIGNS)
def test_lowering_both_entropy_losses_uses_every_code_and_makes_each_certain(name):
    quantizer = SIGNS[name](3, inverse_temperature=TEMPERATE[name], commitment_weight=0.0).train()
    latents = (latents_of(5, 1, 3, 8, 8) * 0.3 + 0.5).requires_grad_()
    before = quantizer(latents)
    optimizer = torch.optim.Adam([latents], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        sum(quantizer(latents).losses.values()).backward()
        optimizer.step()
    after = quantizer(latents)
    assert len(before.indices.unique()) < 8
    assert len(after.indices.unique()) == 8
    assert after.losses["sample_entropy"] < before.losses["sample_entropy"]


@pytest.mark.parametrize(
    "quantizer",
    [
        LookupFreeQuantizer(18),
        BinarySphericalQuantizer(18),
        FiniteScalarQuantizer(7, 8),
        LookupFreeQuantizer(36),
        BinarySphericalQuantizer(36),
        FiniteScalarQuantizer(18, 5),
    ],
    ids=lambda quantizer: f"{type(quantizer).__name__}-{quantizer.vocab_size}",
)
def test_2_to_the_18_codes_and_more_train_without_a_tensor_of_vectors_times_codes(quantizer):
    largest = {}
    dim = getattr(quantizer, "num_bits", None) or len(quantizer.levels)
    for num_vectors in (256, 1024):
        latents = latents_of(0, 1, dim, 1, num_vectors).requires_grad_()
        with LargestTensor() as watched:
            output = quantizer.train()(latents)
            (output.quantized.sum() + sum(output.losses.values())).backward()
        largest[num_vectors] = watched.numbers
        assert latents.grad.isfinite().all()
    assert quantizer.vocab_size >= 2**18
    for num_vectors, found in largest.items():  # the batch's probabilities once, and two factors of each vector's
        assert num_vectors <= found <= max(2**18, num_vectors * 2**9)


@pytest.mark.parametrize("name", SIGNS)
def test_62_bits_are_counted_and_decoded_without_overflow(name):
    quantizer = SIGNS[name](62)
    output = quantizer.eval()(torch.ones(1, 62, 1, 1))
    assert quantizer.vocab_size == 2**62
    assert output.indices.item() == 2**62 - 1
    assert torch.equal(quantizer.indices_to_codes(output.indices), output.quantized)


def test_the_default_weights_count_in_the_sum_as_stated():
    quantizer = LookupFreeQuantizer(DIM).train()
    losses, latents = quantizer(latents_of(6)).losses, latents_of(6)
    torch.testing.assert_close(losses["commitment"], 0.25 * F.mse_loss(latents, torch.where(latents > 0, 1.0, -1.0)))
    assert -0.1 * DIM * math.log(2) <= losses["batch_entropy"] < 0


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize(
    ("dim", "given_value", "message"),
    [
        (0, {}, "codebook_dim=0 must be at least 1"),
        (63, {}, "codebook_dim=63 is the number of bits of an index, an int64, and at most 62"),
        (DIM, {"entropy_weight": -0.1}, "entropy_weight=-0.1 must not be negative"),
        (DIM, {"diversity": -1.0}, "diversity=-1.0 must not be negative"),
        (DIM, {"commitment_weight": -1.0}, "commitment_weight=-1.0 must not be negative"),
        (DIM, {"inverse_temperature": 0.0}, "inverse_temperature=0.0 must be above 0"),
        (DIM, {"bits_per_group": 25}, r"bits_per_group=25 must lie in \[1, 24\]"),
    ],
)
def test_impossible_hyperparameters_are_named(name, dim, given_value, message):
    with pytest.raises(ValueError, match=message):
        SIGNS[name](dim, **given_value)
