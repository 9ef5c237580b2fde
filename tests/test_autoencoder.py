"""The network: the arithmetic of VQGAN as diffusers has it, its shapes, and what its layout refuses."""

import math

import pytest
import torch
from conftest import TINY_AUTOENCODER, tiny_config
from torch import nn

from tokenizer import ImageTokenizer, TokenizerConfig
from tokenizer.autoencoder import ConvolutionalAutoencoder
from tokenizer.images import to_model_range

VQModel = pytest.importorskip("diffusers").VQModel


def vq_model(widths: list[int], attention_levels: list[int], **options) -> nn.Module:
    """diffusers' VQModel with attention at these levels, 0 being the full resolution."""
    attends = [index in attention_levels for index in range(len(widths))]
    return VQModel(
        block_out_channels=widths,
        down_block_types=["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attends],
        up_block_types=["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(attends)],
        **options,
    )


def names_from_diffusers(num_levels: int, num_blocks: int, attention_levels: list[int], middle: bool) -> dict[str, str]:
    """Name of a layer in VQModel -> its name in ConvolutionalAutoencoder."""
    names = {"quant_conv": "encoder.to_codes", "post_quant_conv": "decoder.from_codes"}
    for side, count in [("encoder", num_blocks), ("decoder", num_blocks + 1)]:
        residual, attention = {}, {}
        residual |= {f"{side}.mid_block.resnets.{j}": f"{side}.middle.{j * (2 if middle else 1)}" for j in range(2)}
        attention |= {f"{side}.mid_block.attentions.0": f"{side}.middle.1"} if middle else {}
        for index in range(num_levels):
            # Their decoder counts its levels from the lowest resolution, ours everywhere from the full one.
            theirs = (
                f"encoder.down_blocks.{index}" if side == "encoder" else f"decoder.up_blocks.{num_levels - 1 - index}"
            )
            ours, stride = f"{side}.level_{index}", 2 if index in attention_levels else 1
            residual |= {f"{theirs}.resnets.{j}": f"{ours}.{j * stride}" for j in range(count)}
            if index in attention_levels:
                attention |= {f"{theirs}.attentions.{j}": f"{ours}.{2 * j + 1}" for j in range(count)}
            names[f"{theirs}.downsamplers.0.conv"] = f"encoder.downsample_{index + 1}.conv"
            names[f"{theirs}.upsamplers.0.conv"] = f"decoder.upsample_{index}.conv"
        for theirs, ours in residual.items():
            names |= {f"{theirs}.{layer}": f"{ours}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2")}
            names[f"{theirs}.conv_shortcut"] = f"{ours}.shortcut"
        layers = {"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "project"}
        for theirs, ours in attention.items():
            names |= {f"{theirs}.{theirs_in}": f"{ours}.{ours_in}" for theirs_in, ours_in in layers.items()}
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_norm_out": f"{side}.head.0"}
        names[f"{side}.conv_out"] = f"{side}.head.2"
    return names


@pytest.fixture(
    params=[
        {"attention_levels": [1], "middle": True},
        {"attention_levels": [], "middle": False},
        {"attention_levels": [0, 2], "middle": False},
    ],
    ids=["as in VQGAN", "no attention", "attention at two levels"],
)
def pair(request):
    """A VQModel with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    attention_levels, middle = request.param["attention_levels"], request.param["middle"]
    reference = vq_model(
        [8, 16, 24],
        attention_levels,
        mid_block_add_attention=middle,
        layers_per_block=2,
        latent_channels=6,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms and biases too, which start at 1 and 0
            parameter.add_(0.1 * torch.randn_like(parameter))
        reference.quantize.embedding.weight.normal_()
    autoencoder = TINY_AUTOENCODER | {
        "channel_multipliers": [1, 2, 3],
        "num_res_blocks": 2,
        "attention_levels": attention_levels,
        "middle_attention": middle,
        "latent_channels": 6,
    }
    ours = ImageTokenizer(
        tiny_config(autoencoder=autoencoder, quantizer={"name": "ema_vq", "codebook_size": 32})
    ).eval()
    names = names_from_diffusers(3, 2, attention_levels, middle)
    weights, shapes = {}, ours.autoencoder.state_dict()
    for name, tensor in reference.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer != "quantize.embedding":
            weights[f"{names[layer]}.{kind}"] = tensor.reshape(shapes[f"{names[layer]}.{kind}"].shape)
    ours.autoencoder.load_state_dict(weights)  # strict: the mapping leaves nothing out on either side
    ours.quantizer.ema_sum.copy_(reference.quantize.embedding.weight.detach())
    ours.quantizer.ema_count.fill_(1.0)
    return reference, ours


def test_diffusers_vq_model_is_a_special_case_with_the_same_arithmetic(pair):
    reference, ours = pair
    images = torch.rand(2, 3, 20, 28)
    with torch.no_grad():
        latents = reference.encode(to_model_range(images)).latents
        torch.testing.assert_close(ours.encode_latents(images), latents, rtol=1e-5, atol=1e-5)
        _, _, (_, _, indices) = reference.quantize(latents)
        tokens = ours.encode(images)
        assert torch.equal(tokens.flatten(), indices)
        assert tokens.unique().numel() > 3
        decoded = reference.decode(latents).sample
        torch.testing.assert_close(ours(images).reconstructions, (decoded + 1) / 2, rtol=1e-5, atol=1e-5)


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


def norms_of(norm_groups: int) -> list[nn.GroupNorm]:
    layout = {"base_channels": 12, "channel_multipliers": [1, 2], "attention_levels": [1], "middle_attention": True}
    autoencoder = ConvolutionalAutoencoder(3, 4, latent_channels=8, norm_groups=norm_groups, **layout)
    return [module for module in autoencoder.modules() if isinstance(module, nn.GroupNorm)]


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
