"""Training with every quantizer of the table: the program itself, two real ranks, and going on after a halt."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import two_rank_training
from processes import records, run
from safetensors.torch import load_file
from tiny_runs import WITH_ANY_QUANTIZER, assert_resumes_to_the_bit, train_here

from tokenizer import QUANTIZERS, ImageTokenizer

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

NOISY = {"gumbel_vq"}  # each rank draws noise of its own, which no one rank can repeat


def train_with(name: str, folder: str, output: Path, *settings: str) -> None:
    train_here(folder, output, f"model.quantizer.name={name}", *settings, tiny=WITH_ANY_QUANTIZER)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_a_tokenizer_with_any_quantizer_trains_loads_encodes_and_decodes(name, picture_folder, tmp_path):
    train_with(name, picture_folder, tmp_path, "steps=3", "eval_every=3", "save_every=3")
    losses = [record for record in records(tmp_path) if "loss" in record]
    assert losses[-1]["step"] == 3
    tokenizer = ImageTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer.quantizer) is QUANTIZERS[name]
    images = torch.rand(2, 3, 16, 16)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, *tokenizer.token_shape(16))
    assert torch.equal(tokenizer.decode(tokens), tokenizer(images).reconstructions.clamp(0, 1))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """What two real ranks end with, for every quantizer of the table."""
    output = tmp_path_factory.mktemp("ranks")
    done = run([sys.executable, two_rank_training.__file__, str(output)])
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_two_ranks_end_alike_and_as_one_with_twice_the_batch(name, two_ranks):
    first, second = (load_file(two_ranks / f"{name}_{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    one = two_rank_training.train(name, rank=0, num_ranks=1)
    if name not in NOISY:
        torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vq", "gumbel_vq"])
def test_an_interrupted_run_goes_on_to_the_bit(name, picture_folder, tmp_path, monkeypatch):
    train = functools.partial(train_with, name)
    assert_resumes_to_the_bit(picture_folder, ["model.quantizer.codebook_size=32"], tmp_path, monkeypatch, train)


def test_an_optimizer_of_kernels_and_weight_decay_leave_codes_alone(picture_folder, tmp_path):
    """No loss moves IBQ's codes here, so whatever does is the optimizer's own doing."""
    nothing = [f"model.quantizer.{term}_weight=0" for term in ("commitment", "codebook", "index", "entropy")]
    kept = ["optimizer.name=muon", "optimizer.weight_decay=1", "learning_rate=0.1", "loss.reconstruction_weight=0"]
    train_with("ibq", picture_folder, tmp_path, *nothing, *kept, "steps=3", "save_every=1", "keep_checkpoints=3")
    first, last = (load_file(tmp_path / f"checkpoints/step_{step}/model.safetensors") for step in (1, 3))
    assert torch.equal(first["quantizer.codes.weight"], last["quantizer.codes.weight"])
    key = "autoencoder.encoder.conv_in.weight"
    assert not torch.equal(first[key], last[key])
