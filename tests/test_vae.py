"""ImageVAE: images to latents and back, samples, refusals, saving; its doors are those of the tokenizer."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import TINY_AUTOENCODER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tokenizer import POSTERIORS, ImageTokenizer, ImageVAE, VAEConfig
from tokenizer.posteriors.normal import noise_of

ANY_SIZE = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vae_of(seed: int = 0, **changes) -> ImageVAE:
    """Random weights everywhere: residual blocks start at zero."""
    torch.manual_seed(seed)
    model = ImageVAE(VAEConfig(**{"latent_dim": 4, "autoencoder": TINY_AUTOENCODER} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=sorted(POSTERIORS))
def vae(request) -> ImageVAE:
    return vae_of(posterior={"name": request.param})


def images_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape or (3, 3, 12, 20), generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@ANY_SIZE
@given(batch=st.integers(1, 3), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_divisible_size_goes_to_its_grid_and_back_to_the_bit(vae, batch, height, width, seed):
    images = images_of(seed, batch, 3, 2 * height, 2 * width)
    output, latents = vae(images), vae.encode(images)
    assert latents.shape == output.log_variance.shape == (batch, 4, height, width)
    assert latents.dtype == output.reconstructions.dtype == torch.float32
    assert torch.equal(latents, output.latents)
    assert torch.equal(latents, output.mean)
    pictures = vae.decode(latents)
    assert torch.equal(pictures, output.reconstructions.clamp(0, 1))
    assert vae.grid_size((2 * height, 2 * width)) == (height, width)


def test_the_same_image_gives_the_same_latents_whatever_the_batch_around_it(vae):
    images = images_of(5, 6, 3, 12, 20)
    alone = torch.cat([vae.encode(image) for image in images])
    assert torch.equal(vae.encode(images), alone)


def test_pil_images_arrays_and_tensors_give_the_same_latents(vae):
    array = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    latents = vae.encode(Image.fromarray(array))
    assert torch.equal(vae.encode(array), latents)
    assert torch.equal(vae.encode(torch.from_numpy(array).permute(2, 0, 1)), latents)
    assert vae.encode(Image.fromarray(array), resize=8).shape == (1, 4, 4, 4)


def test_a_draw_has_the_posteriors_moments_and_its_generator_repeats_it(vae):
    image = images_of(1, 1, 3, 4, 4)
    mean, log_variance = vae.moments(image)
    draws = vae.encode(image.expand(1000, 3, 4, 4), sample=True, generator=seeded())
    error = (0.5 * log_variance).exp() / 1000**0.5
    assert ((draws.mean(0) - mean[0]).abs() < 5 * error[0]).all()
    torch.testing.assert_close(draws.var(0).log(), log_variance[0], rtol=0, atol=0.25)
    assert torch.equal(vae.encode(image, True, generator=seeded()), vae.encode(image, True, generator=seeded()))
    assert not torch.equal(vae.encode(image, True), vae.encode(image, True))


def test_samples_are_decoded_draws_of_the_prior_of_any_size(vae):
    drawn = vae.sample(3, image_size=(8, 12), generator=seeded())
    assert drawn.shape == (3, 3, 8, 12)
    assert torch.equal(drawn, vae.decode(vae.posterior.draw(3, (4, 6), noise_of(seeded()))))
    assert vae.sample(1, 6).shape == (1, 3, 6, 6)
    with pytest.raises(ValueError, match="image_size=7 must be a positive multiple of downsample_factor=2"):
        vae.sample(1, image_size=7)
    with pytest.raises(ValueError, match="num_samples=0 must be a whole number, at least 1"):
        vae.sample(0, image_size=8)


def test_the_loss_is_the_kl_in_nats_per_dimension(vae):
    for images in (images_of(1, 2, 3, 8, 8), images_of(1, 2, 3, 4, 12)):
        output = vae(images)
        expected = sum(level.kl.sum() for level in output.levels) / images.numel()
        torch.testing.assert_close(output.losses["kl"], expected)


def test_forward_gives_a_gradient_to_every_parameter(vae):
    output = vae.train()(images_of(1))
    ((output.reconstructions - images_of(1)).square().mean() + sum(output.losses.values())).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_encoding_decoding_and_sampling_in_training_mode_change_nothing(vae):
    images, expected, before = images_of(1), vae.encode(images_of(1)), copy.deepcopy(vae.state_dict())
    vae.train()
    assert torch.equal(vae.encode(images), expected)
    assert not vae.sample(1, 8).requires_grad
    assert vae.posterior.pending_kl is None
    assert all(module.training for module in vae.modules())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


@torch.no_grad()
def test_forward_compiles_into_one_graph(vae):
    images = images_of(1, 2, 3, 8, 12)
    compiled = torch.compile(vae, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).reconstructions, vae(images).reconstructions)


def test_in_a_bfloat16_model_latents_and_kl_stay_float32(vae):
    output = vae.to(torch.bfloat16)(images_of(1))
    assert output.latents.dtype == output.losses["kl"].dtype == output.reconstructions.dtype == torch.float32
    assert torch.equal(vae.decode(vae.encode(images_of(1))), output.reconstructions.clamp(0, 1))


def test_the_fast_mode_gives_float32_latents_and_pictures_near_those_of_before(vae):
    latents, pictures = vae.encode(images_of(1)), vae(images_of(1)).reconstructions.clamp(0, 1)
    found, decoded = vae.fast().encode(images_of(1)), vae.decode(latents)
    assert found.dtype == decoded.dtype == torch.float32
    torch.testing.assert_close(found, latents, rtol=0.02, atol=0.02)
    torch.testing.assert_close(decoded, pictures, rtol=0, atol=0.05)
    assert not torch.equal(decoded, pictures)


ZEROS = torch.zeros(1, 4, 2, 2)
REFUSED = {
    "integers": (ZEROS.long(), r"torch.int64; the rule is a float tensor \(B, 4, h, w\)"),
    "array": (np.zeros((1, 4, 2, 2)), "ndarray; the rule is a float tensor"),
    "other channels": (ZEROS[:, :3], r"shape \(1, 3, 2, 2\); the rule is \(B, 4, h, w\)"),
    "flat": (ZEROS[0, 0], r"shape \(2, 2\); the rule is"),
    "empty": (ZEROS[:0], "none of them 0"),
    "NaN": (ZEROS + torch.nan, "hold NaN or infinity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_are_no_latents_is_refused(vae, case):
    latents, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        vae.decode(latents)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 8, 8), "have 1 channels and this model takes 3"),
        (torch.zeros(1, 3, 9, 8), "9 x 8 .* divisible by 2"),
        (torch.zeros(1, 3, 8, 8).byte(), "torch.uint8; forward takes floats"),
    ],
)
def test_forward_refuses_what_has_no_grid(vae, images, message):
    with pytest.raises(ValueError, match=message):
        vae(images)


def test_a_saved_model_comes_back_with_its_fingerprints_and_by_no_other_name(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    loaded = ImageVAE.from_pretrained(tmp_path / "vae")
    assert torch.equal(loaded.encode(images_of(1)), vae.encode(images_of(1)))
    assert torch.equal(loaded.sample(2, 8, seeded()), vae.sample(2, 8, seeded()))
    assert (loaded.fingerprint, loaded.decoder_fingerprint) == (vae.fingerprint, vae.decoder_fingerprint)
    assert loaded.config == vae.config
    values = json.loads((tmp_path / "vae/config.json").read_text())
    assert values["model"] == "ImageVAE"
    weights, own = {"beta": 1.0, "warmup": 0.0, "free_bits": 0.0, "kl_target": None}, values["posterior"]
    assert (
        own == {"gaussian": {}, "ladder": {"num_levels": 2, "width": 64}}[own["name"]] | {"name": own["name"]} | weights
    )
    assert "autoencoder.encoder.to_codes.weight" in load_file(tmp_path / "vae/model.safetensors")
    with pytest.raises(ValueError, match="model of class ImageVAE; load it with ImageVAE.from_pretrained"):
        ImageTokenizer.from_pretrained(tmp_path / "vae")


def test_another_decoder_leaves_the_fingerprint_as_it_is(vae):
    before = vae.fingerprint, vae.decoder_fingerprint
    with torch.no_grad():
        vae.autoencoder.decoder.head[2].bias += 1
    assert vae.fingerprint == before[0]
    assert vae.decoder_fingerprint != before[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0 must be at least 1"),
        ({"posterior": {"name": "gauss"}}, "posterior.name='gauss' must be one of gaussian"),
        ({"posterior": {"name": "gaussian", "kl_targets": 3}}, "did you mean 'kl_target'"),
        ({"posterior": {"name": "gaussian", "beta": "1"}}, "posterior.beta='1' must be of type float"),
        ({"autoencoder": {"name": "convolutional", "num_moments": 2}}, "unknown key 'num_moments' in autoencoder"),
        ({"image_channels": 4}, r"image_channels=4 must be 3 \(RGB\) or 1 \(grey\)"),
    ],
)
def test_a_config_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**wrong)
