"""What is built of other quantizers, over every kind of part: the contract of tokens, files and training steps."""

from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from conftest import tiny_config
from latents import DIM, latents_of
from test_model import images_of
from torch.nn import functional as F

from tokenizer import ImageTokenizer, TokenizerConfig
from tokenizer.quantizers import ResidualQuantizer

PARTS = {
    "fsq": {"name": "fsq", "levels": 3},
    "lfq": {"name": "lfq"},
    "bsq": {"name": "bsq"},
    "simvq": {"name": "simvq", "codebook_size": 16},
    "vq": {"name": "vq", "codebook_size": 16},
}
STRUCTURES = {
    "residual": {"name": "residual", "depth": 3, "quantizer_dropout": 0.5},
    "shared residual": {"name": "residual", "depth": 3, "shared": True},
    "grouped": {"name": "grouped", "groups": 2},
    "grouped residual": {"name": "grouped", "groups": 2, "each": {"name": "residual", "depth": 2}},
    "multiscale": {"name": "multiscale", "scales": [1, 2, 4], "num_convolutions": 2},
    "hierarchical": {"name": "hierarchical", "width": 8},
}
MOVED = {"simvq": "map.weight", "vq": "codes.weight"}  # what the optimizer moves of a part; of the others nothing


def built_of(structure: str, part: str) -> dict:
    """The quantizer as a config names it, the part innermost."""
    outer, each = STRUCTURES[structure], PARTS[part]
    return outer | {"each": outer["each"] | {"each": each} if "each" in outer else each}


@pytest.fixture(scope="module", params=[(structure, part) for structure in STRUCTURES for part in PARTS], ids="-".join)
def trained(request) -> tuple[str, ImageTokenizer, dict[str, torch.Tensor]]:
    """The part, a tokenizer after two training steps, and the gradients of the second."""
    structure, part = request.param
    torch.manual_seed(0)
    model = ImageTokenizer(tiny_config(codebook_dim=DIM, quantizer=built_of(structure, part))).train()
    with torch.no_grad():
        for weight in model.parameters():  # blocks start at zero
            weight.add_(0.1 * torch.randn_like(weight))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in range(2):
        images = images_of(seed)
        output = model(images)
        optimizer.zero_grad()
        (F.mse_loss(output.reconstructions, images) + sum(output.losses.values())).backward()
        optimizer.step()
        model.quantizer.step()
    return part, model.eval(), {name: weight.grad for name, weight in model.named_parameters()}


def test_a_training_step_reaches_every_weight_and_the_codes_that_learn(trained):
    part, model, gradients = trained
    assert model.quantizer.placed is True
    idle = [name for name, gradient in gradients.items() if gradient is None or not gradient.abs().sum() > 0]
    assert not idle
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    codes = [name for name in gradients if name.endswith(MOVED.get(part, "of no part"))]
    assert bool(codes) == (part in MOVED)


def test_any_size_goes_to_its_tokens_and_back_to_the_bit(trained):
    _, model, _ = trained
    for height, width in [(12, 20), (2, 2), (6, 4)]:
        images = images_of(5, 2, 3, height, width)
        tokens, output = model.encode(images), model(images)
        assert tokens.shape == (2, *model.token_shape((height, width)))
        assert 0 <= tokens.min() <= tokens.max() < model.vocab_size
        assert torch.equal(tokens, output.tokens)
        assert torch.equal(model.decode(tokens, (height, width)), output.reconstructions.clamp(0, 1))
        assert torch.equal(model.encode(images[1:]), tokens[1:])
        numbers = model.quantizer.code_numbers(tokens, model.grid_size((height, width)))
        assert 0 <= numbers.min() <= numbers.max() < model.quantizer.num_codes


def test_a_saved_model_gives_the_same_tokens_and_pictures(trained, tmp_path):
    _, model, _ = trained
    model.save_pretrained(tmp_path)
    loaded, tokens = ImageTokenizer.from_pretrained(tmp_path), model.encode(images_of(5))
    assert (loaded.config, loaded.fingerprint) == (model.config, model.fingerprint)
    assert torch.equal(loaded.encode(images_of(5)), tokens)
    assert torch.equal(loaded.decode(tokens, (12, 20)), model.decode(tokens, (12, 20)))


# Codes that never move, in stages one after another.


FIXED = pytest.mark.parametrize("part", [part for part in PARTS if part not in MOVED])


@FIXED
@pytest.mark.parametrize("shared", [False, True])
def test_each_stage_of_fixed_codes_brings_the_sum_nearer_to_latents_that_lie_among_them(part, shared):
    quantizer = ResidualQuantizer(DIM, PARTS[part], depth=4, shared=shared).eval()
    latents = 0.5 * latents_of(9, 8, DIM, 8, 8)
    indices = quantizer(latents).indices
    errors = [(quantizer.indices_to_codes(indices[..., :kept]) - latents).square().mean() for kept in range(1, 5)]
    assert all(after < 0.95 * before for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.2 * errors[0]


@FIXED
def test_no_two_stages_of_fixed_codes_say_the_same_twice(part):
    quantizer = ResidualQuantizer(DIM, PARTS[part], depth=2)
    size = quantizer.vocab_size
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size)).view(1, size, size, 2)
    codes = quantizer.indices_to_codes(pairs).flatten(2)[0].T  # (K^2, D)
    assert len(codes.unique(dim=0)) == size**2


@FIXED
@pytest.mark.parametrize("shared", [False, True])
def test_stages_quantize_what_is_left_times_their_refinement_and_weight_their_losses_by_its_square(part, shared):
    quantizer, latents = ResidualQuantizer(DIM, PARTS[part], depth=3, shared=shared).train(), latents_of(9)
    output, left, losses = quantizer(latents), latents, []
    for stage, scale in enumerate(1 / quantizer.refinement**stage for stage in range(3)):
        found = quantizer.stages[stage](left / scale)
        assert torch.equal(found.indices, output.indices[..., stage])
        losses.append({name: scale**2 * loss for name, loss in found.losses.items()})
        left = left - scale * found.quantized
    torch.testing.assert_close(output.quantized, latents - left)
    torch.testing.assert_close(output.losses, {name: sum(each[name] for each in losses) for name in losses[0]})


def test_a_residual_model_saved_before_there_was_a_refinement_keeps_its_stages_as_coarse_as_they_were():
    values = asdict(TokenizerConfig(quantizer={"name": "residual", "each": {"name": "lfq"}}))
    assert values["quantizer"].pop("refinement") is None
    older = TokenizerConfig.from_dict(values, 2, "here")
    assert older.quantizer["refinement"] == 1
    assert "refinement" not in older.identity()["quantizer"]
