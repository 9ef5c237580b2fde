"""The contract of every quantizer in the table."""

import copy

import pytest
import torch
from conftest import tiny_config
from latents import DIM, latents_of, trained
from soft_reference import GRADIENTS_OF_SOFTMAX

from tokenizer import QUANTIZERS, ImageTokenizer


def between_levels(quantizer, latents):
    """The networks of a hierarchy, which are linear until they are trained: no gradient depends on the codes."""
    top = quantizer.from_top(quantizer.to_top(latents), latents.shape[2:])
    return quantizer.merge(torch.cat([quantizer.to_bottom(torch.cat([latents, top], 1)), top], 1))


BEFORE_ROUNDING = {
    "fsq": lambda quantizer, latents: quantizer.bound(latents) / 2,  # 4 levels in [-2, 1], their codes in [-1, 0.5]
    "bsq": lambda quantizer, latents: latents / latents.norm(dim=1, keepdim=True),
    "hierarchical": between_levels,
}


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request):
    torch.manual_seed(0)
    return QUANTIZERS[request.param](DIM)


def index_shape(quantizer, height: int, width: int) -> tuple[int, ...]:
    """The shape of the indices of one picture."""
    if quantizer.multiscale:
        return (sum(rows * columns for rows, columns in quantizer.grids(height, width)),)
    return (height, width) if quantizer.num_codebooks == 1 else (height, width, quantizer.num_codebooks)


# The contract, over every member of the table.


def test_indices_decode_to_the_same_codes(quantizer):
    output = trained(quantizer).eval()(latents_of(9))
    where = {"grid_size": (3, 5)} if quantizer.multiscale else {}
    assert torch.equal(quantizer.indices_to_codes(output.indices, **where), output.quantized)


def test_shapes_types_and_range_are_those_of_the_contract(quantizer):
    output = quantizer(latents_of(1).to(torch.bfloat16))
    assert output.quantized.shape == (2, DIM, 3, 5)
    assert output.quantized.dtype == torch.float32
    assert output.indices.shape == (2, *index_shape(quantizer, 3, 5))
    assert output.indices.dtype == torch.int64
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.vocab_size
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 for loss in output.losses.values())


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_the_gradient_by_the_latents_is_a_copied_one_or_that_of_the_formula_written_out(name):
    """Copied from the codes to what is rounded, or where there is a softmax the gradient of that."""
    torch.manual_seed(0)
    quantizer, latents, direction = trained(QUANTIZERS[name](DIM)), latents_of(1).requires_grad_(), latents_of(2)
    expected = direction
    torch.manual_seed(3)
    if name in GRADIENTS_OF_SOFTMAX:
        expected = GRADIENTS_OF_SOFTMAX[name](quantizer, latents, direction)
        assert not torch.allclose(expected, direction)
    elif name in BEFORE_ROUNDING:
        (expected,) = torch.autograd.grad((BEFORE_ROUNDING[name](quantizer, latents) * direction).sum(), latents)
    torch.manual_seed(3)
    (quantizer.train()(latents).quantized * direction).sum().backward()
    torch.testing.assert_close(latents.grad, expected)


def test_indices_and_codes_do_not_depend_on_autocast(quantizer):
    latents, where = latents_of(1), {"grid_size": (3, 5)} if quantizer.multiscale else {}
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(latents)
        codes = quantizer.indices_to_codes(inside.indices, **where)
    torch.manual_seed(3)
    outside = quantizer(latents)
    assert torch.equal(inside.indices, outside.indices)
    assert torch.equal(codes, quantizer.indices_to_codes(outside.indices, **where))


def test_eval_mode_moves_nothing(quantizer):
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(latents_of(1))
    quantizer.step()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_a_discarded_step_leaves_no_trace(quantizer):
    quantizer.train()
    other = copy.deepcopy(trained(quantizer))
    quantizer(torch.full((2, DIM, 3, 5), torch.nan))
    quantizer.discard()
    for each in (quantizer, other):
        each(latents_of(7))
        each.step()
    assert all(torch.equal(other.state_dict()[name], value) for name, value in quantizer.state_dict().items())


def test_codes_that_are_placed_by_a_step_jump_in_it_and_never_again(quantizer):
    for seed in range(3):
        before = quantizer.placed
        quantizer.train()(latents_of(seed, 4, DIM, 8, 8))
        assert quantizer.step() == (not before)
        assert quantizer.placed


def test_latents_that_are_not_numbers_have_indices_in_range_and_show_in_every_code_or_every_loss(quantizer):
    output = trained(quantizer).train()(torch.full((2, DIM, 3, 5), torch.nan))
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.vocab_size
    losses = [loss.isfinite() for loss in output.losses.values()]
    assert not output.quantized.isfinite().any() or (losses and not any(losses))


def test_a_saved_tokenizer_gives_the_same_tokens_codes_and_pictures(quantizer, request, tmp_path):
    name = request.node.callspec.params["quantizer"]
    saved = ImageTokenizer(tiny_config(codebook_dim=DIM, quantizer={"name": name})).eval()
    saved.save_pretrained(tmp_path)
    loaded, images = ImageTokenizer.from_pretrained(tmp_path), torch.rand(2, 3, 8, 8)
    tokens = saved.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), saved.decode(tokens))
    assert torch.equal(loaded(images).reconstructions.clamp(0, 1), saved.decode(tokens))


def test_every_hyperparameter_has_a_default_and_bad_ones_are_refused(quantizer):
    type(quantizer)(DIM)
    with pytest.raises(ValueError, match="codebook_dim=0 must be at least 1"):
        type(quantizer)(0)


def test_in_eval_mode_it_compiles_into_one_graph(quantizer):
    quantizer, latents = trained(quantizer).eval(), latents_of(1)
    expected, found = quantizer(latents), torch.compile(quantizer, fullgraph=True, backend="eager")(latents)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.quantized, expected.quantized)
