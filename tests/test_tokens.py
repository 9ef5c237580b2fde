"""Tokens of every shape: there and back to the bit, whatever the size and the batch, and what is refused."""

import copy

import pytest
import torch
from conftest import picture, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_model import ANY_SIZE, images_of, placed

from tokenizer import ImageTokenizer
from tokenizer.tokens import num_places

EACH = {"name": "ema_vq", "codebook_size": 32}
STRUCTURES = {
    "residual": {"name": "residual", "depth": 3, "each": EACH},
    "shared residual": {"name": "residual", "depth": 3, "shared": True, "each": EACH},
    "grouped": {"name": "grouped", "groups": 2, "each": EACH},
    "grouped residual": {"name": "grouped", "groups": 2, "each": {"name": "residual", "depth": 2, "each": EACH}},
    "multiscale": {"name": "multiscale", "scales": [1, 2, 3, 5], "num_convolutions": 2, "each": EACH},
    "hierarchical": {"name": "hierarchical", "width": 8, "each": EACH},
}
LAST_AXIS = {"residual": 3, "shared residual": 3, "grouped": 2, "grouped residual": 4}


@pytest.fixture(scope="module")
def models() -> dict[str, ImageTokenizer]:
    made = {name: placed(tiny_config(quantizer=each), images_of(0)) for name, each in STRUCTURES.items()}
    assert all(model.quantizer.placed for model in made.values())
    return made


@pytest.fixture(params=STRUCTURES)
def structured(request, models) -> ImageTokenizer:
    return models[request.param]


def size_of(images: torch.Tensor) -> tuple[int, int]:
    return tuple(images.shape[2:])


@ANY_SIZE
@given(
    name=st.sampled_from(list(STRUCTURES)), batch=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9)
)
def test_any_divisible_size_goes_to_its_tokens_and_back_to_the_bit(models, name, batch, height, width):
    model, images = models[name], images_of(1, batch, 3, 2 * height, 2 * width)
    tokens, output = model.encode(images), model(images)
    assert torch.equal(tokens, output.tokens)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < model.vocab_size == 32
    if name in ("multiscale", "hierarchical"):
        if name == "multiscale":
            sides = [[max(1, int(side * scale / 5 + 0.5)) for side in (height, width)] for scale in (1, 2, 3, 5)]
        else:
            sides = [[-(-height // 2), -(-width // 2)], [height, width]]
        assert model.grids(size_of(images)) == [tuple(each) for each in sides]
        shape = (sum(rows * columns for rows, columns in sides),)
    else:
        assert model.grids(size_of(images)) == [(height, width)]
        shape = (height, width, LAST_AXIS[name])
    assert tokens.shape == (batch, *shape)
    assert model.token_shape(size_of(images)) == shape
    assert model.tokens_per_image(size_of(images)) == tokens[0].numel()
    pictures = model.decode(tokens, size_of(images))
    assert torch.equal(pictures, output.reconstructions.clamp(0, 1))
    if not model.quantizer.multiscale or height == width:
        assert torch.equal(model.decode(tokens), pictures)
        assert torch.equal(model.decode(tokens[0]), model.decode(tokens[:1]))


@ANY_SIZE
@given(name=st.sampled_from(list(STRUCTURES)), chosen=st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_the_same_image_gives_the_same_tokens_whatever_the_batch_around_it(models, name, chosen):
    model, images = models[name], images_of(5, 8, 3, 12, 20)
    alone = torch.cat([model.encode(image) for image in images])
    assert torch.equal(model.encode(images[chosen]), alone[chosen])
    assert torch.equal(model(images[chosen]).tokens, alone[chosen])


def test_under_autocast_and_in_a_bfloat16_model_the_way_back_is_the_same_to_the_bit(structured):
    images = images_of(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, output = structured.encode(images), structured(images)
        assert torch.equal(structured.decode(tokens, (12, 20)), output.reconstructions.clamp(0, 1))
    model = copy.deepcopy(structured).to(torch.bfloat16)
    tokens, output = model.encode(images), model(images)
    assert torch.equal(model.decode(tokens, (12, 20)), output.reconstructions.clamp(0, 1))
    assert model.tokens_to_codes(tokens, (12, 20)).dtype == torch.float32


@torch.no_grad()
def test_a_quantizer_of_all_scales_compiles_into_one_graph(models):
    quantizer, latents = models["multiscale"].quantizer, torch.randn(1, 4, 3, 5)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(latents).indices, quantizer(latents).indices)


def test_encoding_in_training_mode_moves_nothing(structured):
    before = {name: value.clone() for name, value in structured.state_dict().items()}
    expected = structured.encode(images_of(1))
    structured.train()
    try:
        assert torch.equal(structured.encode(images_of(1)), expected)
        structured.quantizer.step()
    finally:
        structured.eval()
    assert all(torch.equal(before[name], value) for name, value in structured.state_dict().items())


def test_a_saved_model_gives_the_same_tokens_and_pictures(structured, tmp_path):
    structured.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    tokens = structured.encode(images_of(1))
    assert loaded.config == structured.config
    assert loaded.fingerprint == structured.fingerprint
    assert torch.equal(loaded.encode(images_of(1)), tokens)
    assert torch.equal(loaded.decode(tokens, (12, 20)), structured.decode(tokens, (12, 20)))


def test_the_example_of_the_model_card_runs(structured, tmp_path, monkeypatch):
    structured.save_pretrained(tmp_path / "model")
    picture(0, 60, 44).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    program = (tmp_path / "model" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    assert names["pictures"].shape[:2] == (1, 3)
    shape = program.partition("int64 (1, ")[2].partition(")")[0].split(", ")
    assert names["tokens"].ndim == 1 + len(shape)


def test_forward_gives_a_gradient_to_every_parameter(structured):
    structured.train()
    try:
        output = structured(images_of(1))
        ((output.reconstructions - images_of(1)).square().mean() + sum(output.losses.values())).backward()
        for name, parameter in structured.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    finally:
        structured.quantizer.discard()
        structured.zero_grad()
        structured.eval()


@pytest.mark.parametrize("name", ["residual", "shared residual"])
def test_the_first_codebooks_decode_to_coarser_pictures(models, name):
    model, images = models[name], images_of(0)
    tokens, latents = model.encode(images), model.encode_latents(images)
    errors = [(model.tokens_to_codes(tokens[..., :count]) - latents).square().mean() for count in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert model.decode(tokens[..., :1]).shape == images.shape


def test_the_first_scales_decode_to_coarser_pictures_where_the_size_is_given(models):
    model, images = models["multiscale"], images_of(0)
    tokens, latents = model.encode(images), model.encode_latents(images)
    grids = model.grids((12, 20))
    lengths = [sum(rows * columns for rows, columns in grids[:count]) for count in range(1, 5)]
    errors = [
        (model.tokens_to_codes(tokens[:, :length], (12, 20)) - latents).square().mean().item() for length in lengths
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]
    assert model.decode(tokens[:, : lengths[0]], (12, 20)).shape == images.shape


def test_no_two_squares_have_as_many_tokens(models):
    quantizer = models["multiscale"].quantizer
    lengths = [num_places(quantizer, (side, side)) for side in range(1, 200)]
    assert lengths == sorted(set(lengths))


REFUSED = [
    ("residual", (2, 3), None, r"shape \(2, 3\); the rule is \(B, h, w, 3\) or \(h, w, 3\), none of them 0"),
    ("residual", (2, 3, 3, 4), None, r"shape \(2, 3, 3, 4\) have 4 codebooks; this tokenizer decodes 1..3 of them"),
    ("grouped", (2, 3, 3, 1), None, r"shape \(2, 3, 3, 1\) have 1 codebooks; this tokenizer decodes 2 of them"),
    ("grouped", (2, 3, 3, 2), (6, 8), r"\(2, 3, 3, 2\) are no grid of 3 x 4, as image_size says; give the size"),
    ("grouped", (2, 3, 3, 2), 7, "image_size=7 must be a positive multiple of downsample_factor=2"),
    ("multiscale", (1, 2, 3), None, r"shape \(1, 2, 3\); the rule is \(B, L\) or \(L,\), none of them 0"),
    ("multiscale", (1, 12), None, r"no square picture has 12 tokens \(the nearest have 7 and 15\); give image_size="),
    ("multiscale", (1, 12), (6, 8), "not those of a grid of 3 x 4, as image_size says: it has 19, and 1, 3, 7 after"),
    ("hierarchical", (1, 4), (6, 8), "as image_size says: it has 16, and no fewer after"),
]


@pytest.mark.parametrize(("name", "shape", "image_size", "message"), REFUSED)
def test_tokens_of_another_shape_are_refused_with_the_rule_and_the_way_out(models, name, shape, image_size, message):
    for method in (models[name].decode, models[name].tokens_to_codes):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(shape, dtype=torch.int64), image_size)


def test_tokens_out_of_range_are_refused(structured):
    tokens = structured.encode(images_of(1))
    tokens.view(-1)[-1] = 32
    with pytest.raises(ValueError, match=r"to 32; they must lie in \[0, 32\)"):
        structured.decode(tokens, (12, 20))
