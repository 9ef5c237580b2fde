"""ImageTokenizer: images to tokens and back, whatever the size, the batch, the mode and the precision."""

import copy

import numpy as np
import pytest
import torch
from conftest import TINY_AUTOENCODER, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tokenizer import ImageTokenizer, ImageVAE, TokenizerConfig, image_model, processor

ANY_SIZE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
EVERY_BLOCK = TINY_AUTOENCODER | {"attention_levels": [1], "middle_attention": True, "dropout": 0.5}


def images_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape or (3, 3, 12, 20), generator=torch.Generator().manual_seed(seed))


def placed(config: TokenizerConfig, images: torch.Tensor) -> ImageTokenizer:
    """A model of random weights (residual blocks start at zero) whose codes lie among the latents of these images."""
    torch.manual_seed(0)
    model = ImageTokenizer(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model(images)
    model.quantizer.step()
    return model.eval()


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    return placed(tiny_config(autoencoder=EVERY_BLOCK), images_of(0))


# Shapes, and the way there and back.


@ANY_SIZE
@given(batch=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12), channels=st.sampled_from([1, 3]))
def test_any_divisible_size_goes_to_its_grid_and_back(batch, height, width, channels):
    model = placed(tiny_config(image_channels=channels), images_of(0, 2, channels, 8, 8))
    images = images_of(1, batch, channels, 2 * height, 2 * width)
    tokens, output = model.encode(images), model(images)
    assert tokens.shape == output.tokens.shape == (batch, height, width)
    assert tokens.dtype == output.tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < model.vocab_size == 32
    pictures = model.decode(tokens)
    assert pictures.shape == output.reconstructions.shape == images.shape
    assert pictures.dtype == output.reconstructions.dtype == torch.float32
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert model.grid_size((2 * height, 2 * width)) == (height, width)
    assert model.grids((2 * height, 2 * width)) == [(height, width)]
    assert model.tokens_per_image((2 * height, 2 * width)) == height * width
    assert all(loss.ndim == 0 and loss.isfinite() for loss in output.losses.values())


@ANY_SIZE
@given(batch=st.integers(1, 5), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_decoding_the_tokens_equals_the_clamped_reconstructions_to_the_bit(tokenizer, batch, height, width, seed):
    images = images_of(seed, batch, 3, 2 * height, 2 * width)
    reconstructions = tokenizer(images).reconstructions
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), reconstructions.clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_way_there_and_back_is_the_same_from_any_float_type_and_memory_layout(tokenizer, dtype):
    for images in (images_of(1).to(dtype), images_of(1).contiguous(memory_format=torch.channels_last)):
        expected = tokenizer(images).reconstructions.clamp(0, 1)
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), expected)


def test_reconstructions_are_not_clamped(tokenizer):
    with torch.no_grad():
        tokenizer.autoencoder.decoder.head[2].bias += 5
    assert tokenizer(images_of(1)).reconstructions.max() > 1


def test_the_inner_methods_compose_to_encode_and_decode(tokenizer):
    images = images_of(1)
    latents = tokenizer.encode_latents(images)
    assert latents.shape == (3, 4, 6, 10)
    tokens = tokenizer.quantizer(latents).indices
    assert torch.equal(tokens, tokenizer.encode(images))
    codes = tokenizer.tokens_to_codes(tokens)
    assert codes.shape == latents.shape
    assert torch.equal(tokenizer.decode_latents(codes).clamp(0, 1), tokenizer.decode(tokens))
    assert torch.equal(tokenizer.decode_latents(codes.contiguous()).clamp(0, 1), tokenizer.decode(tokens))


def test_square_sizes_may_be_one_number(tokenizer):
    assert tokenizer.grid_size(16) == tokenizer.grid_size((16, 16)) == tokenizer.grid_size(np.int64(16)) == (8, 8)
    assert tokenizer.tokens_per_image(16) == 64


@pytest.mark.parametrize("image_size", [0, 15, -2, (16, 15), (0, 16)])
def test_a_size_without_a_grid_is_refused(tokenizer, image_size):
    with pytest.raises(ValueError, match=r"image_size=.* must be a positive multiple of downsample_factor=2; the nea"):
        tokenizer.grid_size(image_size)


@pytest.mark.parametrize("image_size", [16.0, (16.0, 16), "16", (16, 16, 16), None])
def test_a_size_that_is_no_number_of_pixels_is_refused(tokenizer, image_size):
    with pytest.raises(ValueError, match=r"image_size=.* must be a whole number of pixels, or the two of \(H, W\)"):
        tokenizer.grid_size(image_size)


def test_tokens_are_row_major():
    near_sighted = {"patch_size": 2, "channel_multipliers": [1], "norm_groups": 0}
    model = placed(tiny_config(autoencoder=TINY_AUTOENCODER | near_sighted), images_of(0))
    images = images_of(1, 1, 3, 48, 80)
    before = model.encode(images)
    images[..., :4, -4:] = 1 - images[..., :4, -4:]  # the corner at the top right
    rows, columns = (model.encode(images) != before)[0].nonzero().T
    assert len(rows) > 0
    assert rows.max() < 12
    assert columns.min() >= 28


# The same image, the same tokens.


@ANY_SIZE
@given(chosen=st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_the_same_image_gives_the_same_tokens_whatever_the_batch_around_it(tokenizer, chosen):
    images = images_of(5, 8, 3, 12, 20)
    alone = torch.cat([tokenizer.encode(image) for image in images])
    assert torch.equal(tokenizer.encode(images[chosen]), alone[chosen])
    assert torch.equal(tokenizer(images[chosen]).tokens, alone[chosen])


def test_even_where_two_codes_are_almost_equally_near():
    images = images_of(0, 8, 3, 32, 32)  # 512 latents, so that the 1024 codes stand in twins
    model = placed(TokenizerConfig(), images)
    alone = torch.cat([model.encode(image) for image in images])
    assert torch.equal(model.encode(images), alone)


def test_encoding_and_decoding_in_training_mode_change_nothing_and_use_no_dropout(tokenizer):
    images, expected = images_of(1), tokenizer.encode(images_of(1))
    pictures, before = tokenizer.decode(expected), copy.deepcopy(tokenizer.state_dict())
    tokenizer.train()
    assert not torch.equal(tokenizer.encode_latents(images), tokenizer.encode_latents(images))  # dropout is at work
    for _ in range(2):
        assert torch.equal(tokenizer.encode(images), expected)
        assert torch.equal(tokenizer.decode(expected), pictures)
    assert tokenizer.quantizer.pending is None
    tokenizer.quantizer.step()
    assert all(torch.equal(before[name], value) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_encoding_and_decoding_leave_the_mode_as_it_was_even_when_they_refuse(tokenizer, training):
    tokenizer.train(training)
    tokenizer.decode(tokenizer.encode(images_of(1)))
    with pytest.raises(ValueError, match="tokens run from 99"):
        tokenizer.decode(torch.full((1, 2, 2), 99))
    assert all(module.training == training for module in tokenizer.modules())


# Tokens that are none.


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint64])
def test_tokens_of_every_integer_type_decode_alike(tokenizer, dtype):
    tokens = tokenizer.encode(images_of(1))
    assert torch.equal(tokenizer.decode(tokens.to(dtype)), tokenizer.decode(tokens))


def test_a_single_grid_is_a_batch_of_one(tokenizer):
    tokens = tokenizer.encode(images_of(1, 3, 12, 20))
    assert tokens.shape == (1, 6, 10)
    assert torch.equal(tokenizer.decode(tokens[0]), tokenizer.decode(tokens))


ZEROS = torch.zeros(1, 2, 2)
REFUSED = {
    "negative": (ZEROS.long() - 1, r"from -1 to -1; they must lie in \[0, 32\)"),
    "too large": (ZEROS.long() + 32, r"from 32 to 32; they must lie in \[0, 32\)"),
    "beyond int64": (torch.tensor([[2**64 - 1]], dtype=torch.uint64), r"must lie in \[0, 32\)"),
    "float": (ZEROS, "torch.float32; the rule is an integer tensor"),
    "bool": (ZEROS.bool(), "torch.bool; the rule is an integer tensor"),
    "complex": (ZEROS.to(torch.complex128), "torch.complex128; the rule is an integer tensor"),
    "array": (np.zeros((1, 2, 2), np.int64), "ndarray; the rule is an integer tensor"),
    "list": ([[0, 1], [2, 3]], "list; the rule is an integer tensor"),
    "flat": (torch.zeros(4).long(), r"shape \(4,\); the rule is \(B, h, w\) or \(h, w\)"),
    "four dimensions": (ZEROS.long()[None], r"shape \(1, 1, 2, 2\); the rule is"),
    "empty batch": (ZEROS.long()[:0], r"shape \(0, 2, 2\); the rule is .* none of them 0"),
    "empty side": (ZEROS.long()[:, :0], r"shape \(1, 0, 2\); the rule is .* none of them 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_tokens_is_refused_and_never_wrapped(tokenizer, case):
    tokens, message = REFUSED[case]
    for method in (tokenizer.decode, tokenizer.tokens_to_codes):
        with pytest.raises(ValueError, match=message):
            method(tokens)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\); the rule is \(B, C, H, W\)"),
        (torch.zeros(1, 1, 8, 8), "have 1 channels and this model takes 3"),
        (torch.zeros(1, 3, 9, 8), "9 x 8 .* divisible by 2"),
        (torch.zeros(1, 3, 8, 8).byte(), "torch.uint8; forward takes floats"),
    ],
)
def test_forward_refuses_what_has_no_grid(tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(images)


# Gradients, precision, compilation, copies.


def test_encode_and_decode_give_no_gradients(tokenizer):
    images = images_of(1).requires_grad_()
    tokens = tokenizer.encode(images)
    assert not tokens.requires_grad
    assert not tokenizer.decode(tokens).requires_grad


def test_forward_gives_a_gradient_to_every_parameter():
    tokenizer = placed(tiny_config(), images_of(0)).train()
    output = tokenizer(images_of(1))
    ((output.reconstructions - images_of(1)).square().mean() + sum(output.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def assert_search_in_float32(tokenizer: ImageTokenizer) -> None:
    """The tokens are the nearest of the float32 codes, found without rounding of our own."""
    images = images_of(1)
    latents, tokens, codebook = tokenizer.encode_latents(images), tokenizer.encode(images), tokenizer.quantizer.codebook
    assert latents.dtype == torch.bfloat16
    assert codebook.dtype == tokenizer.tokens_to_codes(tokens).dtype == torch.float32
    distances = torch.cdist(latents.double().movedim(1, -1).flatten(0, 2), codebook.double())
    chosen = distances.gather(1, tokens.flatten()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=1e-6, atol=1e-6)
    output = tokenizer(images)
    assert output.reconstructions.dtype == torch.float32
    assert output.losses["commitment"].dtype == torch.float32
    assert torch.equal(output.reconstructions.clamp(0, 1), tokenizer.decode(tokens))


def test_under_bfloat16_autocast_codes_and_search_stay_float32(tokenizer, monkeypatch):
    monkeypatch.setattr(processor, "bfloat16_is_faster", lambda: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_search_in_float32(tokenizer)


def test_in_a_bfloat16_model_codes_and_search_stay_float32(tokenizer):
    assert_search_in_float32(tokenizer.to(torch.bfloat16))


@torch.no_grad()
def test_forward_and_the_inner_methods_compile_into_one_graph_each():
    images = images_of(1, 2, 3, 8, 12)
    tokenizer = placed(tiny_config(), images)
    expected, latents = tokenizer(images), tokenizer.encode_latents(images)
    forward, encode_latents, decode_latents = (
        torch.compile(method, fullgraph=True, backend="eager")
        for method in (tokenizer, tokenizer.encode_latents, tokenizer.decode_latents)
    )
    found, codebook = forward(images), tokenizer.quantizer.codebook
    torch.testing.assert_close(codebook[found.tokens], codebook[expected.tokens])  # two codes may lie on one latent
    torch.testing.assert_close(found.reconstructions, expected.reconstructions)
    torch.testing.assert_close(encode_latents(images), latents)
    torch.testing.assert_close(decode_latents(latents), tokenizer.decode_latents(latents))


def test_a_copy_is_equal_and_independent(tokenizer):
    tokenizer.train()(images_of(2))  # with statistics pending
    twin, tokens = copy.deepcopy(tokenizer), tokenizer.encode(images_of(1))
    assert torch.equal(twin.encode(images_of(1)), tokens)
    twin.quantizer.step()
    assert not torch.equal(twin.quantizer.codebook, tokenizer.quantizer.codebook)
    assert torch.equal(tokenizer.encode(images_of(1)), tokens)


def test_the_state_survives_a_way_without_pickle(tokenizer):
    other = ImageTokenizer(tokenizer.config).eval()
    other.load_state_dict(load(save(tokenizer.state_dict())))
    assert torch.equal(other.encode(images_of(1)), tokenizer.encode(images_of(1)))
    assert other.fingerprint == tokenizer.fingerprint


def test_encode_leaves_each_part_in_the_mode_that_it_was_in(tokenizer):
    tokenizer.train()
    tokenizer.autoencoder.encoder.eval()  # frozen, as for a decoder's fine-tuning
    before = [module.training for module in tokenizer.modules()]
    tokenizer.encode(images_of(1))
    assert [module.training for module in tokenizer.modules()] == before


def test_the_fast_mode_rounds_the_latents_less_than_bfloat16_throughout_and_searches_in_float32(tokenizer):
    for weight in tokenizer.parameters():
        weight.data = 0.3 * torch.randn_like(weight)
    images = torch.rand(8, 3, 32, 32)
    fast, rounded = copy.deepcopy(tokenizer).fast(), copy.deepcopy(tokenizer).bfloat16()
    with torch.no_grad():
        expected, found, coarse = (each.encode_latents(images).float() for each in (tokenizer, fast, rounded))
        assert fast.encode_latents(images).dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.7 * (coarse - expected).norm()
    assert torch.equal(fast.quantizer.codebook, tokenizer.quantizer.codebook)
    assert fast.fingerprint != tokenizer.fingerprint  # it makes other tokens


def test_the_fast_mode_is_the_model_itself_rounds_what_it_decodes_and_is_saved_in_float32(tokenizer, tmp_path):
    tokens = tokenizer.encode(torch.rand(2, 3, 32, 32))
    expected = tokenizer.decode(tokens)
    assert tokenizer.fast() is tokenizer
    pictures = tokenizer.decode(tokens)
    assert pictures.dtype == torch.float32
    assert not torch.equal(pictures, expected)
    assert (pictures - expected).abs().mean() < 0.01
    assert torch.equal(tokenizer.decode(tokens[1:]), pictures[1:])  # whatever is beside it
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).reconstructions.clamp(0, 1))
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.fingerprint == tokenizer.fingerprint


def test_on_a_processor_where_float32_is_faster_the_fast_mode_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(image_model, "bfloat16_is_faster", lambda: False)
    before = copy.deepcopy(tokenizer.state_dict())
    assert tokenizer.fast() is tokenizer
    assert {weight.dtype for weight in tokenizer.parameters()} == {torch.float32}
    for name, weight in tokenizer.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_subclass_loads_what_its_class_saved_and_no_other_class_does(tokenizer, tmp_path, monkeypatch):
    class Named(ImageTokenizer):
        def named(self) -> str:
            return "mine"

    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = Named.from_pretrained(tmp_path / "saved")
    assert (type(loaded), loaded.named(), loaded.fingerprint) == (Named, "mine", tokenizer.fingerprint)
    with pytest.raises(ValueError, match="describes a model of class ImageTokenizer; load it with ImageTokenizer"):
        ImageVAE.from_pretrained(tmp_path / "saved")


def test_a_path_from_home_is_a_folder_and_a_file_in_it_is_told_from_one(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ImageTokenizer.from_pretrained("~/saved").fingerprint == tokenizer.fingerprint
    with pytest.raises(FileNotFoundError, match=r"config.json is a file; pass the folder of a saved model, .*saved$"):
        ImageTokenizer.from_pretrained(tmp_path / "saved/config.json")
