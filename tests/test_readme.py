"""The README's commands and programs run as written, at a few steps."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import picture

from prior import AutoregressivePrior, PriorConfig
from tokenizer import ImageTokenizer, ImageVAE, TokenizerConfig, VAEConfig
from train.config import parse
from train.settings import PriorRun, StoreRun, TokenizerRun, VAERun

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith("accelerate launch train/")]
SETTINGS = {"vqvae": TokenizerRun, "vae": VAERun, "encode_dataset": StoreRun, "token_prior": PriorRun}
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def a_finished_run(tmp_path, monkeypatch):
    """A folder with runs/vqvae, runs/prior, runs/vae and picture.jpg, as a reader has it after the first commands."""
    tokenizer = ImageTokenizer(TokenizerConfig())
    tokenizer.save_pretrained(tmp_path / "runs" / "vqvae")
    ImageVAE(VAEConfig()).save_pretrained(tmp_path / "runs" / "vae")
    network = {"width": 16, "num_layers": 1, "num_heads": 2}
    config = PriorConfig(tokenizer.vocab_size, [16, 16], tokenizer_fingerprint=tokenizer.fingerprint, **network)
    AutoregressivePrior(config).save_pretrained(tmp_path / "runs" / "prior")
    picture(0, 150, 100).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_each_program_runs(program, a_finished_run):
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    for pictures in (names.get("pictures"), names.get("picture")):
        if pictures is not None:
            assert pictures.shape[1] == 3
            assert torch.all((pictures >= 0) & (pictures <= 1))


def test_the_programs_are_found():
    assert len(PROGRAMS) >= 3
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", [line for line in COMMANDS if "--help" not in line])
def test_the_settings_of_each_command_are_valid(command):
    program, *arguments = shlex.split(command.removeprefix("accelerate launch train/"), comments=True)
    presets = [str(ROOT / each) if each.startswith("train/presets/") else each for each in arguments]
    parse(SETTINGS[program.removesuffix(".py")], presets)


def test_the_settings_of_the_measuring_command_are_valid(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from reconstruction import ReconstructionRun

    (command,) = re.findall(r"^accelerate launch benchmarks/reconstruction.py mine (.*)$", README, re.M)
    assert parse(ReconstructionRun, shlex.split(command)).tokenizers == ["runs/mine", "you/name"]


@pytest.mark.slow
def test_the_three_commands_to_a_generator_run_one_after_the_other(tmp_path):
    section = README[README.index("## From pictures to a generator") :]
    lines = re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()
    short = [["steps=2"], ["num_crops=2"], ["steps=1", "eval_grids=2", "batch_size=2", "tokens=tokens"]]
    for line, settings in zip(lines, short, strict=True):
        program = shlex.split(line, comments=True)[2]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / program)]
        subprocess.run([*launcher, *settings], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert ImageTokenizer.from_pretrained(tmp_path / "runs/vqvae").encode(picture(0, 64, 48)).shape == (1, 12, 16)
    prior = AutoregressivePrior.from_pretrained(tmp_path / "runs/prior")
    assert prior.generate(num_samples=1).shape == (1, 16, 16)


def test_the_map_names_every_file_and_only_files_that_are_there():
    rows = re.findall(r"^\| (`[^|]*`) \|", README[README.index("## Map of the files") :], re.M)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert all((ROOT / name).exists() for name in named)
    rooms = ("tokenizer", "prior", "train", "benchmarks")
    files = {str(path.relative_to(ROOT)) for room in rooms for path in (ROOT / room).glob("*.py")}
    assert files - named == {"tokenizer/__init__.py", "prior/__init__.py", "train/__init__.py"}


def test_the_tables_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from tables import with_tables

    assert with_tables(README) == README


def test_the_recorded_default_prior_is_as_good_and_as_quick_as_promised():
    recorded = json.loads((ROOT / "benchmarks/results/token_prior_photographs.json").read_text())
    metrics = recorded["metrics"]
    assert metrics["bits_per_token"] <= 0.75 * metrics["unigram_bits_per_token"]
    assert recorded["seconds"] <= 5 * 60
