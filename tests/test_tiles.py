"""Large pictures in tiles: where they equal the whole, how they pass into each other, memory, and every refusal."""

from itertools import pairwise

import pytest
import stopwatch
import torch
from conftest import TINY_AUTOENCODER, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenizer import QUANTIZERS, ImageTokenizer, ImageVAE, VAEConfig
from tokenizer.tiles import Tiles

LOCAL = TINY_AUTOENCODER | {"base_channels": 4, "norm_groups": 0}  # no norm and no attention
FACTOR = 2


def stirred(model: nn.Module) -> nn.Module:
    """With every weight random, those too that start at nought, in float64, where sums hardly depend on their order."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model.double().eval()


def reach(network: nn.Module, channels: int, side: int) -> int:
    """How many places of its input away from its own an output can see, by the gradient of one in the middle."""
    features = torch.zeros(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    result = network(features)
    middle = result.shape[2] // 2
    result[0, :, middle].sum().backward()
    seen = features.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    own = middle * side / result.shape[2]
    return int(max(own - seen.min(), seen.max() + 1 - own)) + 1


def local_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return stirred(ImageTokenizer(tiny_config(autoencoder=LOCAL)))


MODEL = local_tokenizer()
REACH = max(  # pixels
    reach(MODEL.autoencoder.encoder, 3, 128),
    FACTOR * reach(MODEL.autoencoder.decoder, 4, 64),
)
COVERS = -(-4 * REACH // FACTOR)  # places that tiles must share to equal the whole


@torch.no_grad()
def decoded(model: ImageTokenizer, tokens: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Pictures of tokens, not clamped: what is cut off could hide a difference."""
    return model.decode_latents(model.tokens_to_codes(tokens), tiles=tiles)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2 * COVERS), st.integers(1, 2 * COVERS), st.integers(1, COVERS), st.integers(0, 4))
def test_without_norms_and_attention_tiles_equal_the_whole_where_they_share_enough(height, width, more, shared):
    overlap = FACTOR * (COVERS + shared)
    asked = {"tile_size": overlap + FACTOR * more, "tile_overlap": overlap}
    images, tiles = torch.rand(1, 3, FACTOR * height, FACTOR * width), MODEL.tiles(**asked)
    tokens = MODEL.encode(images, **asked)
    assert torch.equal(tokens, MODEL.encode(images))
    assert torch.equal(MODEL.decode(tokens, **asked), decoded(MODEL, tokens, tiles).clamp(0, 1))
    with torch.no_grad():  # in float64, since in float32 thousands of shares of one pixel do not sum up to all of it
        codes, decoder = MODEL.tokens_to_codes(tokens), MODEL.autoencoder.decoder
        assert torch.equal(decoded(MODEL, tokens, tiles), tiles.decoded(MODEL.decode_latents, codes))
        exact = codes.double()
        torch.testing.assert_close(tiles.decoded(decoder, exact), decoder(exact), rtol=1e-10, atol=1e-10)
        latents = [MODEL.encode_latents(images, tiles=each) for each in (tiles, None)]
    torch.testing.assert_close(*latents, rtol=1e-12, atol=1e-12)


def test_tiles_that_share_too_little_differ_and_the_more_they_share_the_less():
    tokens = torch.randint(0, 32, (1, 96, 96), generator=torch.Generator().manual_seed(0))
    whole = decoded(MODEL, tokens)
    errors = [(decoded(MODEL, tokens, MODEL.tiles(64, each)) - whole).abs().mean().item() for each in (0, 16, 32, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1] > 0


@given(st.integers(1, 300), st.integers(1, 60), st.data())
def test_tiles_cover_an_axis_in_one_size_and_share_what_was_asked_for(places, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    spans = Tiles(size, overlap, FACTOR).spans(places)
    assert (spans[0][0], spans[-1][1]) == (0, places)
    assert {stop - start for start, stop in spans} == {min(size, places)}
    for (start, stop), (next_start, _) in pairwise(spans):
        assert start < next_start <= stop - overlap


@given(st.integers(1, 100), st.integers(1, 30), st.integers(1, 5), st.data())
def test_what_every_tile_knows_is_put_together_as_it_was(places, size, factor, data):
    tiles = Tiles(size, data.draw(st.integers(0, size - 1)), factor)
    images = torch.rand(2, 1, factor, places * factor, dtype=torch.float64)
    assert torch.equal(tiles.encoded(lambda tile: tile[:, :, ::factor, ::factor], images), images[..., :1, ::factor])
    latents = torch.rand(2, 1, 1, places, dtype=torch.float64)
    grown = tiles.decoded(lambda tile: tile.repeat_interleave(factor, 2).repeat_interleave(factor, 3), latents)
    torch.testing.assert_close(grown, latents.repeat_interleave(factor, 3).expand(-1, -1, factor, -1))


def test_one_tile_passes_into_the_next_over_half_of_what_they_share():
    told = iter([0.0, 1.0])
    pixels = Tiles(size=8, overlap=4, factor=4).decoded(
        lambda tile: torch.full((1, 1, 4, 32), next(told)), torch.zeros(1, 1, 1, 12)
    )[0, 0, 0]
    assert (pixels[:20] == 0).all()  # they share 16..32
    assert (pixels[28:] == 1).all()
    torch.testing.assert_close(pixels[20:28], (torch.arange(8) + 0.5) / 8)


def test_a_token_is_taken_from_the_tile_in_which_it_lies_farthest_from_a_border():
    told = iter([0.0, 1.0, 2.0])
    taken = Tiles(size=8, overlap=4, factor=1).encoded(
        lambda tile: torch.full((1, 1, 1, 8), next(told)), torch.zeros(1, 1, 1, 16)
    )
    assert taken.flatten().tolist() == [0.0] * 6 + [1.0] * 4 + [2.0] * 6


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_tokens_of_every_shape_are_those_of_the_whole_where_one_tile_holds_it(name):
    torch.manual_seed(0)
    model = ImageTokenizer(tiny_config(quantizer={"name": name})).eval()
    images = torch.rand(2, 3, 24, 40)
    tokens = model.encode(images)
    assert torch.equal(model.encode(images, tile_size=40), tokens)
    assert model.encode(images, tile_size=16).shape == tokens.shape
    pictures = model.decode(tokens, image_size=(24, 40))
    assert torch.equal(model.decode(tokens, image_size=(24, 40), tile_size=40), pictures)
    assert model.decode(tokens, image_size=(24, 40), tile_size=16).shape == pictures.shape


def test_in_tiles_too_a_picture_has_the_same_tokens_whatever_stands_beside_it(tokenizer):
    images = torch.rand(3, 3, 40, 24)
    together = tokenizer.encode(images, tile_size=16)
    assert torch.equal(together, torch.cat([tokenizer.encode(each, tile_size=16) for each in images]))


def test_a_continuous_model_and_one_with_classes_take_tiles_alike():
    vae = stirred(ImageVAE(VAEConfig(latent_dim=4, autoencoder=LOCAL, num_classes=3)))
    tiles = {"tile_size": FACTOR * (COVERS + 8), "tile_overlap": FACTOR * COVERS, "labels": [2]}
    images = torch.rand(1, 3, 2 * COVERS, 3 * COVERS // 2 * 2)
    latents = vae.encode(images, **tiles)
    torch.testing.assert_close(latents, vae.encode(images, labels=[2]), rtol=0, atol=1e-10)
    torch.testing.assert_close(vae.decode(latents, **tiles), vae.decode(latents, labels=[2]), rtol=0, atol=1e-6)
    assert not torch.equal(vae.decode(latents, **tiles), vae.decode(latents, **tiles | {"labels": [1]}))


@torch.no_grad()
def largest_input(model: ImageTokenizer, side: int, tiles: Tiles | None) -> int:
    """Numbers in the largest features that a convolution was given while a picture was encoded and decoded."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    model.decode_latents(model.encode_latents(torch.rand(1, 3, side, side), tiles=tiles), tiles=tiles)
    for hook in hooks:
        hook.remove()
    return max(seen)


def test_no_convolution_sees_more_than_a_tile_however_large_the_picture(tokenizer):
    tiles = Tiles(size=16, overlap=4, factor=FACTOR)
    of_a_tile = largest_input(tokenizer, 32, None)
    assert [largest_input(tokenizer, side, tiles) for side in (64, 256)] == [of_a_tile, of_a_tile]
    assert largest_input(tokenizer, 64, None) == 4 * of_a_tile


@pytest.mark.skipif(not stopwatch.CLEAR_REFS.exists(), reason="the system does not tell")
def test_memory_beyond_what_goes_in_and_comes_out_does_not_grow_with_the_picture(tokenizer):
    beyond = {}
    tokenizer.decode(torch.zeros(1, 64, 64, dtype=torch.int64))  # what the first call leaves behind is not of its size
    for side in (256, 1024):
        tokens = torch.randint(0, 32, (1, side // 2, side // 2))
        picture, latents = 3 * 4 * side**2, 4 * 4 * (side // 2) ** 2
        peak = stopwatch.peak_memory(lambda tokens=tokens: tokenizer.decode(tokens, tile_size=128), "cpu")
        beyond[side] = peak - picture - latents
    assert beyond[1024] < beyond[256] + 8 * 2**20  # the whole would take 220 MiB more


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"tile_size": 15},
            "tile_size=15 must be a side in pixels, a positive multiple of downsample_factor=2, or None",
        ),
        ({"tile_size": 0}, "tile_size=0 must be"),
        ({"tile_size": 16.0}, "tile_size=16.0 must be"),
        ({"tile_size": 16, "tile_overlap": 16}, "tile_overlap=16 must be pixels below tile_size=16, a multiple of"),
        ({"tile_size": 16, "tile_overlap": 3}, "tile_overlap=3 must be"),
        ({"tile_size": 16, "tile_overlap": -2}, "tile_overlap=-2 must be"),
        ({"tile_overlap": 8}, "tile_overlap=8 was given without a tile_size; give both, or neither"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tokenizer, asked, told):
    with pytest.raises(ValueError, match=told):
        tokenizer.encode(torch.rand(3, 16, 16), **asked)
    with pytest.raises(ValueError, match=told):
        tokenizer.decode(torch.zeros(1, 8, 8, dtype=torch.int64), **asked)
