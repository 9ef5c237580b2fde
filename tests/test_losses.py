"""Losses by hand; the perceptual one on a network with made-up weights, which is found as a downloaded one would be."""

import json
import math
import warnings

import pytest
import torch
from conftest import SQUEEZE_FILE
from processes import records
from tiny_runs import train_here

from train.config import UserError, parse
from train.features import PerceptualDistance, weights_hash
from train.losses import FIRST_SIGMA, Deviation, ReconstructionLoss, gaussian_nats
from train.settings import SMALLEST_PERCEPTUAL, LossSettings, TokenizerRun

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def images_of(seed: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("reconstruction", "expected"), [("l1", 3 * 0.2), ("l2", 3 * 0.04)])
def test_pixel_losses_are_weighted_means_over_all_values(reconstruction, expected):
    loss = ReconstructionLoss(LossSettings(reconstruction=reconstruction, reconstruction_weight=3.0))
    images = torch.full((2, 3, 4, 4), 0.5)
    losses = loss(images + 0.2, images)
    assert losses.keys() == {reconstruction}
    assert losses[reconstruction].item() == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.003, 0.03, 0.3, 3.0])
def test_gaussian_nats_are_those_of_8_bit_pixels_under_the_normal_distribution_of_torch(sigma):
    pixels = torch.arange(256) / 255
    images, means = torch.meshgrid(pixels, torch.linspace(-0.1, 1.1, 50), indexing="ij")
    normal = torch.distributions.Normal(means.double(), sigma)
    at_most = normal.cdf(images.double() + 0.5 / 255)
    at_most[-1] = 1  # the last value takes all that is above
    probabilities = at_most.diff(dim=0, prepend=torch.zeros(1, 50, dtype=torch.float64))
    nats = gaussian_nats(images, means, torch.tensor(sigma))
    likely = probabilities > 1e-6  # below, the difference of two cumulative probabilities is rounding
    torch.testing.assert_close(nats[likely].double(), -probabilities[likely].log(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((-nats.double()).exp().sum(dim=0), torch.ones(50).double(), rtol=0, atol=1e-4)
    assert (nats >= 0).all()


def test_gaussian_nats_and_their_gradients_stay_finite_far_from_the_mean():
    images = torch.tensor([0.0, 1.0, 128 / 255, 128 / 255])
    means = torch.tensor([3.0, -3.0, 3.0, -3.0], requires_grad=True)
    sigma = torch.tensor(0.001, requires_grad=True)
    nats = gaussian_nats(images, means, sigma)
    nats.sum().backward()
    assert nats.isfinite().all()
    assert (means.grad * torch.tensor([1, -1, 1, -1]) > 0).all()  # descent leads back to the image
    assert sigma.grad < 0


def test_gaussian_loss_is_the_weighted_mean_in_nats_and_its_sigma_learned_or_fixed():
    settings = LossSettings(reconstruction="gaussian", reconstruction_weight=2.0)
    images = (255 * images_of(1)).round() / 255
    loss = ReconstructionLoss(settings)
    losses = loss(images_of(2), images)
    assert losses.keys() == {"gaussian"}
    expected = gaussian_nats(images, images_of(2), torch.tensor(FIRST_SIGMA))
    torch.testing.assert_close(losses["gaussian"], 2 * expected.mean())
    torch.testing.assert_close(loss.nats(images_of(2), images), expected.mean(dim=(1, 2, 3)))
    losses["gaussian"].backward()
    assert loss.deviation.log_sigma.grad != 0
    fixed = ReconstructionLoss(LossSettings(reconstruction="gaussian", reconstruction_weight=2.0, sigma=0.05))
    assert fixed.deviation().item() == pytest.approx(0.05)
    assert not any(weight.requires_grad for weight in fixed.parameters())


def test_a_learned_sigma_comes_to_the_root_of_the_mean_squared_error():
    images = torch.full((1, 3, 64, 64), 128 / 255)
    reconstructions = images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    deviation = Deviation()
    optimizer = torch.optim.Adam(deviation.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        gaussian_nats(images, reconstructions, deviation()).mean().backward()
        optimizer.step()
    error = (reconstructions - images).square().mean().sqrt().item()
    assert deviation().item() == pytest.approx(error, rel=0.01)


def test_the_weight_of_the_pixels_follows_the_loss_unless_given():
    assert parse(TokenizerRun, []).loss.reconstruction_weight == 10
    assert parse(TokenizerRun, ["loss.reconstruction=gaussian"]).loss.reconstruction_weight == 1
    given = ["loss.reconstruction=gaussian", "loss.reconstruction_weight=3"]
    assert parse(TokenizerRun, given).loss.reconstruction_weight == 3
    with pytest.raises(UserError, match="loss.sigma=0.0 must be above 0, or null to be learned"):
        parse(TokenizerRun, ["loss.sigma=0"])


@pytest.mark.parametrize("sigma", [None, 0.07])
def test_a_run_with_a_likelihood_tells_what_pixels_and_tokens_cost(sigma, picture_folder, tmp_path):
    settings = ["loss.reconstruction=gaussian", f"loss.sigma={'null' if sigma is None else sigma}"]
    tensors = train_here(picture_folder, tmp_path / "run", *settings)
    assert not any("sigma" in key for key in tensors)
    told = records(tmp_path / "run")
    for record in told:
        assert record["distortion_bits_per_dimension"] == pytest.approx(
            record["distortion_nats_per_dimension"] / math.log(2)
        )
        assert record["rate_bits_per_dimension"] == pytest.approx(5 / (2 * 2 * 3))  # 32 codes, one for 2 x 2 pixels
        assert record["total_bits_per_dimension"] == pytest.approx(
            record["distortion_bits_per_dimension"] + record["rate_bits_per_dimension"]
        )
        if "gaussian" in record:
            assert record["gaussian"] == pytest.approx(record["distortion_nats_per_dimension"], rel=0.2)
    sigmas = [record["sigma"] for record in told]
    assert (len(set(sigmas)) == 10) if sigma is None else (sigmas == [pytest.approx(sigma)] * len(sigmas))


def test_perceptual_loss_is_the_weighted_mean_of_the_distances_and_leaves_the_pixel_loss_alone(squeeze_home):
    loss = ReconstructionLoss(LossSettings(perceptual="squeeze", perceptual_weight=0.5).complete())
    one, two = images_of(1), images_of(2)
    losses = loss(one, two)
    assert losses.keys() == {"l2", "perceptual"}
    torch.testing.assert_close(losses["perceptual"], 0.5 * loss.perceptual(one, two).mean())
    torch.testing.assert_close(losses["l2"], ReconstructionLoss(LossSettings().complete())(one, two)["l2"])


def test_perceptual_distance_is_what_lpips_says_of_pictures_scaled_as_it_wants_them(squeeze_home):
    import lpips

    first, second = torch.rand(2, 2, 3, 20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="squeeze", verbose=False).eval()
    expected = theirs(first, second, normalize=True).flatten()  # from [0, 1], by its own scaling
    torch.testing.assert_close(PerceptualDistance("squeeze").train()(first, second), expected)


def test_perceptual_distance_is_0_for_equal_pictures_symmetric_and_of_each_picture(squeeze_home):
    distance = PerceptualDistance("squeeze")
    one, two = images_of(1), images_of(2)
    assert distance(one, one).tolist() == [0.0, 0.0]
    assert (distance(one, two) > 0).all()
    torch.testing.assert_close(distance(one, two), distance(two, one))
    torch.testing.assert_close(distance(one, two)[1:], distance(one[1:], two[1:]))


def test_perceptual_distance_of_grey_pictures_is_that_of_equal_colours(squeeze_home):
    distance = PerceptualDistance("squeeze")
    one, two = images_of(1, channels=1), images_of(2, channels=1)
    torch.testing.assert_close(distance(one, two), distance(one.repeat(1, 3, 1, 1), two.repeat(1, 3, 1, 1)))


def test_perceptual_network_gives_gradients_to_the_pictures_and_learns_nothing_itself(squeeze_home):
    loss = ReconstructionLoss(LossSettings(perceptual="squeeze").complete()).train()
    reconstructions = images_of(1).bfloat16().requires_grad_()
    perceptual = loss(reconstructions, images_of(2))["perceptual"]
    perceptual.backward()
    assert perceptual.dtype == torch.float32
    assert reconstructions.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in loss.perceptual.parameters())
    assert not any(module.training for module in loss.perceptual.modules())


@pytest.mark.parametrize("content", [None, b"not weights", b""])
def test_weights_that_cannot_be_had_are_an_error_with_the_file_and_its_place(empty_home, content):
    if content is not None:
        (empty_home / SQUEEZE_FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"https://download.pytorch.org/models/{SQUEEZE_FILE} into {empty_home}/"):
        PerceptualDistance("squeeze")


def test_the_hash_of_a_network_tells_its_weights_apart(squeeze_home):
    network = PerceptualDistance("squeeze")
    assert weights_hash(network) == weights_hash(PerceptualDistance("squeeze"))
    before = weights_hash(network)
    next(network.parameters()).data[0] += 1
    assert weights_hash(network) != before


@pytest.mark.parametrize("network", SMALLEST_PERCEPTUAL)
def test_crops_too_small_for_the_perceptual_network_are_refused_at_launch(network):
    smallest = SMALLEST_PERCEPTUAL[network]
    parse(TokenizerRun, [f"loss.perceptual={network}", f"image_size={smallest}"])
    with pytest.raises(UserError, match=f"image_size={smallest - 1} must be >= {smallest} for loss.perceptual"):
        parse(TokenizerRun, [f"loss.perceptual={network}", f"image_size={smallest - 1}"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # lpips calls torchvision by an old name of a setting
def test_the_smallest_sides_are_those_that_the_networks_take():
    import lpips

    for name, smallest in SMALLEST_PERCEPTUAL.items():
        network = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
        assert network(*torch.zeros(2, 1, 3, smallest, smallest)).isfinite().all()
        with pytest.raises(RuntimeError, match="too small|Kernel size"):
            network(*torch.zeros(2, 1, 3, smallest - 1, smallest - 1))


def test_a_run_with_the_perceptual_loss_logs_it_and_exports_the_tokenizer_alone(picture_folder, squeeze_home, tmp_path):
    size = ["image_size=20", "model.autoencoder.patch_size=4"]
    plain = train_here(picture_folder, tmp_path / "plain", *size)
    settings = [*size, "loss.perceptual=squeeze", "loss.perceptual_weight=3.0"]
    perceptual = train_here(picture_folder, tmp_path / "perceptual", *settings)
    assert plain.keys() == perceptual.keys()
    assert any(not torch.equal(plain[key], perceptual[key]) for key in plain)
    lines = [json.loads(line) for line in (tmp_path / "perceptual" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["perceptual"] > 0 for line in lines if "l2" in line)
