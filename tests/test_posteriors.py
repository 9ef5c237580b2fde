"""The contract of every posterior in the table; the KL's closed form, its weights, and what is gathered for them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tokenizer import POSTERIORS
from tokenizer.posteriors import GaussianPosterior
from tokenizer.posteriors.base import MULTIPLIER_RATE
from tokenizer.posteriors.normal import draw_noise, gaussian_kl, gaussian_log_density, noise_of

DIM = 3


def encoded_of(seed: int, dim: int = DIM, num_moments: int = 2, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, num_moments * dim, 2, 5, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=sorted(POSTERIORS))
def posterior(request):
    return POSTERIORS[request.param](DIM).train()


# The contract, over every member of the table.


def test_shapes_and_types_are_those_of_the_contract(posterior):
    output = posterior(encoded_of(1, num_moments=posterior.num_moments).bfloat16())
    assert output.levels[0].latents.shape == (4, DIM, 2, 5)
    for level in output.levels:
        for each in (level.mean, level.log_variance, level.prior_mean, level.prior_log_variance, level.kl):
            assert each.shape == level.latents.shape
            assert each.dtype == torch.float32
    assert posterior.draw(3, (2, 5), torch.randn_like).shape == (3, DIM, 2, 5)
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 for loss in output.losses.values())


def test_training_draws_and_eval_mode_takes_the_mean(posterior):
    encoded = encoded_of(1, num_moments=posterior.num_moments)
    assert not torch.equal(posterior(encoded).latents, posterior(encoded).latents)
    output = posterior.eval()(encoded)
    assert all(torch.equal(level.latents, level.mean) for level in output.levels)


def test_eval_mode_moves_nothing(posterior):
    before = copy.deepcopy(posterior.state_dict())
    posterior.eval()(encoded_of(1, num_moments=posterior.num_moments))
    posterior.step()
    assert all(torch.equal(before[name], value) for name, value in posterior.state_dict().items())


def test_the_moments_do_not_depend_on_autocast(posterior):
    encoded = encoded_of(1, num_moments=posterior.num_moments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = posterior.eval()(encoded)
    assert torch.equal(inside.losses["kl"], posterior(encoded).losses["kl"])
    assert torch.equal(inside.mean, posterior(encoded).mean)
    assert inside.latents.dtype == torch.float32


def test_bad_hyperparameters_are_refused_and_the_rest_have_defaults(posterior):
    type(posterior)(DIM)
    with pytest.raises(ValueError, match="latent_dim=0 must be at least 1"):
        type(posterior)(0)


def test_the_loss_is_the_kl_of_all_levels_and_components_meant_over_the_batch(posterior):
    output = posterior(encoded_of(1, num_moments=posterior.num_moments))
    expected = sum(level.kl.flatten(1).sum(1).mean() for level in output.levels)
    torch.testing.assert_close(output.losses["kl"], expected)


def test_every_channel_of_every_level_has_free_bits(posterior):
    name = next(name for name, choice in POSTERIORS.items() if isinstance(posterior, choice))
    posterior, encoded = POSTERIORS[name](DIM, free_bits=1e6), encoded_of(1, num_moments=posterior.num_moments)
    num_channels = DIM * len(posterior(encoded).levels)
    posterior.step()
    loss = posterior(encoded.requires_grad_()).losses["kl"]
    assert loss.item() == pytest.approx(1e6 * num_channels)
    loss.backward()
    assert all(each.grad.abs().sum() == 0 for each in (encoded, *posterior.parameters()))


def test_a_generator_repeats_the_draws_of_the_prior(posterior):
    one, two = (posterior.draw(3, (4, 4), noise_of(torch.Generator().manual_seed(0))) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(posterior.draw(3, (4, 4), noise_of(None)), posterior.draw(3, (4, 4), noise_of(None)))


# The Gaussian's closed forms.


NUMBERS, LOGARITHMS = st.floats(-3, 3), st.floats(-4, 2)


@settings(max_examples=20, deadline=None)
@given(mean=NUMBERS, log_variance=LOGARITHMS, prior=st.tuples(NUMBERS, LOGARITHMS) | st.none())
def test_the_kl_is_the_monte_carlo_mean_of_the_log_ratio_and_that_of_torch(mean, log_variance, prior):
    mean, log_variance = torch.tensor(mean).double(), torch.tensor(log_variance).double()
    given_prior = [] if prior is None else [torch.tensor(each).double() for each in prior]
    prior_mean, prior_log_variance = given_prior or torch.zeros(2).double()
    deviation = (0.5 * log_variance).exp()
    draws = mean + deviation * torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratios = gaussian_log_density(draws, mean, log_variance)
    ratios = ratios - gaussian_log_density(draws, prior_mean, prior_log_variance)
    found = gaussian_kl(mean, log_variance, *given_prior)
    error = ratios.std() / len(draws) ** 0.5
    assert abs(ratios.mean() - found) < 5 * error + 1e-9
    normal = torch.distributions.Normal
    priors = normal(prior_mean, (0.5 * prior_log_variance).exp())
    expected = torch.distributions.kl_divergence(normal(mean, deviation), priors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gaussian_log_density(draws, mean, log_variance), normal(mean, deviation).log_prob(draws))


def test_the_kl_of_a_gaussian_is_that_to_the_standard_normal_times_its_weight():
    encoded = encoded_of(1)
    mean, log_variance = encoded[:, :DIM], encoded[:, DIM:]
    expected = gaussian_kl(mean, log_variance).flatten(1).sum(1).mean()
    torch.testing.assert_close(GaussianPosterior(DIM)(encoded).losses["kl"], expected)
    torch.testing.assert_close(GaussianPosterior(DIM, beta=2.5)(encoded).losses["kl"], 2.5 * expected)


def test_the_gradient_of_the_kl_is_that_of_the_closed_form_and_scales_with_its_weight():
    for beta in (0.5, 2.0):
        encoded = encoded_of(1).requires_grad_()
        GaussianPosterior(DIM, beta=beta)(encoded).losses["kl"].backward()
        mean, log_variance = encoded.detach().chunk(2, dim=1)
        expected = torch.cat([mean, 0.5 * (log_variance.exp() - 1)], dim=1)  # of one image of a batch of four
        torch.testing.assert_close(encoded.grad, beta * expected / 4)


def test_draws_have_the_moments_and_pass_the_gradient_of_the_reparameterisation():
    encoded = torch.zeros(20_000, 2, 1, 1)
    encoded[:, 0], encoded[:, 1] = 0.7, -1.0
    encoded.requires_grad_()
    torch.manual_seed(0)
    latents = GaussianPosterior(1)(encoded).latents
    assert latents.mean().item() == pytest.approx(0.7, abs=0.02)
    assert latents.var().log().item() == pytest.approx(-1.0, abs=0.05)
    latents.sum().backward()
    assert torch.equal(encoded.grad[:, 0], torch.ones(20_000, 1, 1))
    torch.testing.assert_close(
        encoded.grad[:, 1], 0.5 * (latents.detach() - 0.7)[:, 0]
    )  # half of deviation times noise


def test_extreme_encodings_stay_finite():
    encoded = torch.full((1, 2, 1, 1), 200.0, requires_grad=True)
    output = GaussianPosterior(1)(encoded)
    (output.losses["kl"] + output.latents.sum()).backward()
    assert output.losses["kl"].isfinite()
    assert encoded.grad.isfinite().all()


# The weight of the KL.


def test_warm_up_raises_the_weight_in_a_line_to_beta_and_stays_there():
    posterior = GaussianPosterior(DIM, beta=2.0, warmup=0.4)
    weights = [posterior.kl_weight.item()]
    for progress in (0.1, 0.2, 0.4, 0.7, 1.0):
        posterior(encoded_of(1))
        posterior.step(progress)
        weights.append(posterior.kl_weight.item())
    assert weights == pytest.approx([0, 0.5, 1.0, 2.0, 2.0, 2.0])


def test_free_bits_charge_a_channel_only_above_them_and_give_no_gradient_below():
    posterior = GaussianPosterior(2, free_bits=3.0)
    encoded = torch.zeros(4, 4, 2, 5)
    encoded[:, 0] = 1.0  # channel 0: 10 positions of half a nat
    encoded[:, 1] = 0.5  # channel 1: 10 positions of an eighth
    posterior(encoded)
    posterior.step()
    given_encoding = encoded.requires_grad_()
    loss = posterior(given_encoding).losses["kl"]
    assert loss.item() == pytest.approx(5.0 + 3.0)  # max(free bits, KL) of each
    loss.backward()
    assert given_encoding.grad[:, 0].abs().sum() > 0
    assert given_encoding.grad[:, 1].abs().sum() == 0


@pytest.mark.parametrize("factor", [0.5, 1.5, 100.0])
def test_the_learned_multiplier_follows_the_logarithm_of_kl_over_its_target(factor):
    encoded = encoded_of(1)
    kl = GaussianPosterior(DIM)(encoded).losses["kl"].item()
    posterior = GaussianPosterior(DIM, kl_target=kl / factor)
    posterior(encoded)
    posterior.step()
    error = torch.tensor(factor).log().clamp(-1, 1)
    torch.testing.assert_close(posterior.kl_weight.log(), MULTIPLIER_RATE * error)
    torch.testing.assert_close(posterior(encoded).losses["kl"], posterior.kl_weight * kl)


def test_accumulated_batches_move_the_weight_as_one_batch():
    one, two = (GaussianPosterior(DIM, kl_target=5.0) for _ in range(2))
    one(encoded_of(1))
    for half in encoded_of(1).split(2):
        two(half)
    one.step(), two.step()
    torch.testing.assert_close(one.kl_weight, two.kl_weight)


@pytest.mark.parametrize("options", [{"kl_target": 5.0}, {"free_bits": 2.0, "warmup": 0.5}])
def test_a_discarded_step_leaves_no_trace(options):
    posterior, other = (GaussianPosterior(DIM, **options) for _ in range(2))
    posterior(torch.full((2, 2 * DIM, 2, 5), torch.nan))
    posterior.discard()
    for each in (posterior, other):
        each(encoded_of(7))
        each.step(0.3)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in posterior.state_dict().items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_does_not_count_a_batch_twice(use_reentrant):
    posterior, encoded = GaussianPosterior(DIM), encoded_of(5).requires_grad_()
    checkpoint(lambda x: posterior(x).latents, encoded, use_reentrant=use_reentrant).square().sum().backward()
    assert posterior.num_pending == 1


def test_ranks_draw_different_noise_and_together_that_of_one_rank_with_the_whole_batch(monkeypatch):
    batch, parts = torch.empty(8, DIM, 2, 5), []
    torch.manual_seed(3)
    whole = draw_noise(batch)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for rank in range(2):
        torch.manual_seed(3)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        parts.append(draw_noise(batch[:4]))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"warmup": 1.5}, r"warmup=1.5 must lie in \[0, 1\]"),
        ({"free_bits": -1.0}, "free_bits=-1.0 must not be negative"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0"),
        ({"kl_target": 5.0, "beta": 2.0}, "kl_target=5.0 learns the weight of the KL by itself; leave out beta=2.0"),
        ({"kl_target": 5.0, "warmup": 0.1}, "leave out beta=1.0, warmup=0.1"),
        ({"kl_target": 5.0, "free_bits": 0.1}, "free_bits=0.1, or give kl_target=null"),
    ],
)
def test_impossible_hyperparameters_and_combinations_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        GaussianPosterior(DIM, **wrong)
