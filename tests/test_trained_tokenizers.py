"""The measuring of trained tokenizers by hand, and the memory that a command takes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import trained_tokenizers
from processes import run
from trained_tokenizers import (
    Pictures,
    TrainedRun,
    counted_on_crops,
    figures_of_all,
    launched,
    measured,
    read_pictures,
    steps_per_second,
    summaries,
    train_ours,
)

from train.config import UserError, parse
from train.settings import TokenizerRun

PEAK_MEMORY = str(Path(__file__).parents[1] / "benchmarks/peak_memory.py")
MEGABYTE = 2**20


def test_the_error_is_that_of_clamped_pictures_over_the_variance():
    pictures = Pictures(torch.empty(0), torch.full((50, 3, 32, 32), 51, dtype=torch.uint8), variance=0.5)  # 0.2
    tokens = torch.arange(64).view(1, 8, 8).expand(50, 8, 8)
    figures = measured(lambda images: (images - 0.6, tokens[: len(images)]), pictures, 128)
    assert figures["test_nmse"] == pytest.approx(0.2**2 / 0.5)  # not 0.6: -0.4 is clamped to 0
    assert figures["test_psnr"] == pytest.approx(13.979, abs=1e-3)
    assert (figures["usage"], figures["perplexity"]) == pytest.approx((0.5, 64))
    assert (figures["bits_per_image"], figures["tokens_per_code"]) == (64 * 7, 25)


def test_a_summary_states_the_share_under_the_first_and_the_spread():
    rows = {"reference": [{"test_nmse": 0.05}, {"test_nmse": 0.07}], "ours": [{"test_nmse": 0.045}]}
    reference, ours = summaries(rows)
    assert reference["test_nmse"] == pytest.approx(0.06)
    assert reference["deviation"] == pytest.approx(0.0141421, abs=1e-6)
    assert ours["under_the_first"] == pytest.approx(0.25)
    assert ours["deviation"] is None


def test_the_speed_is_the_median_of_the_log_in_whole_steps(tmp_path):
    (tmp_path / "run.yaml").write_text("batch_size: 4\noptimizer: {accumulation_steps: 2}\n")
    lines = [{"step": 1, "images_per_second": 8}, {"step": 2, "psnr": 20.0}]
    lines += [{"step": step, "images_per_second": speed} for step, speed in ((2, 80), (3, 96))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert steps_per_second(tmp_path) == 80 / 8


def test_the_codes_in_use_on_training_crops_are_those_of_the_last_evaluation(tmp_path):
    counted = [{"usage": share, "perplexity": 9.0, "tokens_per_code": 20.0} for share in (0.5, 0.75)]
    lines = [{"step": 1, "psnr": 20.0, **counted[0]}, {"step": 2, "psnr": 21.0, **counted[1]}, {"step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert counted_on_crops(tmp_path) == counted[1]


@pytest.mark.skipif(sys.platform == "win32", reason="no resident set to ask for")
def test_the_peak_is_that_of_the_largest_process_below_and_not_of_the_caller(tmp_path):
    peaks = []
    for size in (0, 100):
        allocate = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray({size} * 2**20)'])"
        done = run([sys.executable, PEAK_MEMORY, str(tmp_path / "peak"), sys.executable, "-c", allocate])
        assert done.returncode == 0, done.stderr
        peaks.append(int((tmp_path / "peak").read_text()))
    assert peaks[0] < 60 * MEGABYTE  # a bare interpreter, while this process holds torch
    assert 90 * MEGABYTE < peaks[1] - peaks[0] < 110 * MEGABYTE


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 128 + 9)])
def test_a_failing_command_fails_as_it_did(tmp_path, ending, code):
    command = [sys.executable, "-c", f"import os, sys; {ending}"]
    assert run([sys.executable, PEAK_MEMORY, str(tmp_path / "peak"), *command]).returncode == code


def test_the_time_and_the_peak_of_several_launches_are_told_together(tmp_path):
    spent = []
    for size, code in ((100, 3), (0, 0)):
        allocate = f"import sys; bytearray({size} * 2**20); sys.exit({code})"
        exit_code, told = launched([sys.executable, "-c", allocate], tmp_path)
        assert exit_code == code
        spent.append(told)
    first, both = spent
    assert both["seconds"] > first["seconds"] > 0
    assert both["peak_memory"] == first["peak_memory"] > 100 * MEGABYTE


def test_what_was_measured_on_other_pictures_is_refused(tmp_path):
    made = []

    def make(path: Path, seed: int) -> dict[str, int]:
        path.mkdir(parents=True)
        made.append(seed)
        return {"seed": seed}

    pictures = Pictures(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 1.0)
    for _ in range(2):
        rows = figures_of_all(tmp_path, {"mine": make}, [3, 4], pictures)
        assert [row["seed"] for row in rows["mine"]] == made == [3, 4]
    others = Pictures(pictures.train + 1, pictures.test, 1.0)
    with pytest.raises(UserError, match="mine_3 was trained and measured on other pictures"):
        figures_of_all(tmp_path, {"mine": make}, [3], others)


def test_pictures_that_a_seed_would_train_on_are_not_measured(colours):
    config = parse(TrainedRun, [f"data={colours / 'train'}"])
    with pytest.raises(UserError, match=r"has no split but train; name one to measure on: eval_split="):
        read_pictures(config, channels=3, side=8)
    assert len(read_pictures(parse(TrainedRun, [f"data={colours}"]), channels=3, side=8).test) == 8


def test_the_training_program_reads_the_data_as_the_measuring_does(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(trained_tokenizers, "launched", lambda command, path: (commands.append(command), (1, {}))[1])
    config = parse(TrainedRun, ["data=org/name", "data_options.image_column=a b", "data_options.subset=small"])
    with pytest.raises(UserError, match="steps=3 could not be trained"):
        train_ours("steps=3", None, config, tmp_path, 5)
    run = parse(TokenizerRun, commands[0][commands[0].index("train/vqvae.py") + 1 :])
    assert (run.data_options.image_column, run.data_options.subset) == ("a b", "small")
    assert (run.data, run.seed, run.steps) == ("org/name", 5, 3)
