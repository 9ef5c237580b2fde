"""The ladder of Gaussian latents: products of densities, the ELBO by Monte Carlo, and a model solved exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latents import latents_of
from test_ppca import (
    NUM_LATENTS,
    SIDE,
    ProbabilisticPCA,
    flat,
    linear_in_the_table,  # noqa: F401
    log_likelihood,
    pictures,
)

from tokenizer import ImageVAE, VAEConfig
from tokenizer.posteriors import LadderPosterior
from tokenizer.posteriors.ladder import product
from tokenizer.posteriors.normal import gaussian_log_density, noise_of
from train.losses import gaussian_nats

DIM = 3
DEVIATION = 0.6  # of p(z1|z2), whose mean is 0.8 z2: so that each z1 by itself is of N(0, 1)


def ladder(**changes) -> LadderPosterior:
    """With weights everywhere: residual blocks start at zero."""
    torch.manual_seed(0)
    made = LadderPosterior(DIM, **{"width": 8} | changes).train()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def encoded_of(seed: int, batch: int = 4, height: int = 4, width: int = 6) -> torch.Tensor:
    return latents_of(seed, batch, 4 * DIM, height, width)


@settings(max_examples=40, deadline=None)
@given(one=st.tuples(st.floats(-3, 3), st.floats(-9, 9)), other=st.tuples(st.floats(-3, 3), st.floats(-9, 9)))
def test_the_product_of_two_densities_is_proportional_to_theirs_multiplied(one, other):
    one, other = ([torch.full((1, 1, 1, 1), each).double() for each in pair] for pair in (one, other))
    mean, log_variance = product(one, other, training=True)
    places = mean + (0.5 * log_variance).exp() * torch.linspace(-3, 3, 7).double()
    offset = gaussian_log_density(places, *one) + gaussian_log_density(places, *other)
    offset = offset - gaussian_log_density(places, mean, log_variance)
    torch.testing.assert_close(offset, offset[..., :1].expand_as(offset), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_each_level_has_half_the_sides_of_the_one_below_rounded_up(num_levels):
    levels = ladder(num_levels=num_levels)(encoded_of(1, 2, 5, 12)).levels
    assert [level.mean.shape[2:] for level in levels] == [(5, 12), (3, 6), (2, 3), (1, 2)][:num_levels]
    assert all(level.mean.shape[:2] == (2, DIM) for level in levels)


@pytest.mark.parametrize("num_levels", [2, 3])
def test_a_level_is_the_product_of_what_the_image_says_and_its_prior_given_the_level_above(num_levels):
    posterior, encoded, asked = ladder(num_levels=num_levels), encoded_of(1), []
    levels = posterior.infer(encoded, lambda like: asked.append(torch.randn_like(like)) or asked[-1])
    seen, features = [encoded[:, : 2 * DIM]], encoded[:, 2 * DIM :]
    for upward in posterior.upward:
        told = upward(features)
        seen, features = [*seen, told[:, : 2 * DIM]], told[:, 2 * DIM :]
    above, prior_mean, prior_log_variance = None, torch.zeros(()), torch.zeros(())
    for index in reversed(range(num_levels)):
        mean, log_variance = seen[index].chunk(2, dim=1)
        if above is not None:
            prior_mean, prior_log_variance = posterior.downward[index](above, mean.shape[2:]).chunk(2, dim=1)
            precision, prior_precision = 1 / log_variance.exp(), 1 / prior_log_variance.exp()
            mean = (precision * mean + prior_precision * prior_mean) / (precision + prior_precision)
            log_variance = -(precision + prior_precision).log()
        torch.testing.assert_close(levels[index].mean, mean)
        torch.testing.assert_close(levels[index].log_variance, log_variance)
        torch.testing.assert_close(levels[index].prior_mean, prior_mean.expand_as(mean))
        torch.testing.assert_close(levels[index].prior_log_variance, prior_log_variance.expand_as(mean))
        above = mean + log_variance.exp().sqrt() * asked[num_levels - 1 - index]
        torch.testing.assert_close(levels[index].latents, above)


def test_draws_of_the_prior_go_from_level_to_level_through_the_learned_networks():
    posterior = ladder(num_levels=3)
    found = posterior.draw(2, (5, 6), noise_of(torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(2, DIM, 2, 2, generator=generator)
    for network, grid in [(posterior.downward[1], (3, 3)), (posterior.downward[0], (5, 6))]:
        mean, log_variance = network(expected, grid).chunk(2, dim=1)
        expected = mean + log_variance.exp().sqrt() * torch.randn(2, DIM, *grid, generator=generator)
    torch.testing.assert_close(found, expected)


def log_ratio(levels) -> torch.Tensor:
    """log q(z|x) - log p(z) of the latents drawn, in nats per image (B,)."""
    return sum(
        (
            gaussian_log_density(level.latents, level.mean, level.log_variance)
            - gaussian_log_density(level.latents, level.prior_mean, level.prior_log_variance)
        ).sum((1, 2, 3))
        for level in levels
    )


@torch.no_grad()
def test_the_kl_is_the_monte_carlo_mean_of_the_log_ratio_of_all_levels():
    posterior, encoded = ladder(), encoded_of(1, 1, 2, 2).expand(20_000, -1, -1, -1)
    torch.manual_seed(0)
    output = posterior(encoded)
    ratios, kl = log_ratio(output.levels), sum(level.kl.sum((1, 2, 3)) for level in output.levels)
    error = (ratios - kl).std() / len(ratios) ** 0.5
    assert abs((ratios - kl).mean()) < 4 * error
    assert kl.std() < 0.6 * ratios.std()  # what the closed form is for
    torch.testing.assert_close(output.losses["kl"], kl.mean())


def test_reconstruction_and_kl_each_give_every_level_a_gradient():
    for term in (lambda output: output.latents.square().sum(), lambda output: output.losses["kl"]):
        posterior, encoded = ladder(num_levels=3), encoded_of(1).requires_grad_()
        term(posterior(encoded)).backward()
        assert all(each.grad.abs().sum() > 0 for each in (encoded, *posterior.parameters()))
        assert (encoded.grad.abs().sum((0, 2, 3)) > 0).all()


def test_a_posterior_that_knows_nothing_costs_nothing():
    encoded = encoded_of(1)
    encoded[:, DIM : 2 * DIM] = 30.0  # whatever mean it gives, its variance is enormous
    lowest, _ = ladder()(encoded).levels
    torch.testing.assert_close(lowest.mean, lowest.prior_mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(lowest.kl, torch.zeros_like(lowest.kl), rtol=0, atol=1e-6)


def test_extreme_encodings_stay_finite():
    encoded = torch.full((1, 4 * DIM, 2, 2), 200.0, requires_grad=True)
    output = ladder()(encoded)
    (output.losses["kl"] + output.latents.sum()).backward()
    assert output.losses["kl"].isfinite()
    assert encoded.grad.isfinite().all()


# Two levels, linear and Gaussian: z1 = 0.8 z2 + 0.6 noise, x = W z1 + mean + noise is probabilistic PCA in z1, and
# the posterior of a ladder is of just the form that the exact one has.


@torch.no_grad()
def solved(model: ProbabilisticPCA) -> ImageVAE:
    """A linear VAE whose two levels, prior and posterior, are those of the model."""
    q, gain = NUM_LATENTS, (1 - DEVIATION**2) ** 0.5
    posterior = {"name": "ladder", "width": 2 * q}
    vae = ImageVAE(VAEConfig(image_channels=1, latent_dim=q, autoencoder={"name": "linear"}, posterior=posterior))
    for parameter in vae.parameters():
        parameter.zero_()
    (encoder, decoder), one = (vae.autoencoder.encoder[1], vae.autoencoder.decoder[0]), torch.eye(q)
    decoder.weight.copy_(2 * model.loadings[..., None, None])  # pixels are in [0, 1] here and in [-1, 1] inside
    decoder.bias.copy_(2 * model.mean - 1)
    # Of z1 the image by itself says N(W^+ (x - mean), variance / |W|^2): the likelihood, without any prior.
    sizes = model.loadings.square().sum(0)  # W^T W is diagonal: the loadings lie on principal axes
    reading = model.loadings.T / sizes[:, None]
    for start in (0, 2 * q):  # as its own mean, and as the features for the level above
        encoder.weight[start : start + q].copy_(reading[..., None, None] / 2)
        encoder.bias[start : start + q].copy_(reading @ (0.5 - model.mean))
    noise = model.variance / sizes
    encoder.bias[q : 2 * q].copy_(noise.log())
    # Of z2: those features are 0.8 z2 + N(0, 0.36 + noise), and z2 is of N(0, 1).
    upward, downward, variance = vae.posterior.upward[0], vae.posterior.downward[0], DEVIATION**2 + noise
    upward[0].weight[:q, :q, 1, 1].copy_(one)
    upward[2].weight[:q, :q, 0, 0].copy_(torch.diag(gain / (gain**2 + variance)))
    upward[2].bias[q:].copy_((variance / (gain**2 + variance)).log())
    downward.conv_in.weight[:q, :, 1, 1].copy_(one)
    downward.conv_out.weight[:q, :q, 1, 1].copy_(gain * one)
    downward.conv_out.bias[q:].fill_(2 * math.log(DEVIATION))
    return vae.eval()


@torch.no_grad()
def elbo_of_draws(vae: ImageVAE, images: torch.Tensor, variance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """log p(x, z) - log q(z|x) of one draw of both levels for each image, nats (B,)."""
    levels = vae.levels(images, noise_of(torch.Generator().manual_seed(seed)))
    nats = gaussian_nats(images, vae.decode_latents(levels[0].latents), variance.float().sqrt()).sum((1, 2, 3))
    return -nats - log_ratio(levels)


@pytest.fixture(scope="module")
def model() -> ProbabilisticPCA:
    return ProbabilisticPCA.at_the_maximum(flat(pictures()), NUM_LATENTS)


def test_where_both_levels_are_exact_every_draw_gives_the_log_likelihood(model):
    vae, images = solved(model), pictures()
    exact = log_likelihood(model, images)
    found = [elbo_of_draws(vae, images, model.variance, seed) for seed in range(3)]
    for each in found:
        assert each.mean().item() == pytest.approx(exact, abs=0.01)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.01)  # whatever was drawn

    repeated = images.repeat(100, 1, 1, 1)
    torch.manual_seed(0)  # and so is the negative loss of a training step, in the mean over its draws
    output = vae.train()(repeated)
    nats = gaussian_nats(repeated, output.reconstructions, model.variance.float().sqrt()).mean()
    assert -(SIDE**2) * (nats + output.losses["kl"]).item() == pytest.approx(exact, abs=0.05)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.1, 0.5))
def test_with_any_other_posterior_of_either_level_the_elbo_lies_below_it(model, seed, size):
    images, exact = pictures(), log_likelihood(model, pictures())
    for number in (0, 1):
        vae, generator = solved(model), torch.Generator().manual_seed(seed)
        network = (vae.autoencoder.encoder[1], vae.posterior.upward[0][2])[number]
        with torch.no_grad():
            network.bias.add_(size * (0.5 + torch.rand(network.bias.shape, generator=generator)))
        assert elbo_of_draws(vae, images, model.variance).mean() < exact - 0.01


def test_samples_are_of_the_models_distribution(model):
    vae = solved(model)
    drawn = flat(vae.sample(4000, SIDE, torch.Generator().manual_seed(0)))
    found, expected = torch.cov(drawn.T), model.loadings @ model.loadings.T
    assert (found - expected).norm() < 0.1 * expected.norm()
    torch.testing.assert_close(drawn.mean(0), model.mean, rtol=0, atol=0.01)


def test_trained_by_gradient_it_comes_near_the_maximum_of_the_likelihood(model):
    torch.manual_seed(0)
    posterior = {"name": "ladder", "width": 4}
    config = VAEConfig(image_channels=1, latent_dim=NUM_LATENTS, autoencoder={"name": "linear"}, posterior=posterior)
    vae, images, sigma = ImageVAE(config).train(), pictures(), model.variance.float().sqrt()
    groups = [{"params": vae.autoencoder.parameters(), "lr": 0.2}, {"params": vae.posterior.parameters(), "lr": 0.01}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
    for _ in range(300):
        optimizer.zero_grad()
        output = vae(images)
        (gaussian_nats(images, output.reconstructions, sigma).mean() + output.losses["kl"]).backward()
        optimizer.step()
        schedule.step()
    found = torch.stack([elbo_of_draws(vae, images, model.variance, seed) for seed in range(4)]).mean().item()
    assert found == pytest.approx(log_likelihood(model, images), abs=0.3)
    assert found > log_likelihood(ProbabilisticPCA.at_the_maximum(flat(images), 1), images)  # with both latents


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_levels": 1}, "num_levels=1 must be at least 2; one level is the posterior 'gaussian'"),
        ({"width": 0}, "width=0 must be at least 1 channel"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
    ],
)
def test_impossible_hyperparameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        LadderPosterior(DIM, **wrong)
