"""Posterior collapse: its measures by hand and by Monte Carlo, and a tiny VAE that collapses and is cured."""

import math

import pytest
import torch

from tokenizer import ImageVAE, VAEConfig
from tokenizer.collapse import active_units, kl_per_channel, mutual_information
from tokenizer.posteriors.normal import gaussian_kl, gaussian_log_density
from train.losses import gaussian_nats

SIDE, NUM_PICTURES = 8, 64


def test_kl_per_channel_is_summed_over_positions_and_meant_over_images():
    mean, log_variance = torch.randn(2, 5, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = [sum(gaussian_kl(mean[n, d], log_variance[n, d]).sum().item() for n in range(5)) / 5 for d in range(3)]
    assert kl_per_channel(gaussian_kl(mean, log_variance)).tolist() == pytest.approx(expected, rel=1e-5)


def test_units_are_active_where_the_mean_varies_by_more_than_a_hundredth():
    signs = torch.tensor([1.0, -1.0]).repeat(50)[:, None]
    assert active_units(signs * torch.tensor([[1.0, 0.11, 0.09, 0.0]]) + 7).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="means of 1 images have no variance"):
        active_units(signs[:1])


def test_mutual_information_equals_the_plain_sum_over_all_pairs():
    mean, log_variance, noise = torch.randn(3, 6, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    latents = mean + (0.5 * log_variance).exp() * noise
    total = 0.0
    for i in range(6):
        densities = [gaussian_log_density(latents[i], mean[n], log_variance[n]).sum().exp().item() for n in range(6)]
        total += math.log(densities[i]) - math.log(sum(densities) / 6)
    assert mutual_information(mean, log_variance, latents) == pytest.approx(total / 6)


def test_mutual_information_is_nothing_after_collapse_and_log_n_where_no_two_images_look_alike():
    noise = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    collapsed = torch.zeros(40, 3, 2, 2)
    assert mutual_information(collapsed, collapsed, noise) == pytest.approx(0, abs=1e-9)
    apart = 100 * torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 2, 2)
    assert mutual_information(apart, collapsed, apart + noise) == pytest.approx(math.log(40))


def test_mutual_information_of_a_gaussian_channel_is_the_known_one():
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)).double()
    x = torch.special.ndtri((torch.arange(2000).double() + 0.5) / 2000)[:, None]  # the normal distribution, evenly
    signal, variance = 1.5, 0.25
    found = mutual_information(signal * x, torch.full_like(x, math.log(variance)), signal * x + variance**0.5 * noise)
    assert found == pytest.approx(0.5 * math.log(1 + signal**2 / variance), abs=0.05)


# A tiny VAE on generated pictures: a bright square at one of many places, in a grey of its own.


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((NUM_PICTURES, 1, SIDE, SIDE), 0.2)
    for image in images:
        top, left = torch.randint(0, SIDE - 3, (2,), generator=generator).tolist()
        image[:, top : top + 4, left : left + 4] = 0.4 + 0.6 * torch.rand((), generator=generator)
    return (255 * images).round() / 255


def trained(steps: int = 200, **posterior) -> tuple[ImageVAE, list[float]]:
    """The model after some steps at a fixed deviation, and the KL in nats per image of each step."""
    torch.manual_seed(0)
    network = {"name": "convolutional", "patch_size": 4, "base_channels": 16, "latent_channels": 16}
    config = VAEConfig(image_channels=1, latent_dim=2, autoencoder=network, posterior={"name": "gaussian"} | posterior)
    model, images, told = ImageVAE(config).train(), pictures(), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        output = model(images)
        nats = gaussian_nats(images, output.reconstructions, torch.tensor(0.1)).mean()
        (nats + sum(output.losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.posterior.step(step / steps)
        told.append(gaussian_kl(output.mean, output.log_variance).detach().sum((1, 2, 3)).mean().item())
    return model, told


def knowledge(model: ImageVAE) -> tuple[float, float]:
    """The share of active units, and the mutual information of picture and latents."""
    mean, log_variance = model.moments(pictures())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    information = mutual_information(mean, log_variance, mean + (0.5 * log_variance).exp() * noise)
    return active_units(mean).float().mean().item(), information


def test_a_weight_that_is_too_high_collapses_the_posterior():
    active, information = knowledge(trained(beta=100.0)[0])
    assert active == 0
    assert information < 0.1


@pytest.mark.parametrize("cure", [{"free_bits": 2.0, "beta": 100.0}, {"kl_target": 8.0}, {"beta": 1.0, "warmup": 0.5}])
def test_free_bits_or_a_target_or_the_elbo_with_warm_up_cure_it(cure):
    active, information = knowledge(trained(**cure)[0])
    assert active > 0.5
    assert information > 1.5


@pytest.mark.parametrize("target", [4.0, 10.0])
def test_the_kl_is_held_at_its_target(target):
    model, told = trained(steps=300, kl_target=target)
    assert sum(told[-80:]) / 80 == pytest.approx(target, rel=0.04)
    assert 0.85 * target < min(told[-80:]) < max(told[-80:]) < 1.15 * target
    assert model.posterior.kl_weight > 0
