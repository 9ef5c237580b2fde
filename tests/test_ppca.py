"""The ELBO against a likelihood that is known exactly: probabilistic PCA, by EM and as a linear ImageVAE."""

import functools
import itertools
import math

import pytest
import torch
from em_view import draw, generated, half_steps, table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ppca import ProbabilisticPCA, Responsibilities
from torch import nn

from tokenizer import ImageVAE, VAEConfig
from tokenizer.autoencoder import AUTOENCODERS
from tokenizer.posteriors.normal import gaussian_kl
from train.losses import gaussian_nats

SIDE, NUM_LATENTS, NUM_IMAGES = 4, 2, 300


# EM: two ways to raise one bound.


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_each_e_step_touches_the_likelihood_and_leaves_it_and_each_m_step_raises_both(seed):
    told = half_steps(generated(seed), num_rounds=6, seed=seed + 1)
    for before, after in itertools.pairwise(told):
        assert after.elbo >= before.elbo - 1e-9
        assert after.elbo <= after.log_likelihood + 1e-9
        if after.name == "E":
            assert after.elbo == pytest.approx(after.log_likelihood, abs=1e-9)
            assert after.log_likelihood == pytest.approx(before.log_likelihood, abs=1e-9)
        else:
            assert after.log_likelihood >= before.log_likelihood - 1e-9
    assert table(told).count("\n") == len(told)


def test_the_two_curves_are_drawn(tmp_path):
    draw(tmp_path / "plots" / "em.png", half_steps(generated(), num_rounds=3), best=-9.5)
    with Image.open(tmp_path / "plots" / "em.png") as plot:
        assert plot.size == (700, 400)


def test_em_comes_to_the_closed_maximum_of_the_likelihood():
    data = generated()
    best = ProbabilisticPCA.at_the_maximum(data, NUM_LATENTS).log_likelihood(data)
    told = half_steps(data, num_rounds=300)
    assert told[-1].log_likelihood == pytest.approx(best, abs=1e-6)
    assert all(each.log_likelihood <= best + 1e-9 for each in told)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.01, 2))
def test_under_any_other_posterior_the_elbo_lies_below_by_the_kl_between_the_two(seed, size):
    data, generator = generated(), torch.Generator().manual_seed(seed)
    model = ProbabilisticPCA.at_the_maximum(data, NUM_LATENTS)
    exact = model.e_step(data)
    shift = size * torch.randn(exact.mean.shape, generator=generator).double()
    scale = torch.eye(NUM_LATENTS).double() + size * torch.rand(NUM_LATENTS, NUM_LATENTS, generator=generator).double()
    other = Responsibilities(exact.mean + shift, scale @ exact.covariance @ scale.T)
    normal = torch.distributions.MultivariateNormal
    gap = torch.distributions.kl_divergence(normal(other.mean, other.covariance), normal(exact.mean, exact.covariance))
    assert model.log_likelihood(data) - model.elbo(data, other) == pytest.approx(gap.mean().item(), rel=1e-6, abs=1e-9)


# The same model as an ImageVAE: a linear encoder and decoder, and the likelihood of 8-bit pixels.


class LinearAutoencoder(nn.Module):
    """Pictures of 4 x 4 pixels to one latent position and back, by a matrix and an offset each."""

    downsample_factor = SIDE

    def __init__(self, image_channels: int, codebook_dim: int, *, num_moments: int = 1):
        super().__init__()
        num_pixels = image_channels * SIDE**2
        self.encoder = nn.Sequential(nn.PixelUnshuffle(SIDE), nn.Conv2d(num_pixels, num_moments * codebook_dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(codebook_dim, num_pixels, 1), nn.PixelShuffle(SIDE))


@pytest.fixture(autouse=True, scope="module")
def linear_in_the_table():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUTOENCODERS, "linear", LinearAutoencoder)
        yield


def linear_vae() -> ImageVAE:
    torch.manual_seed(0)
    return ImageVAE(VAEConfig(image_channels=1, latent_dim=NUM_LATENTS, autoencoder={"name": "linear"}))


@functools.cache
def pictures() -> torch.Tensor:
    """8-bit grey pictures (N, 1, 4, 4) of a linear Gaussian model, far from black and white."""
    generator = torch.Generator().manual_seed(0)
    loadings = 0.18 * (torch.rand(NUM_LATENTS, SIDE**2, generator=generator) - 0.5)
    latents = torch.randn(NUM_IMAGES, NUM_LATENTS, generator=generator)
    pixels = latents @ loadings + 0.04 * torch.randn(NUM_IMAGES, SIDE**2, generator=generator) + 0.5
    assert 0.02 < pixels.min() < pixels.max() < 0.98
    return ((255 * pixels).round() / 255).view(-1, 1, SIDE, SIDE)


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).double()


def log_likelihood(model: ProbabilisticPCA, images: torch.Tensor) -> float:
    """Mean log-probability of the 8-bit pictures: the density times the width of a grey level, for each pixel."""
    return model.log_likelihood(flat(images)) - SIDE**2 * math.log(255)


@torch.no_grad()
def set_to(vae: ImageVAE, model: ProbabilisticPCA) -> None:
    """Give the decoder the model's loadings and mean, and the encoder the best posterior with independent latents."""
    (encoder, decoder), q = (vae.autoencoder.encoder[1], vae.autoencoder.decoder[0]), NUM_LATENTS
    precision = model.loadings.T @ model.loadings + model.variance * torch.eye(q).double()
    reading = torch.linalg.inv(precision) @ model.loadings.T  # (q, d), latents from centred pixels
    # Pixels are in [0, 1] here and in [-1, 1] inside.
    decoder.weight.copy_(2 * model.loadings[..., None, None])
    decoder.bias.copy_(2 * model.mean - 1)
    encoder.weight[:q].copy_(reading[..., None, None] / 2)
    encoder.bias[:q].copy_(reading @ (0.5 - model.mean))
    encoder.weight[q:].zero_()
    encoder.bias[q:].copy_((model.variance / precision.diagonal()).log())


@torch.no_grad()
def elbo(vae: ImageVAE, images: torch.Tensor, variance: torch.Tensor) -> float:
    """In nats per image. Where the decoder is linear, 2 q points around the mean give the expectation exactly."""
    mean, log_variance = vae.moments(images)
    steps = NUM_LATENTS**0.5 * (0.5 * log_variance).exp() * torch.eye(NUM_LATENTS).view(-1, 1, NUM_LATENTS, 1, 1)
    nats = [
        gaussian_nats(images, vae.decode_latents(mean + sign * step), variance.float().sqrt()).sum((1, 2, 3)).mean()
        for step in steps
        for sign in (1, -1)
    ]
    return (-sum(nats) / len(nats) - gaussian_kl(mean, log_variance).sum((1, 2, 3)).mean()).item()


def test_where_the_encoder_is_the_exact_posterior_the_elbo_is_the_log_likelihood():
    vae, images = linear_vae(), pictures()
    model = ProbabilisticPCA.at_the_maximum(flat(images), NUM_LATENTS)  # principal axes: latents independent given x
    set_to(vae, model)
    exact = log_likelihood(model, images)
    assert elbo(vae, images, model.variance) == pytest.approx(exact, abs=0.01)

    repeated = images.repeat(100, 1, 1, 1)
    torch.manual_seed(0)  # and so is the negative loss of a training step, in the mean over its draws
    output = vae.train()(repeated)
    nats = gaussian_nats(repeated, output.reconstructions, model.variance.float().sqrt()).mean()
    assert -(SIDE**2) * (nats + output.losses["kl"]).item() == pytest.approx(exact, abs=0.05)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.05, 1))
def test_with_any_other_encoder_the_elbo_lies_below_it(seed, size):
    vae, images = linear_vae(), pictures()
    model = ProbabilisticPCA.at_the_maximum(flat(images), NUM_LATENTS)
    set_to(vae, model)
    tight, generator = elbo(vae, images, model.variance), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in vae.autoencoder.encoder[1].parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    assert elbo(vae, images, model.variance) < tight


def test_turned_latents_leave_the_gap_of_independent_latents():
    vae, images = linear_vae(), pictures()
    model = ProbabilisticPCA.at_the_maximum(flat(images), NUM_LATENTS)
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]]).double()
    turned = ProbabilisticPCA(model.loadings @ turn, model.mean, model.variance)
    exact = log_likelihood(turned, images)
    assert exact == pytest.approx(log_likelihood(model, images))  # the same model of pictures
    set_to(vae, turned)
    precision = turned.loadings.T @ turned.loadings + turned.variance * torch.eye(NUM_LATENTS).double()
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()
    assert gap > 0.05
    assert exact - elbo(vae, images, model.variance) == pytest.approx(gap, abs=0.01)


def test_trained_by_gradient_it_comes_to_the_maximum_of_the_likelihood_and_never_above():
    vae, images = linear_vae(), pictures()
    model = ProbabilisticPCA.at_the_maximum(flat(images), NUM_LATENTS)
    best, sigma = log_likelihood(model, images), model.variance.float().sqrt()
    optimizer, told = torch.optim.Adam(vae.train().parameters(), 0.2), []
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 400)
        optimizer.zero_grad()
        output = vae(images)
        (gaussian_nats(images, output.reconstructions, sigma).mean() + output.losses["kl"]).backward()
        optimizer.step()
        if step % 50 == 49:
            told.append(elbo(vae, images, model.variance))
    assert max(told) < best + 0.01
    assert told[-1] == pytest.approx(best, abs=0.15)
    assert told[-1] > log_likelihood(ProbabilisticPCA.at_the_maximum(flat(images), 1), images)  # with both latents
