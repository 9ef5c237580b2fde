"""The training program: real processes for kills, signals, ranks and disks; the rest in this one."""

import errno
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from hub_server import serve_hub
from processes import TWO_RANKS, assert_close_runs, assert_equal_runs, interrupt, records, run
from safetensors.torch import load_file
from tiny_runs import TINY, train_here

from tokenizer import ImageTokenizer, TokenizerConfig
from tokenizer.metrics import psnr
from train.checkpoint import RunFolder
from train.config import RunError, UserError, launch, parse
from train.data import evaluation_batches
from train.evaluation import TokenizerExaminer
from train.losses import ReconstructionLoss
from train.optimization import learning_rate
from train.settings import TokenizerRun
from train.sources import open_sources
from train.vqvae import main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("fresh_accelerator")

FIRST_KERNEL = "autoencoder.encoder.conv_in.weight"
PROGRAM = str(ROOT / "train" / "vqvae.py")


def command(folder: str, output: Path, *settings: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, PROGRAM, *TINY, f"data={folder}", f"output_dir={output}", *settings]


@pytest.fixture(scope="module")
def undisturbed(picture_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    done = run(command(picture_folder, output, launcher=launcher))
    assert done.returncode == 0, done.stderr
    assert "step 10/10: loss" in done.stderr
    assert all(word in done.stderr for word in ("PSNR", "usage", "images/s", "left"))
    return output


def test_a_run_leaves_the_promised_folder(undisturbed):
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "README.md", "run.yaml", "metrics.jsonl"} <= names
    assert {"samples/step_000005.png", "samples/step_000010.png"} <= names
    steps = [record["step"] for record in records(undisturbed) if "loss" in record]
    assert steps == list(range(1, 11))
    evaluated = [record for record in records(undisturbed) if "psnr" in record]
    assert [record["step"] for record in evaluated] == [5, 10]
    assert evaluated[-1]["tokens_per_code"] >= 20
    tokenizer = ImageTokenizer.from_pretrained(undisturbed)
    tokens = tokenizer.encode(torch.rand(1, 3, 16, 16))
    assert tokens.shape == (1, 8, 8)
    assert f"{evaluated[-1]['psnr']:.6g}" in (undisturbed / "README.md").read_text()


def test_the_figures_are_those_of_the_exported_tokenizer_whose_weights_are_averages(undisturbed, picture_folder):
    config = parse(TokenizerRun, [*TINY, f"data={picture_folder}", f"output_dir={undisturbed}"])
    tokenizer, (source, rows) = ImageTokenizer.from_pretrained(undisturbed), open_sources(config)
    pictures = [images for images, _ in evaluation_batches(source, rows, config, tokenizer.downsample_factor)]
    values = [psnr(tokenizer.decode(tokenizer.encode(images)), images / 255) for images in pictures]
    assert records(undisturbed)[-1]["psnr"] == pytest.approx(torch.cat(values).mean().item(), abs=1e-4)
    trained = load_file(undisturbed / "checkpoints/step_10/model.safetensors")  # as the last step left them
    exported = load_file(undisturbed / "model.safetensors")
    assert not torch.equal(trained[FIRST_KERNEL], exported[FIRST_KERNEL])


def test_the_card_names_no_folder_that_the_run_lay_in_or_read(undisturbed, picture_folder):
    card = (undisturbed / "README.md").read_text()
    assert all(f"\n{said}\n" in card for said in (f"data: {Path(picture_folder).name}", "output_dir: run"))
    assert not any(str(place) in card for place in (undisturbed.parent, Path(picture_folder).parent, Path.home()))


def test_old_checkpoints_are_pruned(undisturbed):
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step_10", "step_9"]


def test_a_run_killed_at_any_moment_and_started_again_equals_an_undisturbed_one(undisturbed, picture_folder, tmp_path):
    arguments = command(picture_folder, tmp_path / "run")
    code, _ = interrupt(arguments, signal.SIGKILL, at="step 5/10")
    assert code == -signal.SIGKILL
    assert RunFolder(parse(TokenizerRun, [f"output_dir={tmp_path / 'run'}"])).saved_steps()[-1] < 10
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_equal_runs(undisturbed, tmp_path / "run")


def test_sigterm_saves_and_exits_cleanly_and_the_same_command_goes_on(undisturbed, picture_folder, tmp_path):
    arguments = command(picture_folder, tmp_path / "run", "save_every=10")
    code, told = interrupt(arguments, signal.SIGTERM, at="step 5/10")
    assert code == 130, told
    assert "the same command goes on from there" in told
    stopped_at = RunFolder(parse(TokenizerRun, [f"output_dir={tmp_path / 'run'}"])).saved_steps()
    assert len(stopped_at) == 1
    assert 5 <= stopped_at[0] < 10
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert f"step {stopped_at[0]}/10" not in done.stderr
    assert_equal_runs(undisturbed, tmp_path / "run")


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, picture_folder):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    done = run(command(picture_folder, undisturbed))
    assert done.returncode == 0
    assert "holds the finished run" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}


def test_two_ranks_equal_one_with_twice_the_batch_and_no_other_number_may_go_on(picture_folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(picture_folder, one, "batch_size=8")
    done = run(command(picture_folder, two, launcher=TWO_RANKS))
    assert done.returncode == 0, done.stderr
    assert (two / "checkpoints/step_10/state_1.json").is_file()  # there really were two
    assert_close_runs(one, two)
    psnr = [records(path)[-1]["psnr"] for path in (one, two)]
    assert psnr[0] == pytest.approx(psnr[1], abs=1e-3)

    (two / "README.md").unlink()  # as if stopped before its end
    refused = run(command(picture_folder, two))
    assert refused.returncode == 2
    assert "was saved by 2 processes and this run has 1" in refused.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_good(picture_folder, tmp_path):
    arguments = command(picture_folder, tmp_path / "run", "steps=4", "warmup_steps=0")
    limited = ["bash", "-c", f"ulimit -f 16; exec {' '.join(map(repr, arguments))}"]  # files of at most 16 KiB
    failed = run(limited)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "could not be written" in failed.stderr.splitlines()[-1]
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
    again = run(arguments)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stepz=3"], "unknown key 'stepz' in the settings; did you mean 'steps'?"),
        (["steps=many"], "could not be converted to Integer"),
        (["image_size=15"], "image_size=15 must be a positive multiple of downsample_factor=2"),
        (["warmup_steps=11"], "warmup_steps=11 must lie in 0..steps=10"),
        (["data=./nowhere"], "read as a path"),
        (["model.quantizer.name=nothing"], "quantizer.name='nothing' must be one of"),
        (["model.resize=8"], "image_size=16 is larger than model.resize=8"),
        (["push_to_hub=a/b"], "card.license=..."),
        (["optimizer.accumulation_steps=0"], "optimizer.accumulation_steps=0 must be at least 1"),
        (["optimizer.beta1=1.5"], "optimizer.beta1=1.5 must lie in [0, 1)"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay=-1.0 must be finite and >= 0"),
        (["optimizer.max_grad_norm=-1"], "optimizer.max_grad_norm=-1.0 must be above 0"),
        (["seed=-1"], "seed=-1 must lie in [0, 2^32)"),
        (["seed=4294967296"], "seed=4294967296 must lie in [0, 2^32)"),
        (["loss.reconstruction_weight=-1"], "loss.reconstruction_weight=-1.0 must be finite and >= 0"),
        (["loss.perceptual_weight=nan"], "loss.perceptual_weight=nan must be finite and >= 0"),
        (["mixed_precision=fp16"], "mixed_precision=fp16 changes nothing on a CPU"),
        (["speed.threads=0"], "speed.threads=0 must be at least 1, or null"),
        (["learning_rate=.inf"], "learning_rate=inf must be finite and above 0"),
        (["data_options.eval_images=-1"], "data_options.eval_images=-1 must be at least 1"),
        (["data_options.max_corrupt_fraction=-1"], "data_options.max_corrupt_fraction=-1.0 must lie in [0, 1]"),
        (["data=photographs", "split=test"], "has the splits train and validation alone"),
        (["output_dir=/proc/run"], "output_dir=/proc/run cannot be made (No such file or directory)"),
        (["push_to_hub=a/b", "card.license=mit", "card.data_license=mit"], "must come with card.data=..."),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2_before_anything_is_written(
    settings, message, picture_folder, tmp_path, monkeypatch, capsys
):
    given = [f"data={picture_folder}", f"output_dir={tmp_path / 'run'}", *TINY, *settings]
    monkeypatch.setattr(sys, "argv", [PROGRAM, *given])
    with pytest.raises(SystemExit) as exit_:
        launch(main, TokenizerRun)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_process_itself_prints_one_line_and_exits_with_2(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "pictures" / "broken_too.png").write_bytes(b"nor this")
    done = run(command(str(tmp_path / "pictures"), tmp_path / "run"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: data=")
    assert "none of the first" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", ["steps=12", "learning_rate=0.5", "model.quantizer.decay=0.5", "seed=1"])
def test_a_folder_with_other_settings_is_refused_with_both_values(changed, undisturbed, picture_folder):
    key, _, value = changed.partition("=")
    given = [*TINY, f"data={picture_folder}", f"output_dir={undisturbed}", changed]
    with pytest.raises(Exception, match=rf"{key}={value} \(there .*start this one elsewhere with output_dir=") as error:
        main(parse(TokenizerRun, given))
    assert error.value.exit_code == 2


def rewrite_settings(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    change(settings)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def of_an_older_version(settings: dict[str, Any]) -> None:
    for group, key in [(settings, "split"), (settings["optimizer"], "beta2"), (settings["model"], "num_classes")]:
        del group[key]
    del settings["model"]["quantizer"]["gradient"]
    settings["forgotten"] = 1


def test_a_folder_of_a_version_that_knew_fewer_settings_goes_on(undisturbed, picture_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="train")
    older = rewrite_settings(Path(shutil.copytree(undisturbed, tmp_path / "run")), of_an_older_version)
    main(parse(TokenizerRun, [*TINY, f"data={picture_folder}", f"output_dir={older}"]))
    assert "holds the finished run" in caplog.text


def test_what_a_key_of_the_model_stood_for_before_it_was_there_counts_and_not_its_default(tmp_path):
    residual = ["model.quantizer.name=residual", f"output_dir={tmp_path}"]
    RunFolder(parse(TokenizerRun, residual)).claim(Accelerator())
    rewrite_settings(tmp_path, lambda settings: settings["model"]["quantizer"].pop("refinement"))
    with pytest.raises(UserError, match=r"model.quantizer.refinement=.* \(there 1.0\)"):
        RunFolder(parse(TokenizerRun, [*residual, "model.quantizer.refinement=0.25"])).check()
    RunFolder(parse(TokenizerRun, [*residual, "model.quantizer.refinement=1.0"])).check()


def test_a_run_that_goes_on_sweeps_out_what_a_killed_one_was_writing(tmp_path):
    left = [tmp_path / ".model.safetensors.7.part", tmp_path / "samples" / ".step_000005.png.7.part"]
    folder = RunFolder(parse(TokenizerRun, [f"output_dir={tmp_path}"]))
    folder.claim(Accelerator())
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    folder.claim(Accelerator())
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "tokenizer: runs/vqvae\nviews: center\nsteps: 10\n"])
def test_a_folder_of_another_program_is_refused(picture_folder, tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match="holds what another program made; choose another output_dir="):
        main(parse(TokenizerRun, [*TINY, f"data={picture_folder}", f"output_dir={tmp_path}"]))


def test_a_folder_with_a_setting_in_a_group_that_this_version_lacks_is_refused(undisturbed, picture_folder, tmp_path):
    newer = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    rewrite_settings(newer, lambda settings: settings["average"].update(decays=0.5))
    with pytest.raises(
        UserError, match=r"cannot go on with \(unknown key 'average.decays'.*elsewhere with output_dir="
    ):
        main(parse(TokenizerRun, [*TINY, f"data={picture_folder}", f"output_dir={newer}"]))


def test_the_way_out_of_too_many_unreadable_images_is_open(undisturbed, picture_folder, caplog):
    caplog.set_level("INFO", logger="train")
    main(
        parse(
            TokenizerRun,
            [*TINY, f"data={picture_folder}", f"output_dir={undisturbed}", "data_options.max_corrupt_fraction=0.5"],
        )
    )
    assert "holds the finished run" in caplog.text


def test_a_folder_that_is_no_run_is_refused(picture_folder, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(Exception, match="is no run of ours"):
        train_here(picture_folder, tmp_path)


def test_two_steps_are_a_valid_run_and_defaults_follow_the_length(picture_folder, tmp_path):
    config = parse(TokenizerRun, ["steps=2"])
    assert (config.warmup_steps, config.eval_every, config.save_every) == (0, 1, 1)
    longer = parse(TokenizerRun, ["steps=2000"])
    assert (longer.warmup_steps, longer.eval_every, longer.save_every) == (100, 200, 200)
    train_here(picture_folder, tmp_path / "run", "steps=2", "save_every=null", "eval_every=null")
    assert (tmp_path / "run/README.md").is_file()


def test_the_learning_rate_warms_up_and_ends_near_zero():
    config = TokenizerRun(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step, config.learning_rate) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001


def test_accumulated_batches_equal_one_batch(picture_folder, tmp_path):
    whole = train_here(picture_folder, tmp_path / "whole", "batch_size=8", "model.quantizer.placement=1")
    accumulated = ["batch_size=4", "optimizer.accumulation_steps=2", "model.quantizer.placement=1"]
    halves = train_here(picture_folder, tmp_path / "halves", *accumulated)
    assert whole["quantizer.num_steps"] == halves["quantizer.num_steps"]
    torch.testing.assert_close(whole[FIRST_KERNEL], halves[FIRST_KERNEL], rtol=1e-3, atol=1e-4)


def poison(monkeypatch, at_call: int, times: int = 1):
    """Make the reconstruction loss NaN at one step, as an overflow would."""
    plain, calls = ReconstructionLoss.forward, []

    def poisoned(*arguments):
        calls.append(None)
        losses = plain(*arguments)
        bad = at_call <= len(calls) < at_call + times
        return {name: loss * torch.nan if bad else loss for name, loss in losses.items()}

    monkeypatch.setattr(ReconstructionLoss, "forward", poisoned)


def test_weights_that_grew_beyond_all_numbers_are_told_of_by_the_evaluation(picture_folder, tmp_path):
    settings = ["learning_rate=1e30", "warmup_steps=0", "eval_every=1"]
    with pytest.raises(RunError, match="validation pictures are decoded to NaN, the weights have grown too large"):
        train_here(picture_folder, tmp_path / "run", *settings)


def test_a_full_disk_is_one_line_and_any_other_error_is_not_hidden(tmp_path, monkeypatch, capsys):
    def full(config: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "picture.png")

    monkeypatch.setattr(sys, "argv", [PROGRAM])
    with pytest.raises(SystemExit) as ended:
        launch(full, TokenizerRun)
    assert ended.value.code == 1
    told = "error: No space left on device; make room, the same command goes on from what was saved\n"
    assert capsys.readouterr().err == told

    def missing(config: object) -> None:
        raise FileNotFoundError("picture.png")

    with pytest.raises(FileNotFoundError, match="picture.png"):
        launch(missing, TokenizerRun)


def test_a_nonfinite_loss_stops_the_run_naming_the_term_and_the_last_good_checkpoint(
    picture_folder, tmp_path, monkeypatch
):
    poison(monkeypatch, at_call=6)
    with pytest.raises(RunError, match="step 6: l2 not finite; the last checkpoint is of step 5; .*on_nonfinite=skip"):
        train_here(picture_folder, tmp_path / "run")


def test_a_nonfinite_step_can_be_skipped_and_leaves_no_trace(picture_folder, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, at_call=6)
    tensors = train_here(picture_folder, tmp_path / "run", "optimizer.on_nonfinite=skip", "keep_checkpoints=10")
    assert "step 6 skipped: l2 not finite" in caplog.text
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    five, six = (load_file(tmp_path / f"run/checkpoints/step_{step}/model.safetensors") for step in (5, 6))
    assert all(torch.equal(five[key], six[key]) for key in five)


def test_a_run_that_only_skips_ends(picture_folder, tmp_path, monkeypatch):
    poison(monkeypatch, at_call=2, times=1000)
    with pytest.raises(RunError, match="l2 not finite") as error:
        train_here(picture_folder, tmp_path / "run", "optimizer.on_nonfinite=skip", "steps=60", "save_every=60")
    assert "on_nonfinite" not in str(error.value)  # it is set already


def test_collapse_is_warned_of(caplog):
    model, config = ImageTokenizer(TokenizerConfig()), TokenizerRun(steps=100)
    examiner = TokenizerExaminer(model, ReconstructionLoss(config.loss), config, Accelerator(cpu=True), None, [])
    examiner.warn(100, {"usage": 0.9})
    examiner.warn(10, {"usage": 0.1})
    assert not caplog.text
    examiner.warn(50, {"usage": 0.1})
    assert "only 10% of the codes are in use" in caplog.text


def test_trackers_get_the_figures(picture_folder, tmp_path):
    train_here(picture_folder, tmp_path / "run", "log_with=tensorboard", "steps=2", "warmup_steps=0")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_a_run_is_published_and_a_failed_upload_loses_nothing(picture_folder, tmp_path):
    output = tmp_path / "run"
    publish = ["push_to_hub=me/pictures", "card.license=mit", "card.data=small pictures", "card.data_license=cc0-1.0"]
    arguments = command(picture_folder, output, "steps=2", "warmup_steps=0", *publish)
    with serve_hub(token="secret") as hub:
        connection = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        refused = run(arguments, **connection, HF_TOKEN="wrong")
        assert refused.returncode == 2  # before any training
        assert "push_to_hub=me/pictures cannot be created" in refused.stderr
        assert not output.exists()

        hub.fail_commits[:] = [403]
        failed = run(arguments, **connection, HF_TOKEN="secret")
        assert failed.returncode == 1
        assert "all is safe in" in failed.stderr.splitlines()[-1]
        fingerprint = ImageTokenizer.from_pretrained(output).fingerprint

        published = run(arguments, **connection, HF_TOKEN="secret")
        assert published.returncode == 0, published.stderr
        files = hub.repos["me/pictures"][-1].files
    assert {"config.json", "model.safetensors", "README.md", "sample.png"} <= files.keys()
    card = files["README.md"].decode()
    for said in ("license: mit", 'from_pretrained("me/pictures")', "small pictures", "cc0-1.0", "psnr", fingerprint):
        assert said in card
