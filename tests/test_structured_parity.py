"""Residual and grouped quantization beside vector-quantize-pytorch, on the same codes and latents.

Its defaults differ in three points, which the tests set alike or state: stages pass the gradient by the rotation trick;
each passes the whole of it, so that straight-through stages pass it `depth` times (here each passes its share); losses
are a list, a number a stage (here their sum over stages, their mean over groups). It is given sequences: of maps
(B, D, h, w), its `accept_image_fmap`, version 1.32 makes residuals that do not fit one another.
"""

import pytest
import torch
from test_quantizers import DIM, latents_of
from test_residual import placed
from vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ

from tokenizer.quantizers import GroupedQuantizer, ResidualQuantizer

DEPTH, SIZE = 3, 16
EACH = {"name": "ema_vq", "codebook_size": SIZE}
ALIKE = {
    "num_quantizers": DEPTH,
    "codebook_size": SIZE,
    "rotation_trick": False,
    "commitment_weight": 0.25,
    "threshold_ema_dead_code": 0,
}


def sequence(latents: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) to (B, h * w, D)."""
    return latents.flatten(2).mT


def with_codes_of(reference: ResidualVQ, quantizer: ResidualQuantizer) -> ResidualVQ:
    for layer, stage in zip(reference.layers, quantizer.stages, strict=True):
        layer._codebook.embed.data.copy_(stage.codebook[None])
        layer._codebook.initted.data.fill_(True)
    return reference


@pytest.fixture(params=[False, True], ids=["separate", "shared"])
def pair(request) -> tuple[ResidualQuantizer, ResidualVQ]:
    torch.manual_seed(0)
    quantizer = placed(ResidualQuantizer(DIM, EACH, depth=DEPTH, shared=request.param))
    reference = ResidualVQ(dim=DIM, shared_codebook=request.param, quantize_dropout=True, **ALIKE)
    return quantizer.eval(), with_codes_of(reference, quantizer).eval()


def test_indices_and_codes_are_the_same_in_eval_mode(pair):
    quantizer, reference = pair
    output, (codes, indices, _) = quantizer(latents_of(9)), reference(sequence(latents_of(9)))
    assert torch.equal(output.indices.flatten(1, 2), indices)
    torch.testing.assert_close(sequence(output.quantized), codes)


def test_the_first_stages_decode_alike(pair):
    quantizer, reference = pair
    indices = quantizer(latents_of(9)).indices
    for count in range(1, DEPTH + 1):
        expected = reference.get_output_from_indices(indices[..., :count].flatten(1, 2))
        torch.testing.assert_close(sequence(quantizer.indices_to_codes(indices[..., :count])), expected)


def gradients(quantized: torch.Tensor, commitment: torch.Tensor, latents: torch.Tensor) -> list[torch.Tensor]:
    """Of a fixed weighting of the sequences (B, n, D), and of the commitment."""
    passed = (quantized * sequence(latents_of(3))).sum()
    return [torch.autograd.grad(each, latents, retain_graph=True)[0] for each in (passed, commitment)]


def test_gradients_are_the_same_but_for_the_number_of_stages(pair):
    quantizer, reference = (each.train() for each in pair)
    reference.quantize_dropout = False
    ours, theirs = latents_of(9).requires_grad_(), latents_of(9).requires_grad_()
    output, (codes, _, losses) = quantizer(ours), reference(sequence(theirs), freeze_codebook=True)
    torch.testing.assert_close(output.losses["commitment"], losses.sum())
    passed, commitment = gradients(sequence(output.quantized), output.losses["commitment"], ours)
    their_passed, their_commitment = gradients(codes, losses.sum(), theirs)
    torch.testing.assert_close(DEPTH * passed, their_passed)
    torch.testing.assert_close(commitment, their_commitment)


def test_grouped_residual_codes_indices_and_gradients_are_the_same():
    torch.manual_seed(0)
    each = {"name": "residual", "depth": DEPTH, "each": EACH}
    quantizer = placed(GroupedQuantizer(DIM, each, groups=2)).train()
    reference = GroupedResidualVQ(dim=DIM, groups=2, **ALIKE).train()
    for theirs, ours in zip(reference.rvqs, quantizer.parts, strict=True):
        with_codes_of(theirs, ours)
    ours, theirs = latents_of(9).requires_grad_(), latents_of(9).requires_grad_()
    output, (codes, indices, losses) = quantizer(ours), reference(sequence(theirs), freeze_codebook=True)
    assert torch.equal(output.indices.flatten(1, 2), torch.cat([*indices], dim=-1))
    torch.testing.assert_close(sequence(output.quantized), codes)
    torch.testing.assert_close(output.losses["commitment"], losses.sum() / 2)
    passed, commitment = gradients(sequence(output.quantized), output.losses["commitment"], ours)
    their_passed, their_commitment = gradients(codes, losses.sum() / 2, theirs)
    torch.testing.assert_close(DEPTH * passed, their_passed)
    torch.testing.assert_close(commitment, their_commitment)
