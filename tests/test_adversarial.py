"""The adversarial terms by hand, and whole runs with every term on."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from processes import TWO_RANKS, assert_close_runs, assert_same, records, run
from safetensors.torch import load_file
from test_vqvae import command
from tiny_runs import assert_resumes_to_the_bit, train_here

from tokenizer import ImageTokenizer
from train.adversarial import GAMES, Adversary, adaptive_weight, last_kernel, lecam
from train.config import RunError, UserError, parse
from train.discriminator import PatchDiscriminator
from train.optimization import Trainee
from train.settings import AdversarialSettings, TokenizerRun

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SMALL = ["adversarial.base_channels=4", "adversarial.num_layers=1"]
HINGE = ["adversarial.loss=hinge", "adversarial.start_step=3", "adversarial.ramp_steps=2", *SMALL]
SELDOM = ["eval_every=10", "save_every=10"]
EVERY_TERM = [*HINGE, *SELDOM, "image_size=20", "loss.perceptual=squeeze", "loss.reconstruction=gaussian"]


@pytest.mark.parametrize(
    ("loss", "of_discriminator", "of_tokenizer"),
    [
        ("hinge", ((1 - 0.5) + 0 + (1 + 0.25) + 0) / 4, -(0.25 - 2) / 2),
        (
            "non_saturating",
            sum(math.log(1 + math.exp(x)) for x in (-0.5, -3, 0.25, -2)) / 4,
            sum(math.log(1 + math.exp(x)) for x in (-0.25, 2)) / 2,
        ),
    ],
)
def test_both_sides_of_each_game_equal_the_sums_by_hand(loss, of_discriminator, of_tokenizer):
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([0.25, -2.0])
    discriminator, tokenizer = GAMES[loss]
    assert discriminator(real, fake).item() == pytest.approx(of_discriminator)
    assert tokenizer(fake).item() == pytest.approx(of_tokenizer)


def test_lecam_is_the_squared_distance_from_the_mean_of_the_other_side():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0])
    expected = ((1 - -0.5) ** 2 + (3 - -0.5) ** 2) / 2 + ((-1 - 2) ** 2 + (0 - 2) ** 2) / 2
    assert lecam(real, fake, torch.tensor([2.0, -0.5])).item() == pytest.approx(expected)


def test_the_adaptive_weight_is_the_ratio_of_norms_and_clamped():
    reconstruction, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert adaptive_weight(reconstruction, adversarial, 1e4).item() == pytest.approx(10, rel=1e-5)
    assert adaptive_weight(reconstruction, adversarial, 7.0).item() == 7
    assert adaptive_weight(reconstruction, torch.zeros(2), 1e4).item() == 1e4


class Game:
    """A tiny tokenizer and its adversary, with batches to play on."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        self.tokenizer = ImageTokenizer(tiny_config()).train()
        self.network = PatchDiscriminator(3, base_channels=4, num_layers=1)
        options = AdversarialSettings(**({"loss": "hinge", "start_step": 0, "ramp_steps": 0} | settings))
        discriminator = Trainee(self.network, options.learning_rate, (0.5, 0.9), model=self.network)
        kernel = last_kernel(self.tokenizer.autoencoder.decoder)
        self.adversary = Adversary(options, discriminator, kernel, Accelerator(cpu=True))
        self.images = torch.rand(4, 3, 16, 16)

    def losses(self, images):
        """Reconstruction loss, the tokenizer's term, the discriminator's terms."""
        reconstructions = self.tokenizer(images).reconstructions
        loss = (reconstructions - images).square().mean()
        asked = self.adversary.tokenizer_loss(1, reconstructions, loss)
        return loss, asked["adversarial"], self.adversary.discriminator_losses(images, reconstructions)


def test_the_last_kernel_is_the_one_that_makes_the_pixels():
    decoder = Game().tokenizer.autoencoder.decoder
    assert last_kernel(decoder) is decoder.head[-1].weight


def test_the_adaptive_weight_of_a_step_equals_the_plain_computation_and_serves_the_next():
    game = Game()
    _, asked, _ = game.losses(game.images)
    assert asked.item() == 0  # nothing is known yet
    game.adversary.step()

    kernel, norms = last_kernel(game.tokenizer.autoencoder.decoder), []
    for of in (lambda made: (made - game.images).square().mean(), lambda made: -game.network(made).mean()):
        game.tokenizer.zero_grad()
        of(game.tokenizer(game.images).reconstructions).backward()
        norms.append(kernel.grad.norm())
    ratio = norms[0] / (norms[1] + 1e-6)
    torch.testing.assert_close(game.adversary.adaptive_weight, ratio, rtol=1e-4, atol=0)
    _, asked, _ = game.losses(game.images)
    expected = 0.1 * ratio * -game.network(game.tokenizer(game.images).reconstructions).mean()
    torch.testing.assert_close(asked, expected, rtol=1e-4, atol=0)


def test_without_the_adaptive_weight_the_term_has_the_weight_that_was_given():
    game = Game(adaptive=False, weight=0.3, loss="non_saturating")
    _, asked, _ = game.losses(game.images)
    logits = game.network(game.tokenizer(game.images).reconstructions)
    torch.testing.assert_close(asked, -0.3 * torch.nn.functional.logsigmoid(logits).mean())


def test_no_gradient_of_one_side_reaches_the_other():
    game = Game(adaptive=False)
    loss, asked, judgement = game.losses(game.images)
    (loss + asked).backward()
    assert all(weight.grad is None for weight in game.network.parameters())
    before = {name: weight.grad.clone() for name, weight in game.tokenizer.named_parameters()}
    sum(judgement.values()).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in game.network.parameters())
    assert all(torch.equal(before[name], weight.grad) for name, weight in game.tokenizer.named_parameters())


def test_the_means_of_the_logits_follow_by_hand_and_lecam_uses_those_of_the_steps_before():
    game, means = Game(lecam_decay=0.6, lecam_weight=0.5), None
    for share in (1, 1 / 2, 1 - 0.6, 1 - 0.6):
        images = torch.rand(4, 3, 16, 16)
        real = game.network(images).detach()
        fake = game.network(game.tokenizer(images).reconstructions).detach()
        _, _, judgement = game.losses(images)
        anchors = torch.zeros(2) if means is None else means
        torch.testing.assert_close(judgement["lecam"], 0.5 * lecam(real, fake, anchors))
        game.adversary.step()
        logits = torch.stack([real.mean(), fake.mean()])
        means = anchors + share * (logits - anchors)
        torch.testing.assert_close(game.adversary.mean_logits, means)
        assert game.adversary.figures["real_logits"] == pytest.approx(logits[0].item(), rel=1e-4)
        assert game.adversary.figures["fake_logits"] == pytest.approx(logits[1].item(), rel=1e-4)


def test_the_statistics_of_accumulated_batches_are_those_of_one_batch():
    whole, halves = Game(), Game()
    whole.losses(whole.images)
    for half in halves.images.chunk(2):
        halves.losses(half)
    whole.adversary.step()
    halves.adversary.step()
    for name, value in whole.adversary.state_dict().items():
        torch.testing.assert_close(halves.adversary.state_dict()[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_batches_that_are_discarded_leave_no_trace():
    game, plain = Game(), Game()
    game.losses(torch.full((4, 3, 16, 16), torch.nan))
    game.adversary.discard()
    game.adversary.step()  # with nothing to learn from
    assert_same(game.adversary.state_dict(), plain.adversary.state_dict())


def test_the_weight_rises_linearly_after_the_start_and_then_stays():
    adversary = Game(start_step=10, ramp_steps=4).adversary
    assert [adversary.ramp(step) for step in (1, 10, 11, 12, 14, 15, 99)] == [0, 0, 0.25, 0.5, 1, 1, 1]
    assert [adversary.plays(step) for step in (10, 11)] == [False, True]
    assert Game(start_step=0, ramp_steps=0).adversary.ramp(1) == 1


def test_the_start_and_the_ramp_follow_the_length_of_the_run_unless_given():
    options = parse(TokenizerRun, ["steps=2000", "adversarial.loss=hinge"]).adversarial
    assert (options.start_step, options.ramp_steps) == (1000, 100)
    options = parse(TokenizerRun, ["adversarial.loss=hinge", "adversarial.start_step=7"]).adversarial
    assert (options.start_step, options.ramp_steps) == (7, 35)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["adversarial.start_step=700"],
            "adversarial.start_step=700 must be >= 0 and < steps=700, or the discriminator",
        ),
        (["steps=10", "adversarial.start_step=12"], "lower it, or null for steps // 2"),
        (["image_size=20"], "image_size=20 must be >= 24 for adversarial.num_layers=3; a layer less halves that"),
        (["mixed_precision=fp16"], "mixed_precision=fp16 must be bf16 or no with adversarial.loss=hinge"),
        (["adversarial.lecam_decay=1"], "adversarial.lecam_decay=1.0 must lie in [0, 1)"),
        (["adversarial.learning_rate=0"], "adversarial.learning_rate=0.0 must be above 0"),
        (["adversarial.num_layers=0"], "adversarial.num_layers=0 must be >= 1"),
    ],
)
def test_what_cannot_be_is_one_line_at_launch(settings, message):
    with pytest.raises(UserError) as error:
        parse(TokenizerRun, ["adversarial.loss=hinge", *settings])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_discriminator_learns_nothing_before_its_start_and_then_does_and_is_not_exported(picture_folder, tmp_path):
    exported = train_here(picture_folder, tmp_path / "run", *HINGE, "keep_checkpoints=10")
    assert exported.keys() == ImageTokenizer.from_pretrained(tmp_path / "run").state_dict().keys()
    name = "checkpoints/step_{}/model_1.safetensors"
    weights = [load_file(tmp_path / "run" / name.format(step)) for step in range(1, 11)]
    for before, after in itertools.pairwise(weights[:3]):
        assert_same(before, after)
    for before, after in itertools.pairwise(weights[2:]):
        assert all(not torch.equal(before[key], after[key]) for key in before)

    told = [record for record in records(tmp_path / "run") if "loss" in record]
    figures = {"adversarial", "discriminator", "lecam", "adaptive_weight", "real_logits", "fake_logits"}
    figures |= {"discriminator_gradient_norm", "discriminator_learning_rate"}
    assert all(not figures & record.keys() for record in told[:3])
    assert all(figures <= record.keys() for record in told[3:])
    assert told[3]["adversarial"] == 0  # the discriminator is one step ahead
    assert all(record["adversarial"] != 0 for record in told[4:])
    terms = ("l2", "adversarial", "commitment")
    assert all(record["loss"] == pytest.approx(sum(record[term] for term in terms)) for record in told[3:])


def test_two_steps_are_a_valid_run_with_a_discriminator(picture_folder, tmp_path):
    train_here(picture_folder, tmp_path / "run", "adversarial.loss=non_saturating", *SMALL, "steps=2")


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.reconstruction=gaussian"],
        ["mixed_precision=bf16", "adversarial.loss=non_saturating", "adversarial.start_step=7", "average.decay=0"],
    ],
)
def test_a_run_with_every_network_resumes_to_the_bit(settings, picture_folder, tmp_path, monkeypatch):
    assert_resumes_to_the_bit(picture_folder, [*HINGE, *settings], tmp_path, monkeypatch)


def test_two_ranks_equal_one_with_twice_the_batch_with_every_term(picture_folder, squeeze_home, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(picture_folder, one, "batch_size=8", *EVERY_TERM)
    home = str(squeeze_home.parents[1])
    done = run(command(picture_folder, two, *EVERY_TERM, launcher=TWO_RANKS), TORCH_HOME=home)
    assert done.returncode == 0, done.stderr
    assert (two / "checkpoints/step_10/state_1.json").is_file()  # there really were two
    assert (two / "checkpoints/step_10/model_2.safetensors").is_file()  # tokenizer, sigma, discriminator
    assert_close_runs(one, two)
    for name in ("adaptive_weight", "real_logits", "fake_logits", "sigma"):
        told = [[record[name] for record in records(run) if name in record] for run in (one, two)]
        assert told[0] == pytest.approx(told[1], rel=1e-3, abs=1e-4)


def test_accumulated_batches_equal_one_batch_with_every_term(picture_folder, squeeze_home, tmp_path):
    settings = [*EVERY_TERM, "model.quantizer.placement=1"]
    train_here(picture_folder, tmp_path / "whole", "batch_size=8", *settings)
    train_here(picture_folder, tmp_path / "halves", "optimizer.accumulation_steps=2", *settings)
    # The codes are placed in the last step, among the latents of the last batch.
    assert_close_runs(tmp_path / "whole", tmp_path / "halves", leave_out="quantizer.ema_")


def poison(monkeypatch, at_step: int, spoil):
    """Let the discriminator's terms be spoilt at one step."""
    plain, calls = Adversary.discriminator_losses, []

    def poisoned(self, *arguments):
        calls.append(None)
        losses = plain(self, *arguments)
        return spoil(self, losses) if len(calls) == at_step - self.settings.start_step else losses

    monkeypatch.setattr(Adversary, "discriminator_losses", poisoned)


def nan_loss(adversary, losses):
    return {name: loss * torch.nan if name == "lecam" else loss for name, loss in losses.items()}


def nan_gradient(adversary, losses):
    """A finite loss whose gradient is not."""
    root_of_zero = (0 * next(adversary.discriminator.network.parameters())).sum().sqrt()
    return losses | {"discriminator": losses["discriminator"] + root_of_zero}


@pytest.mark.parametrize(("spoil", "guilty"), [(nan_loss, "lecam"), (nan_gradient, "discriminator gradient")])
def test_a_nonfinite_term_of_the_discriminator_stops_the_run_by_its_name(
    spoil, guilty, picture_folder, tmp_path, monkeypatch
):
    poison(monkeypatch, 6, spoil)
    with pytest.raises(RunError, match=f"step 6: {guilty} not finite; the last checkpoint is of step 5"):
        train_here(picture_folder, tmp_path / "run", *HINGE)


@pytest.mark.parametrize("spoil", [nan_loss, nan_gradient])
def test_a_skipped_step_leaves_no_trace_in_any_network_or_statistic(spoil, picture_folder, tmp_path, monkeypatch):
    poison(monkeypatch, 6, spoil)
    settings = [*HINGE, "loss.reconstruction=gaussian", "optimizer.on_nonfinite=skip", "keep_checkpoints=10"]
    train_here(picture_folder, tmp_path / "run", *settings)
    five, six, seven = (tmp_path / f"run/checkpoints/step_{step}" for step in (5, 6, 7))
    for name in ("model.safetensors", "model_1.safetensors", "model_2.safetensors"):
        assert_same(load_file(five / name), load_file(six / name))
        assert any(not torch.equal(left, load_file(seven / name)[key]) for key, left in load_file(six / name).items())
    for name in ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):  # averaged weights, statistics of the game
        assert_same(torch.load(five / name), torch.load(six / name))
    assert_same(*(torch.load(folder / "optimizer.bin")["state"] for folder in (five, six)))
