"""Codes, indices, losses and gradients equal those of vector-quantize-pytorch on the same weights and inputs.

Differences of its defaults, which the tests set aside:
- VectorQuantize: decay 0.8 from the first step (ours rises to 0.99), rotation trick on (ours straight-through),
  commitment weight 1 (ours 0.25), codes drawn at random unless kmeans_init (ours placed by k-means during training),
  no revival unless threshold_ema_dead_code (ours on), and the codebook moves in the forward pass (ours in `step`).
- learnable_codebook: one loss whose two gradients share a weight, and no cosine distance with it; ours are two losses.
- SimVQ: rotation trick on; its output is then the latents rotated, near the code, where ours is the code itself.
Its Gumbel sampling has no like here: its softmax is over distances that are not squared, and leaves the noise out.
"""

import pytest
import torch
from latents import DIM, latents_of
from torch import Tensor
from vector_quantize_pytorch import SimVQ as TheirSimVQ
from vector_quantize_pytorch import VectorQuantize

from tokenizer.quantizers.ema_vq import EMAVectorQuantizer
from tokenizer.quantizers.simvq import SimVQ
from tokenizer.quantizers.vq import VectorQuantizer

SIZE = 16
LATE = 10_000  # steps after which our decay has risen to its value
GRADIENTS = pytest.mark.parametrize("gradient", ["straight_through", "rotation"])


def theirs(gradient: str, **options) -> VectorQuantize:
    """Trained on pictures (B, D, h, w), like ours."""
    rotation = gradient == "rotation"
    torch.manual_seed(0)
    return VectorQuantize(DIM, SIZE, accept_image_fmap=True, rotation_trick=rotation, **options).train()


def gradients(quantized: Tensor, loss: Tensor, *reached: Tensor) -> tuple[Tensor, ...]:
    """Of the loss and of something made of the quantized latents."""
    direction = latents_of(77, *quantized.shape)
    return torch.autograd.grad((quantized * direction).sum() + loss, reached)


@GRADIENTS
@pytest.mark.parametrize("normalize", [False, True])
def test_the_ema_codebook_equals_theirs_over_several_steps(gradient, normalize):
    their = theirs(gradient, decay=0.9, use_cosine_sim=normalize, commitment_weight=0.25)
    ours = EMAVectorQuantizer(DIM, SIZE, decay=0.9, normalize=normalize, revival_threshold=0.0, gradient=gradient)
    ours.num_steps.fill_(LATE)
    ours.ema_sum.copy_(their._codebook.embed_avg[0])
    torch.testing.assert_close(ours.codebook, their.codebook)
    for seed in range(5):
        latents = latents_of(seed, 4, DIM, 8, 8).requires_grad_()
        output, (quantized, indices, loss) = ours(latents), their(latents)
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.losses["commitment"], loss.squeeze())
        found = gradients(output.quantized, output.losses["commitment"], latents)
        torch.testing.assert_close(found, gradients(quantized, loss.squeeze(), latents), rtol=1e-4, atol=1e-5)
        ours.step()
        torch.testing.assert_close(ours.codebook, their.codebook)
        torch.testing.assert_close(ours.ema_count, their._codebook.cluster_size[0])


@GRADIENTS
def test_the_learned_codebook_equals_theirs_over_several_steps(gradient):
    their = theirs(gradient, learnable_codebook=True, ema_update=False, commitment_weight=0.4)
    ours = VectorQuantizer(
        DIM, SIZE, codebook_weight=0.4, commitment_weight=0.4, revival_threshold=0.0, gradient=gradient
    )
    ours.num_steps.fill_(LATE)
    with torch.no_grad():
        ours.codes.weight.copy_(their.codebook)
    codes, their_codes = ours.codes.weight, their._codebook.embed
    optimizers = [torch.optim.Adam([each], lr=0.01) for each in (codes, their_codes)]
    for seed in range(5):
        latents = latents_of(seed, 4, DIM, 8, 8).requires_grad_()
        output, (quantized, indices, loss) = ours(latents), their(latents)
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
        for term in output.losses.values():
            torch.testing.assert_close(term, loss.squeeze())
        by_latents, by_codes = gradients(output.quantized, sum(output.losses.values()), latents, codes)
        their_by_latents, their_by_codes = gradients(quantized, loss.squeeze(), latents, their_codes)
        torch.testing.assert_close(by_latents, their_by_latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(by_codes, their_by_codes[0])
        codes.grad, their_codes.grad = by_codes, their_by_codes
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(codes, their_codes[0])


@GRADIENTS
def test_simvq_equals_theirs_with_their_default_weights(gradient):
    torch.manual_seed(0)
    their = TheirSimVQ(DIM, SIZE, channel_first=True, rotation_trick=gradient == "rotation")
    ours = SimVQ(DIM, SIZE, gradient=gradient)
    ours.frozen_codes.copy_(their.frozen_codebook)
    ours.map.load_state_dict(their.code_transform.state_dict())
    torch.testing.assert_close(ours.codebook, their.codebook)
    for seed in range(3):
        latents = latents_of(seed, 4, DIM, 8, 8).requires_grad_()
        output, (quantized, indices, loss) = ours(latents), their(latents)
        assert torch.equal(output.indices, indices)
        torch.testing.assert_close(output.quantized, quantized, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sum(output.losses.values()), loss)
        found = gradients(output.quantized, sum(output.losses.values()), latents, ours.map.weight)
        expected = gradients(quantized, loss, latents, their.code_transform.weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_simvq_starts_from_codes_and_a_map_of_their_scale():
    torch.manual_seed(0)
    their, ours = TheirSimVQ(8, 4096), SimVQ(8, 4096)
    torch.testing.assert_close(ours.frozen_codes.std(), their.frozen_codebook.std(), rtol=0.02, atol=0.0)
    torch.testing.assert_close(ours.map.weight.std(), their.code_transform.weight.std(), rtol=0.3, atol=0.0)
