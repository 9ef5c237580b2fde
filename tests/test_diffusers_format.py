"""A VQModel of diffusers, read from its folder, makes the same tokens and pictures; every other folder is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import VQModel, random_vq_model
from safetensors.torch import load_file, save_file

from tokenizer import ImageTokenizer
from tokenizer.diffusers_format import DEFAULTS, OLDER_ATTENTION, WEIGHTS_NAME

VQGAN = {
    "widths": [8, 16, 24],
    "attention_levels": [1],
    "layers_per_block": 2,
    "latent_channels": 6,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 32,
    "norm_num_groups": 4,
}
LAYOUTS = {
    "as in VQGAN": VQGAN,
    "no attention": VQGAN | {"attention_levels": [], "mid_block_add_attention": False},
    "attention at two levels": VQGAN | {"attention_levels": [0, 2], "mid_block_add_attention": False},
    "attention in the middle alone": VQGAN | {"attention_levels": [], "layers_per_block": 1},
    "one level, codes as wide as the latents": VQGAN | {"widths": [8], "attention_levels": [], "vq_embed_dim": None},
    "grey pictures": VQGAN | {"in_channels": 1, "out_channels": 1, "act_fn": "swish"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    random_vq_model(**VQGAN).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """The folder of a VQModel that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "vqvae"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def their_tokens(model: VQModel, pixels: torch.Tensor) -> torch.Tensor:
    latents = model.encode(pixels).latents
    return model.quantize(latents)[2][2].view(len(pixels), *latents.shape[2:])


def assert_alike(model: VQModel, ours: ImageTokenizer, low: float, high: float, channels: int = 3) -> None:
    """The same tokens of the same pictures, and from them the same pictures."""
    images = torch.rand(2, channels, 20, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = their_tokens(model, images * (high - low) + low)
        tokens = ours.encode(images)
        assert torch.equal(tokens, expected)
        assert tokens.unique().numel() > 3
        codes = model.quantize.embedding(expected).movedim(-1, 1)
        decoded = (model.decode(codes, force_not_quantize=True).sample - low) / (high - low)
    torch.testing.assert_close(ours(images).reconstructions, decoded, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.decode(tokens), decoded.clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_equal_and_pictures_to_1e_4(layout, tmp_path):
    model = random_vq_model(**LAYOUTS[layout])
    model.save_pretrained(tmp_path)
    ours = ImageTokenizer.from_diffusers(tmp_path, (-1, 1))
    assert not ours.training
    assert_alike(model, ours, -1.0, 1.0, channels=model.config.in_channels)


@pytest.mark.parametrize("pixel_range", [(0.0, 1.0), (-0.5, 2.0)])
def test_the_network_sees_pixels_in_the_range_that_is_given(folder, pixel_range):
    assert_alike(VQModel.from_pretrained(folder), ImageTokenizer.from_diffusers(folder, pixel_range), *pixel_range)


def test_what_was_read_survives_saving_and_loading(folder, tmp_path):
    ours = ImageTokenizer.from_diffusers(folder, (0, 1))
    ours.save_pretrained(tmp_path / "ours")
    again = ImageTokenizer.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert again.config.pixel_range == [0.0, 1.0]
    assert (again.fingerprint, again.decoder_fingerprint) == (ours.fingerprint, ours.decoder_fingerprint)
    assert_alike(VQModel.from_pretrained(folder), again, 0.0, 1.0)


def test_training_goes_on_with_their_losses_and_moves_no_code_but_by_gradient(folder):
    model, ours = VQModel.from_pretrained(folder), ImageTokenizer.from_diffusers(folder, (-1, 1)).train()
    latents = torch.randn(2, 4, 5, 7, requires_grad=True)
    quantized, loss, (_, _, indices) = model.quantize(latents)
    output = ours.quantizer(latents)
    assert torch.equal(output.indices.flatten(), indices)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(sum(output.losses.values()), loss)
    theirs = torch.autograd.grad(loss, [latents, model.quantize.embedding.weight])
    found = torch.autograd.grad(sum(output.losses.values()), [latents, ours.quantizer.codes.weight])
    torch.testing.assert_close(found, theirs)
    before = ours.quantizer.codebook.clone()
    for _ in range(60):
        ours.quantizer(torch.zeros(1, 4, 2, 2))  # all but one code go unused
        assert not ours.quantizer.step(1.0)
    assert torch.equal(ours.quantizer.codebook, before)


def test_a_config_that_lacks_keys_takes_the_defaults_of_diffusers(tmp_path):
    defaults = json.loads(VQModel().to_json_string())
    assert {key: value for key, value in defaults.items() if not key.startswith("_")} == DEFAULTS
    model = VQModel(num_vq_embeddings=64)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", "num_vq_embeddings": 64}))
    assert_alike(model.eval(), ImageTokenizer.from_diffusers(tmp_path, (0, 1)), 0.0, 1.0)


def test_older_names_of_attention_are_read_as_diffusers_reads_them(folder):
    path = folder / WEIGHTS_NAME
    before, tensors = load_file(path), {}
    for name, tensor in before.items():
        for older, newer in OLDER_ATTENTION.items():
            name = name.replace(f".{newer}.", f".{older}.") if ".attentions." in name else name
        tensors[name] = tensor
    assert len(tensors.keys() - before.keys()) == 4 * 2 * (2 + 3 + 2)  # of encoder, decoder and both middles
    save_file(tensors, path, metadata={"format": "pt"})
    assert_alike(VQModel.from_pretrained(folder), ImageTokenizer.from_diffusers(folder, (-1, 1)), -1.0, 1.0)


def test_weights_of_half_precision_are_read_as_float32(folder):
    path = folder / WEIGHTS_NAME
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    ours = ImageTokenizer.from_diffusers(folder, (-1, 1))
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32, torch.int64}
    assert_alike(VQModel.from_pretrained(folder).float(), ours, -1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes a model of class AutoencoderKL; .* diffusers' VQModel alone"),
        ({"norm_type": "spatial"}, "norm_type='spatial' of a VQModel must be 'group', .* use diffusers"),
        ({"act_fn": "gelu"}, "act_fn='gelu' of a VQModel must be 'silu', .* use diffusers"),
        ({"out_channels": 1}, "out_channels=1 of a VQModel must be in_channels=3"),
        ({"in_channels": 4, "out_channels": 4}, r"image_channels=4 must be 3 \(RGB\) or 1"),
        ({"block_out_channels": [8, 12, 24]}, r"block_out_channels=\[8, 12, 24\] .* multiples of the first"),
        ({"block_out_channels": [8, 16]}, r"down_block_types=.* for each of block_out_channels=\[8, 16\]"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "down_block_types=.* must name DownEncoderBlock2D or Attn"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types=.* must be .*: attention at the same levels"),
        ({"vq_embed_dims": 4}, "unknown key 'vq_embed_dims' in .*config.json; did you mean 'vq_embed_dim'"),
        ({"layers_per_block": "2"}, "autoencoder.num_res_blocks='2' must be of type int"),
    ],
)
def test_another_architecture_is_refused_with_the_value_and_the_rule(folder, changes, message):
    rewrite(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.from_diffusers(folder, (-1, 1))


@pytest.mark.parametrize("pixel_range", [(1, -1), (0,), (0, 1, 2), (0, 0), (0, float("inf")), (float("nan"), 1)])
def test_a_range_that_is_none_is_refused(folder, pixel_range):
    with pytest.raises(ValueError, match=r"pixel_range=\[.*\] must be what black and white are, such as \[-1, 1\]"):
        ImageTokenizer.from_diffusers(folder, pixel_range)


def test_a_range_must_be_given_because_no_file_tells_it(folder):
    with pytest.raises(TypeError, match="pixel_range"):
        ImageTokenizer.from_diffusers(folder)


def test_missing_extra_and_misshapen_tensors_are_refused_by_their_names(folder):
    path = folder / WEIGHTS_NAME
    whole = load_file(path)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    cases = {
        f"1 tensors missing .*{name}": {key: value for key, value in whole.items() if key != name},
        r"1 not expected \['encoder.extra'\]": whole | {"encoder.extra": torch.zeros(1)},
        r"1 not expected \['decoder.attentions.0.odd'\]": whole | {"decoder.attentions.0.odd": torch.zeros(1)},
        r"quant_conv.bias has shape \(5,\) where config.json says \(4,\)": whole | {"quant_conv.bias": torch.zeros(5)},
        f"{name} has shape .*": whole | {name: torch.zeros(16)},
        r"1 not expected .*query": whole | {name.replace("to_q", "query"): whole[name].clone()},
    }
    for message, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            ImageTokenizer.from_diffusers(folder, (-1, 1))
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        ImageTokenizer.from_diffusers(folder, (-1, 1))


def test_missing_files_and_what_is_no_config_are_named(folder, tmp_path):
    (folder / WEIGHTS_NAME).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="has no diffusion_pytorch_model.safetensors; .*save_pretrained"):
        ImageTokenizer.from_diffusers(folder, (-1, 1))
    with pytest.raises(FileNotFoundError, match="elsewhere has no config.json; pass the folder of a VQModel"):
        ImageTokenizer.from_diffusers(tmp_path / "elsewhere", (-1, 1))
    for text in ("[]", "{"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="is not the config of a diffusers model"):
            ImageTokenizer.from_diffusers(folder, (-1, 1))


def test_the_weights_are_copies_that_a_change_of_the_file_cannot_reach(folder):
    ours = ImageTokenizer.from_diffusers(folder, (-1, 1))
    before = ours.fingerprint
    path = folder / WEIGHTS_NAME
    path.write_bytes(bytes(path.stat().st_size))
    assert ours.fingerprint == before


def test_the_range_is_part_of_what_makes_tokens_and_of_what_makes_pictures(folder):
    unit, signed = (ImageTokenizer.from_diffusers(folder, each) for each in [(0, 1), (-1, 1)])
    assert unit.fingerprint != signed.fingerprint
    assert unit.decoder_fingerprint != signed.decoder_fingerprint
