"""train/vae.py: the promises of the training loop hold for a VAE, and its log shows what the latents know."""

import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from processes import TWO_RANKS, assert_close_runs, records, run
from safetensors.torch import load_file
from test_vqvae import poison
from tiny_runs import TINY_VAE, assert_resumes_to_the_bit, train_vae

from tokenizer import ImageVAE
from train.config import UserError, help_text, parse
from train.data import evaluation_batches
from train.losses import ReconstructionLoss, gaussian_nats
from train.settings import VAERun
from train.sources import open_sources
from train.vae_evaluation import VAEExaminer

PROGRAM = str(Path(__file__).parents[1] / "train" / "vae.py")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")

TARGET = "model.posterior.kl_target=30"
LADDER = ["model.posterior.name=ladder", "model.posterior.width=8"]


@pytest.fixture(scope="module")
def finished(picture_folder, tmp_path_factory) -> Path:
    """A run with a target for the KL, as a process; and so the program itself."""
    output = tmp_path_factory.mktemp("vae") / "run"
    program = [sys.executable, PROGRAM, *TINY_VAE, TARGET, "batch_size=8"]
    done = run([*program, f"data={picture_folder}", f"output_dir={output}", "num_workers=0"])
    assert done.returncode == 0, done.stderr
    assert "step 10/10: loss" in done.stderr
    assert all(word in done.stderr for word in ("PSNR", "KL", "nats", "active", "images/s"))
    return output


def test_a_run_leaves_a_model_its_card_and_samples(finished):
    vae = ImageVAE.from_pretrained(finished)
    assert vae.encode(torch.rand(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    card = (finished / "README.md").read_text()
    assert 'ImageVAE.from_pretrained("run")' in card
    assert "the negative ELBO" in card
    assert f"| kl_nats | {records(finished)[-1]['kl_nats']:.6g} |" in card
    assert (finished / "samples/step_000010.png").is_file()


def test_the_log_tells_the_elbo_and_what_the_latents_know(finished):
    told = records(finished)
    for record in told:
        bits = record["distortion_bits_per_dimension"] + record["rate_bits_per_dimension"]
        assert record["total_bits_per_dimension"] == pytest.approx(bits)
        assert record["elbo_nats_per_dimension"] == pytest.approx(-bits * math.log(2))
    evaluated = [record for record in told if "psnr" in record]
    assert [record["step"] for record in evaluated] == [5, 10]
    for record in evaluated:
        channels = [record[f"kl_nats_channel_{index}"] for index in range(4)]
        assert sum(channels) == pytest.approx(record["kl_nats"])
        assert record["num_units"] == 4 * 8 * 8
        assert 0 <= record["active_units"] <= record["num_units"]
        assert record["num_crops"] >= 256
        assert record["mutual_information"] <= math.log(record["num_crops"])
    in_training = [record for record in told if "loss" in record]
    assert [record["step"] for record in in_training] == list(range(1, 11))
    weight, dimensions = 1.0, 3 * 16 * 16
    for record in in_training:  # the KL's term of the loss is in nats per dimension, as the likelihood is
        assert record["kl"] == pytest.approx(weight * record["kl_nats"] / dimensions, rel=1e-4)
        assert record["rate_bits_per_dimension"] == pytest.approx(record["kl_nats"] / dimensions / math.log(2))
        weight = record["kl_weight"]  # learned, and so another one in each step
    assert len({record["kl_weight"] for record in in_training}) == 10


def test_the_elbo_is_that_of_the_means_which_training_sees_not_of_clamped_pictures(picture_folder):
    config = parse(VAERun, [*TINY_VAE, f"data={picture_folder}", "num_workers=0", "loss.sigma=0.3"])
    torch.manual_seed(0)
    vae, (source, rows) = ImageVAE(config.model).eval(), open_sources(config)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    examiner = VAEExaminer(vae, ReconstructionLoss(config.loss), config, Accelerator(cpu=True), source, rows)
    ((picture, _),) = evaluation_batches(source, rows, config, vae.downsample_factor)
    noise = torch.randn(1, 4, picture.shape[2] // 2, picture.shape[3] // 2, generator=torch.Generator().manual_seed(0))
    (level,), original = vae.levels(picture, lambda _: noise), picture.float() / 255
    means = vae.decode_latents(level.latents).detach()
    distortion, clamped = (
        gaussian_nats(original, each, torch.tensor(0.3)).mean() for each in (means, means.clamp(0, 1))
    )
    assert not torch.isclose(distortion, clamped, rtol=0.05)
    told = examiner.evaluate(vae)
    assert told["distortion_nats_per_dimension"] == pytest.approx(distortion.item(), rel=1e-5)
    assert told["elbo_nats_per_dimension"] == pytest.approx(-(distortion + level.kl.sum() / picture.numel()).item())


@pytest.fixture(scope="module")
def climbed(picture_folder, tmp_path_factory) -> Path:
    """The run of a ladder of three steps."""
    output = tmp_path_factory.mktemp("ladder") / "run"
    train_vae(picture_folder, output, *LADDER, "steps=3", "eval_every=3", "batch_size=8")
    return output


def test_a_ladder_tells_of_every_level_and_draws_through_its_prior(climbed):
    vae = ImageVAE.from_pretrained(climbed)
    assert vae.encode(torch.rand(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    drawn = [vae.sample(2, 16, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert drawn[0].shape == (2, 3, 16, 16)
    assert torch.equal(*drawn)
    for record in records(climbed):
        levels = [record[f"kl_nats_level_{index}"] for index in (1, 2)]
        assert sum(levels) == pytest.approx(record["kl_nats"], rel=1e-5)
    evaluated = records(climbed)[-1]
    channels = [evaluated[f"kl_nats_channel_{index}"] for index in range(8)]
    assert sum(channels[:4]) == pytest.approx(evaluated["kl_nats_level_1"])
    assert sum(channels[4:]) == pytest.approx(evaluated["kl_nats_level_2"])
    assert [evaluated[f"num_units_level_{index}"] for index in (1, 2)] == [4 * 8 * 8, 4 * 4 * 4]
    assert evaluated["num_units"] == 4 * 8 * 8 + 4 * 4 * 4
    assert sum(evaluated[f"active_units_level_{index}"] for index in (1, 2)) == evaluated["active_units"]
    assert "Level 1 is what the decoder takes" in (climbed / "README.md").read_text()


def test_two_ranks_equal_one_with_twice_the_batch_on_every_level(climbed, picture_folder, tmp_path):
    program = [sys.executable, *TWO_RANKS, PROGRAM, *TINY_VAE, *LADDER, "steps=3", "eval_every=3"]
    done = run([*program, f"data={picture_folder}", f"output_dir={tmp_path / 'two'}", "num_workers=0"])
    assert done.returncode == 0, done.stderr
    assert_close_runs(climbed, tmp_path / "two")
    assert records(climbed)[-1] == pytest.approx(records(tmp_path / "two")[-1], rel=1e-2, abs=1e-3)


def test_two_ranks_equal_one_with_twice_the_batch(finished, picture_folder, tmp_path):
    program = [sys.executable, *TWO_RANKS, PROGRAM, *TINY_VAE, TARGET]
    done = run([*program, f"data={picture_folder}", f"output_dir={tmp_path / 'two'}"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two/checkpoints/step_10/state_1.json").is_file()  # there really were two
    assert_close_runs(finished, tmp_path / "two")
    one, two = records(finished)[-1], records(tmp_path / "two")[-1]
    assert one.keys() == two.keys()
    for key in one:
        assert one[key] == pytest.approx(two[key], rel=1e-2, abs=1e-3), key


@pytest.mark.parametrize(
    "settings", [[TARGET], ["model.posterior.warmup=0.5", "model.posterior.free_bits=3"], [*LADDER, TARGET]]
)
def test_a_run_resumes_to_the_bit_its_noise_and_its_weight_included(settings, picture_folder, tmp_path, monkeypatch):
    assert_resumes_to_the_bit(picture_folder, settings, tmp_path, monkeypatch, train_vae)


def test_a_skipped_step_leaves_weights_and_multiplier_as_they_were(picture_folder, tmp_path, monkeypatch):
    poison(monkeypatch, at_call=6)
    train_vae(picture_folder, tmp_path / "run", TARGET, "optimizer.on_nonfinite=skip", "keep_checkpoints=10")
    five, six, seven = (load_file(tmp_path / f"run/checkpoints/step_{step}/model.safetensors") for step in (5, 6, 7))
    assert all(torch.equal(five[key], six[key]) for key in five)
    assert not torch.equal(six["posterior.kl_weight"], seven["posterior.kl_weight"])


def test_collapse_is_warned_of(picture_folder, tmp_path, caplog):
    train_vae(picture_folder, tmp_path / "run", "model.posterior.beta=1000", "steps=30", "average.decay=0")
    assert "posterior collapse at step" in caplog.text
    assert "model.posterior.kl_target" in caplog.text


def test_the_level_that_collapses_is_named(picture_folder, tmp_path, caplog):
    train_vae(picture_folder, tmp_path / "run", *LADDER, "model.posterior.beta=1000", "steps=30", "average.decay=0")
    assert "of the latents of level 1 differ" in caplog.text
    assert "of the latents of level 2 differ" in caplog.text


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("loss.reconstruction=l2", "loss.reconstruction=l2 must be gaussian: the ELBO needs a likelihood"),
        ("model.posterior.betta=2", "unknown key 'betta' in posterior 'gaussian'; did you mean 'beta'?"),
        ("model.posterior.name=uniform", "posterior.name='uniform' must be one of gaussian"),
        ("model.latent_dim=0", "latent_dim=0 must be at least 1"),
        ("model.quantizer.name=ema_vq", "unknown key 'model.quantizer'"),
    ],
)
def test_what_cannot_be_is_named(argument, message):
    with pytest.raises(UserError, match=message):
        parse(VAERun, [argument])


def test_combinations_that_cannot_be_are_refused_before_anything_is_written(picture_folder, tmp_path):
    with pytest.raises(UserError, match="kl_target=5.0 learns the weight of the KL by itself"):
        train_vae(picture_folder, tmp_path / "run", "model.posterior.kl_target=5", "model.posterior.beta=2")
    assert not (tmp_path / "run").exists()


def test_help_names_the_program_and_its_own_defaults():
    text = help_text(VAERun)
    assert "usage: accelerate launch train/vae.py" in text
    assert "  loss.reconstruction=gaussian " in text
    assert "  model.posterior.kl_target=null " in text
