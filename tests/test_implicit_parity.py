"""fsq, lfq and bsq beside those of vector-quantize-pytorch on the same latents: codes, indices, losses, gradients.

Where the two differ, and what the tests do about it:
- FSQ there stretches tanh by 1 + 1e-3; ours and the paper's do not, so rounding differs next to a border of two levels
  (borders are left out here), slopes by that factor, and above 1000 levels theirs leaves its range.
- LFQ there counts channel 0 as the most significant bit, ours as the least: indices are equal once the channels of the
  one are reversed.
- BSQ there is LFQ with spherical=True. Commitment weighs 0 there unless given, 0.25 here.
- Probabilities below 1e-5 count as 1e-5 inside the logarithm there; the temperatures here keep clear of that.
"""

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import FSQ, LFQ

from tokenizer.quantizers import BinarySphericalQuantizer, FiniteScalarQuantizer, LookupFreeQuantizer

DIM = 5
INVERSE_TEMPERATURE = {"lfq": 0.2, "bsq": 1.0}
SIGNS = {"lfq": LookupFreeQuantizer, "bsq": BinarySphericalQuantizer}


def latents_of(seed: int, dim: int) -> Tensor:
    return torch.randn(4, dim, 6, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [7, 4, 3], [5] * 6])
def test_fsq_gives_the_same_codes_and_indices_away_from_borders_and_the_same_gradients(levels):
    ours, theirs = FiniteScalarQuantizer(len(levels), levels), FSQ(levels)
    latents = latents_of(0, len(levels))
    bounded = ours.bound(latents)
    on_border = ((bounded - bounded.floor() - 0.5).abs() < 5e-3).any(1)  # (B, h, w)
    assert on_border.float().mean() < 0.1
    one, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    output = ours(one)
    codes, indices = theirs(other)
    assert torch.equal(output.indices[~on_border], indices[~on_border].long())
    inside = ~on_border[:, None].expand_as(codes)
    torch.testing.assert_close(output.quantized[inside], codes[inside])
    direction = latents_of(1, len(levels))
    (output.quantized * direction).sum().backward(), (codes * direction).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-3)
    every = torch.arange(ours.vocab_size).view(1, 1, -1)
    torch.testing.assert_close(ours.indices_to_codes(every), theirs.indices_to_codes(every))


def pair(name: str, **weights: float) -> tuple[LookupFreeQuantizer, LFQ]:
    """Ours and theirs in training mode."""
    entropy, gamma, commitment = (weights.get(key, 0.0) for key in ("entropy", "gamma", "commitment"))
    ours = SIGNS[name](
        DIM,
        entropy_weight=entropy,
        diversity=gamma,
        commitment_weight=commitment,
        inverse_temperature=INVERSE_TEMPERATURE[name],
    )
    theirs = LFQ(
        dim=DIM,
        codebook_size=2**DIM,
        entropy_loss_weight=entropy,
        diversity_gamma=gamma,
        commitment_loss_weight=commitment,
        spherical=name == "bsq",
    )
    return ours.train(), theirs.train()


@pytest.mark.parametrize("name", SIGNS)
def test_signs_have_the_same_codes_and_gradients_and_the_same_indices_of_reversed_channels(name):
    ours, theirs = pair(name)
    latents, direction = latents_of(2, DIM), latents_of(3, DIM)
    one, other = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    output, result = ours(one), theirs(other)
    torch.testing.assert_close(output.quantized, result.quantized)
    assert torch.equal(output.indices, theirs(latents.flip(1)).indices.long())
    (output.quantized * direction).sum().backward(), (result.quantized * direction).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize(
    "weights",
    [{"entropy": 1.0}, {"entropy": 0.1, "gamma": 1.0}, {"entropy": 0.3, "gamma": 2.5}, {"commitment": 0.25}],
    ids=lambda weights: "-".join(weights),
)
def test_signs_have_the_same_losses_and_gradients(name, weights):
    ours, theirs = pair(name, **weights)
    one, other = latents_of(4, DIM).requires_grad_(), latents_of(4, DIM).requires_grad_()
    loss = sum(ours(one).losses.values())
    expected = theirs(other, inv_temperature=INVERSE_TEMPERATURE[name]).entropy_aux_loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward(), expected.backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)
