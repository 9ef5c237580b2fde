"""The network: its size as VQGAN, its shapes, and what its layout refuses; its arithmetic: test_diffusers_format.py."""

import copy
import math
import weakref

import pytest
import torch
from diffusers_models import vq_model
from largest_tensor import LargestTensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer import ImageTokenizer, TokenizerConfig
from tokenizer.attention import PLAIN_PLACES
from tokenizer.autoencoder import (
    AttentionBlock,
    ClassShift,
    ConvolutionalAutoencoder,
    ResidualBlock,
)
from tokenizer.kernels import LIBRARY
from tokenizer.winograd import WinogradConv2d

TAMING_F16 = {
    "name": "convolutional",
    "patch_size": 1,
    "base_channels": 128,
    "channel_multipliers": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attention_levels": [4],
    "middle_attention": True,
    "latent_channels": 256,
    "norm_groups": 32,
}


def test_tamings_f16_vqgan_has_its_343_tensors_and_72_14_million_parameters():
    quantizer = {"name": "ema_vq", "codebook_size": 1024}
    with torch.device("meta"):
        ours = ImageTokenizer(TokenizerConfig(codebook_dim=256, autoencoder=TAMING_F16, quantizer=quantizer))
        reference = vq_model(
            [128, 128, 256, 256, 512], [4], layers_per_block=2, latent_channels=256, num_vq_embeddings=1024
        )
    tensors = [*ours.parameters(), ours.quantizer.codebook]
    assert ours.downsample_factor == 16
    assert len(tensors) == len(reference.state_dict()) == 343
    count = sum(tensor.numel() for tensor in tensors)
    assert count == sum(parameter.numel() for parameter in reference.parameters())
    assert round(count / 1e6, 2) == 72.14


@pytest.mark.parametrize("channel_multipliers", [[1], [1, 2], [2, 1, 1]])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
def test_the_factor_is_the_patch_times_the_halvings_and_the_decoder_undoes_it(patch_size, channel_multipliers):
    autoencoder = ConvolutionalAutoencoder(
        3, 5, patch_size=patch_size, base_channels=8, channel_multipliers=channel_multipliers, latent_channels=8
    )
    factor = patch_size * 2 ** (len(channel_multipliers) - 1)
    assert autoencoder.downsample_factor == factor
    latents = autoencoder.encoder(torch.rand(2, 3, 3 * factor, 5 * factor))
    assert latents.shape == (2, 5, 3, 5)
    assert autoencoder.decoder(latents).shape == (2, 3, 3 * factor, 5 * factor)


THREE_LEVELS = {"channel_multipliers": [1, 1, 1], "base_channels": 8, "latent_channels": 8, "patch_size": 1}


@pytest.mark.parametrize("num_classes", [0, 3])
def test_on_a_cpu_a_decoder_takes_the_fewer_pictures_the_larger_they_become_unless_it_trains(num_classes, monkeypatch):
    decoder = ConvolutionalAutoencoder(3, 4, **THREE_LEVELS, num_classes=num_classes).decoder
    given, sizes = [torch.randn(7, 4, 2, 3)], {name: [] for name in ("level_2", "level_1", "level_0")}
    if num_classes:
        nn.init.normal_(decoder.classes.table.weight)
        given.append(torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    for name, of_level in sizes.items():
        decoder.get_submodule(name).register_forward_hook(lambda *call, to=of_level: to.append(len(call[2])))
    monkeypatch.setattr("tokenizer.autoencoder.POSITIONS_AT_ONCE", 5 * 2 * 3)
    expected = decoder(*given)
    torch.testing.assert_close(decoder.eval()(*given), expected)
    assert sizes == {"level_2": [7, 5, 2], "level_1": [7, 5, 2], "level_0": [7] + [1] * 7}  # 6, 6 and 24 enter


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # it is deprecated
def test_an_exported_or_traced_decoder_takes_any_batch(monkeypatch):
    monkeypatch.setattr("tokenizer.autoencoder.POSITIONS_AT_ONCE", 12)
    decoder, latents = ConvolutionalAutoencoder(3, 4, **THREE_LEVELS).decoder.eval(), torch.randn(9, 4, 2, 3)
    expected, batch = decoder(latents), {0: torch.export.Dim("batch")}
    exported = torch.export.export(decoder, (latents[:5],), dynamic_shapes={"features": batch}).module()
    for made in (exported, torch.jit.trace(decoder, (latents[:5],), check_trace=False)):
        torch.testing.assert_close(made(latents), expected)


def test_a_decoder_lets_go_of_what_a_layer_has_used():
    decoder, outputs, left = ConvolutionalAutoencoder(3, 4, **THREE_LEVELS).decoder.eval(), [], []
    for layer in decoder:
        layer.register_forward_hook(lambda layer, given, output: outputs.append(weakref.ref(output)))
    decoder.head.register_forward_hook(lambda *call: left.extend(each() is not None for each in outputs))
    with torch.no_grad():
        decoder(torch.randn(1, 4, 2, 3))
    assert left == [False] * (len(decoder) - 3) + [True, True]  # what enters and what leaves the head, the last but one


@pytest.mark.parametrize("norm_groups", [0, 4])
def test_without_gradients_a_block_gives_the_same_and_leaves_its_input_as_it_was(norm_groups):
    block = ResidualBlock(8, 8, norm_groups, dropout=0.0)
    nn.init.normal_(block.conv2.weight)
    features = torch.randn(2, 8, 4, 4)
    before, expected = features.clone(), block(features)
    with torch.no_grad():
        assert torch.equal(block(features), expected)
    assert torch.equal(features, before)


def test_attention_over_many_places_never_holds_their_pairs():
    block, side = AttentionBlock(8, norm_groups=4), math.isqrt(PLAIN_PLACES) + 8
    features = torch.randn(1, 8, side, side)
    with torch.no_grad(), LargestTensor() as largest:
        block(features)
    assert features.numel() <= largest.numbers < side**4 / 16


class Casts(TorchDispatchMode):
    """Tensors of four dimensions that were brought from one type to another."""

    number = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.number += operation is torch.ops.aten._to_copy.default and arguments[0].ndim == 4
        return operation(*arguments, **(options or {}))


def test_under_autocast_features_stay_in_its_type():
    block, shift = ResidualBlock(8, 8, norm_groups=0, dropout=0.0), ClassShift(2, 8)
    features = torch.randn(2, 8, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        shifted = shift(features, torch.tensor([0, 1]))
        assert shifted.dtype == block(shifted).dtype == torch.bfloat16
    assert casts.number == 2  # of the kernels


def norms_of(norm_groups: int) -> list[nn.GroupNorm]:
    layout = {"base_channels": 12, "channel_multipliers": [1, 2], "attention_levels": [1], "middle_attention": True}
    autoencoder = ConvolutionalAutoencoder(3, 4, latent_channels=8, norm_groups=norm_groups, **layout)
    return [module for module in autoencoder.modules() if isinstance(module, nn.GroupNorm)]


@torch.no_grad()
def test_a_wide_network_goes_by_tiles_and_makes_what_plain_sums_make():
    torch.manual_seed(0)
    autoencoder = ConvolutionalAutoencoder(3, 4, base_channels=192, channel_multipliers=[1, 1], norm_groups=8).eval()
    for weight in autoencoder.parameters():
        weight.copy_(0.05 * torch.randn_like(weight))
    images = torch.rand(2, 3, 256, 128)
    exact = copy.deepcopy(autoencoder).double()
    latents = autoencoder.encoder(images)
    pictures, expected = autoencoder.decoder(latents), exact.decoder(latents.double())
    assert (pictures - expected).norm() < 1e-5 * expected.norm()
    assert (latents - exact.encoder(images.double())).norm() < 1e-5 * latents.norm()
    layers = [layer for layer in autoencoder.modules() if isinstance(layer, WinogradConv2d)]
    assert len(layers) == 26
    assert {layer.packed is None for layer in layers} == {LIBRARY is None}


def test_norm_groups_0_builds_no_normalisation():
    assert norms_of(0) == []


def test_widths_that_the_norm_groups_do_not_divide_use_the_most_that_do():
    norms = norms_of(8)
    assert {norm.num_groups for norm in norms} == {4, 8}  # of 12 and of 24 channels
    assert all(norm.num_groups == math.gcd(8, norm.num_channels) and norm.eps == 1e-6 for norm in norms)


def test_dropout_acts_in_training_only():
    autoencoder = ConvolutionalAutoencoder(3, 4, base_channels=8, dropout=0.5)
    for parameter in autoencoder.parameters():  # residual blocks start as their shortcut, without a trace of dropout
        nn.init.normal_(parameter)
    images = torch.rand(1, 3, 8, 8)
    assert not torch.equal(autoencoder.train().encoder(images), autoencoder.encoder(images))
    assert torch.equal(autoencoder.eval().encoder(images), autoencoder.encoder(images))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"codebook_dim": 0}, "codebook_dim=0 must be at least 1"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"base_channels": 0}, "base_channels=0 must be at least 1"),
        ({"channel_multipliers": []}, r"channel_multipliers=\[\] must hold one number >= 1 per level"),
        ({"channel_multipliers": [1, 0]}, r"channel_multipliers=\[1, 0\] must hold one number >= 1 per level"),
        ({"num_res_blocks": 0}, "num_res_blocks=0 must be at least 1"),
        ({"attention_levels": [3]}, r"attention_levels=\[3\] must lie in 0..2, one index per entry"),
        ({"attention_levels": [-1]}, r"attention_levels=\[-1\] must lie in 0..2"),
        ({"latent_channels": -8}, "latent_channels=-8 must be at least 1"),
        ({"norm_groups": -1}, "norm_groups=-1 must be at least 1, or 0 for no normalisation"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"dropout": math.nan}, r"dropout=nan must lie in \[0, 1\)"),
    ],
)
def test_each_impossible_hyperparameter_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ConvolutionalAutoencoder(**{"image_channels": 3, "codebook_dim": 4, "channel_multipliers": [1, 2, 4]} | wrong)
