"""The gradient estimators: the value is that of the codes, the gradient that of the plain formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.quantizers import EMAVectorQuantizer
from tokenizer.quantizers.gradients import GRADIENTS, rotation


def pair(seed: int, dim: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, codes = (torch.randn(2, dim, 3, 5, generator=generator) for _ in range(2))
    return latents.requires_grad_(), codes.requires_grad_()


@pytest.mark.parametrize("estimator", GRADIENTS.values(), ids=GRADIENTS)
def test_the_value_is_that_of_the_codes_to_the_bit_and_no_gradient_reaches_them(estimator):
    latents, codes = pair(0)
    quantized = estimator(latents, codes)
    assert torch.equal(quantized, codes)
    quantized.square().sum().backward()
    assert codes.grad is None
    assert latents.grad.abs().sum() > 0


def test_straight_through_copies_the_gradient():
    latents, codes = pair(0)
    direction = torch.randn(2, 4, 3, 5)
    (GRADIENTS["straight_through"](latents, codes) * direction).sum().backward()
    torch.testing.assert_close(latents.grad, direction)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), dim=st.integers(1, 9))
def test_the_rotation_equals_its_matrix_written_out_for_each_vector(seed, dim):
    latents, codes = pair(seed, dim)
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed + 1))
    (rotation(latents, codes) * direction).sum().backward()
    for b, y, x in [(0, 0, 0), (1, 2, 4), (0, 1, 3)]:
        latent, code, given_gradient = (each[b, :, y, x].detach().double() for each in (latents, codes, direction))
        before, after = latent / latent.norm(), code / code.norm()
        identity, between = torch.eye(dim, dtype=torch.float64), before + after
        matrix = identity + 2 * torch.outer(after, before)
        if between.norm() > 1e-6:
            between = between / between.norm()
            matrix = matrix - 2 * torch.outer(between, between)
        matrix = matrix * code.norm() / latent.norm()
        torch.testing.assert_close(matrix @ latent, code)  # it takes the latent to its code
        torch.testing.assert_close(latents.grad[b, :, y, x].double(), matrix.T @ given_gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.0, 1e-30])
def test_the_rotation_is_finite_for_latents_without_length_opposite_to_or_at_their_code(factor):
    codes = torch.randn(1, 4, 2, 2)
    latents = (factor * codes).requires_grad_()
    rotation(latents, codes).sum().backward()
    assert latents.grad.isfinite().all()


def test_a_quantizer_uses_the_estimator_that_it_is_given():
    gradients = {}
    for name in GRADIENTS:
        torch.manual_seed(0)
        quantizer = EMAVectorQuantizer(4, codebook_size=16, gradient=name).train()
        quantizer(torch.randn(4, 4, 8, 8))
        quantizer.step()
        latents = torch.randn(2, 4, 3, 5).requires_grad_()
        quantizer(latents).quantized.sum().backward()
        gradients[name] = latents.grad
    assert torch.equal(gradients["straight_through"], torch.ones(2, 4, 3, 5))
    assert not torch.allclose(gradients["rotation"], gradients["straight_through"])
