"""Residual and grouped quantization beside vector-quantize-pytorch, on the same codes and latents.

Its defaults differ in three points, which the tests set alike or state: stages pass the gradient by the rotation trick;
each passes the whole of it, so that straight-through stages pass it `depth` times (here each passes its share); losses
are a list, a number a stage (here their sum over stages, their mean over groups). It is given sequences: of maps
(B, D, h, w), its `accept_image_fmap`, version 1.32 makes residuals that do not fit one another.

ResidualFSQ differs in more: it bounds the latents once, softly and then hard, where here every stage has the tanh of
its fsq; its levels are spread evenly over [-1, 1], as here those of an odd number are; a stage's codes are as many
times finer as each component has levels, here as the component with the fewest has. So with odd levels of one number
the codes of indices agree, and the indices of the first stage of latents that were bounded alike.
"""

import pytest
import torch
from test_quantizers import DIM, latents_of
from test_residual import placed
from vector_quantize_pytorch import GroupedResidualVQ, ResidualFSQ, ResidualLFQ, ResidualSimVQ, ResidualVQ

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


# Codes that never move: finer from stage to stage.


def residual_of_signs(shared: bool) -> tuple[ResidualQuantizer, ResidualLFQ]:
    each = {"name": "lfq", "entropy_weight": 0.0}
    theirs = ResidualLFQ(
        dim=DIM, codebook_size=2**DIM, num_quantizers=DEPTH, entropy_loss_weight=0.0, commitment_loss_weight=0.25
    )
    return ResidualQuantizer(DIM, each, depth=DEPTH, shared=shared).train(), theirs.train()


@pytest.mark.parametrize("shared", [False, True])
def test_residual_signs_have_the_same_codes_losses_and_gradients_and_the_same_indices_of_reversed_channels(shared):
    quantizer, reference = residual_of_signs(shared)
    ours, theirs = latents_of(9).requires_grad_(), latents_of(9).requires_grad_()
    output, (codes, _, losses) = quantizer(ours), reference(sequence(theirs))
    torch.testing.assert_close(sequence(output.quantized), codes)
    torch.testing.assert_close(output.losses["commitment"], losses.sum())
    assert torch.equal(output.indices.flatten(1, 2), reference(sequence(theirs.flip(1)))[1].long())
    passed, commitment = gradients(sequence(output.quantized), output.losses["commitment"], ours)
    their_passed, their_commitment = gradients(codes, losses.sum(), theirs)
    torch.testing.assert_close(DEPTH * passed, their_passed)
    torch.testing.assert_close(commitment, their_commitment)


@pytest.mark.parametrize("levels", [3, 5, 7])
def test_residual_fsq_decodes_odd_levels_alike_whatever_the_number_of_stages(levels):
    quantizer = ResidualQuantizer(DIM, {"name": "fsq", "levels": levels}, depth=DEPTH)
    reference = ResidualFSQ(levels=[levels] * DIM, num_quantizers=DEPTH, quantize_dropout=True)
    indices = torch.randint(levels**DIM, (2, 3, 5, DEPTH), generator=torch.Generator().manual_seed(0))
    for count in range(1, DEPTH + 1):
        expected = reference.get_output_from_indices(indices[..., :count].flatten(1, 2))
        torch.testing.assert_close(sequence(quantizer.indices_to_codes(indices[..., :count])), expected)


def test_residual_fsq_takes_the_same_first_stage_of_latents_bounded_alike():
    """Theirs bounds by c tanh(x / c), c = L / (L - 1), and clamps to 1; ours by tanh, which is made to say the same."""
    levels = 5
    quantizer = ResidualQuantizer(DIM, {"name": "fsq", "levels": levels}, depth=DEPTH)
    reference, bound = ResidualFSQ(levels=[levels] * DIM, num_quantizers=DEPTH), levels / (levels - 1)
    latents = latents_of(9)
    bounded = (bound * torch.tanh(latents / bound)).clamp(-0.999, 0.999)
    indices = quantizer(torch.atanh(bounded)).indices[..., 0].flatten(1)
    assert torch.equal(indices, reference(sequence(latents))[1][..., 0].long())


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_residual_simvq_is_the_same(gradient):
    torch.manual_seed(0)
    each = {"name": "simvq", "codebook_size": SIZE, "gradient": gradient}
    quantizer = ResidualQuantizer(DIM, each, depth=DEPTH).train()
    reference = ResidualSimVQ(
        dim=DIM, num_quantizers=DEPTH, codebook_size=SIZE, rotation_trick=gradient == "rotation"
    ).train()
    for layer, stage in zip(reference.layers, quantizer.stages, strict=True):
        layer.frozen_codebook.copy_(stage.frozen_codes)
        layer.code_transform.load_state_dict(stage.map.state_dict())
    ours, theirs = latents_of(9).requires_grad_(), latents_of(9).requires_grad_()
    output, (codes, indices, losses) = quantizer(ours), reference(sequence(theirs))
    assert torch.equal(output.indices.flatten(1, 2), indices)
    torch.testing.assert_close(sequence(output.quantized), codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(output.losses.values()), losses.sum())
    passed, pulled = gradients(sequence(output.quantized), sum(output.losses.values()), ours)
    their_passed, their_pulled = gradients(codes, losses.sum(), theirs)
    torch.testing.assert_close(DEPTH * passed, their_passed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pulled, their_pulled)
