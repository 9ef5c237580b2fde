"""No setting is dead, and those that are said to leave the result as it is do so: runs that differ in one each."""

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from processes import assert_same, records
from tiny_priors import fill_with_a_store, train_prior
from tiny_runs import TINY, train_here

from tokenizer import processor
from train.settings import PriorRun, TokenizerRun

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

RUNS = {"vqvae": TokenizerRun, "token_prior": PriorRun}
SHORT = ["steps=4", "eval_every=2", "save_every=4", "average.decay=0"]
STREAM = ["streaming=true"]
GAUSSIAN = ["loss.reconstruction=gaussian"]
PERCEPTUAL = ["loss.perceptual=squeeze", "image_size=18"]
ADVERSARIAL = [
    *("adversarial.loss=hinge", "adversarial.num_layers=1", "adversarial.base_channels=4"),
    *("adversarial.start_step=0", "adversarial.ramp_steps=0", "adversarial.lecam_weight=1"),
]

# A value other than that of the run above or the default, and the settings without which it would mean nothing.
OF_TRAINING = {
    "steps": ("5", []),
    "batch_size": ("3", []),
    "learning_rate": ("0.01", []),
    "warmup_steps": ("2", []),
    "mixed_precision": ("bf16", []),
    "seed": ("1", []),
    "eval_every": ("1", []),
    "optimizer.name": ("muon", []),
    "optimizer.beta1": ("0.5", []),
    "optimizer.beta2": ("0.5", []),
    "optimizer.weight_decay": ("1", []),
    "optimizer.max_grad_norm": ("0.01", []),
    "optimizer.accumulation_steps": ("2", []),
    "average.decay": ("0.5", []),
}
CHANGES = {
    "vqvae": OF_TRAINING
    | {
        "split": ("validation", ["eval_split=validation"]),
        "eval_split": ("train", []),
        "streaming": ("true", []),
        "image_size": ("8", []),
        "num_workers": ("2", STREAM),
        "data_options.flip": ("false", []),
        "data_options.shuffle_colors": ("1", []),
        "data_options.shuffle_buffer": ("2", STREAM),
        "data_options.eval_images": ("2", []),
        "loss.reconstruction": ("l1", []),
        "loss.reconstruction_weight": ("1", []),
        "loss.sigma": ("0.5", GAUSSIAN),
        "loss.sigma_learning_rate": ("0.1", GAUSSIAN),
        "loss.perceptual": ("squeeze", ["image_size=18"]),
        "loss.perceptual_weight": ("0.1", PERCEPTUAL),
        "adversarial.loss": ("non_saturating", ADVERSARIAL),
        "adversarial.weight": ("0.5", ADVERSARIAL),
        "adversarial.adaptive": ("false", ADVERSARIAL),
        "adversarial.max_adaptive_weight": ("1e-6", ADVERSARIAL),
        "adversarial.start_step": ("2", ADVERSARIAL),
        "adversarial.ramp_steps": ("3", ADVERSARIAL),
        "adversarial.lecam_weight": ("0", ADVERSARIAL),
        "adversarial.lecam_decay": ("0.1", ADVERSARIAL),
        "adversarial.learning_rate": ("0.01", ADVERSARIAL),
        "adversarial.beta1": ("0.9", ADVERSARIAL),
        "adversarial.base_channels": ("8", ADVERSARIAL),
        "adversarial.num_layers": ("2", ADVERSARIAL),
    },
    "token_prior": OF_TRAINING
    | {
        "conditional": ("false", []),
        "eval_grids": ("2", []),
        "model.width": ("32", []),
        "model.num_layers": ("1", []),
        "model.num_heads": ("1", []),
        "model.dropout": ("0", []),
        "model.class_dropout": ("0.9", []),
    },
}
OF_ANY = {"save_every": "1", "keep_checkpoints": "1", "log_with": "tensorboard"}
FREE = {
    "vqvae": OF_ANY | {"data_options.max_corrupt_fraction": "0.5", "num_workers": "1"},
    "token_prior": OF_ANY,
}
# What the data or a fault must be like for them to count, and what changes rounding or nothing at all.
HELD_ELSEWHERE = {"output_dir", "push_to_hub", "card.license", "card.data", "card.data_license"}
HELD_ELSEWHERE |= {"optimizer.on_nonfinite", "speed.threads", "speed.compile"}
ELSEWHERE = {
    "vqvae": HELD_ELSEWHERE | {"data", "data_options.subset", "data_options.image_column", "data_options.label_column"},
    "token_prior": HELD_ELSEWHERE | {"tokens", "tokenizer", "speed.activation_checkpointing"},
}


def leaves(settings: dict[str, Any], before: str = "") -> Iterator[str]:
    """The dotted keys of all settings but a tokenizer's own config, whose hyperparameters have tests of their own."""
    for name, value in settings.items():
        if isinstance(value, dict) and "format_version" not in value and "autoencoder" not in value:
            yield from leaves(value, f"{before}{name}.")
        elif not isinstance(value, dict):
            yield before + name


@pytest.fixture(scope="module")
def result(two_classes, tmp_path_factory):
    """What runs of a program with some settings come to, each of them run once: tensors and figures."""
    store = fill_with_a_store(tmp_path_factory.mktemp("made"))

    @functools.cache
    def result(program: str, *settings: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
        folder = tmp_path_factory.mktemp("run") / "run"
        if program == "vqvae":
            return train_here(two_classes, folder, *SHORT, *settings, tiny=TINY), records(folder)
        return train_prior(store, folder, *SHORT, *settings), records(folder)

    return result


@pytest.mark.parametrize("program", RUNS)
def test_every_setting_is_in_one_of_the_tables(program):
    run, free = RUNS[program], FREE[program].keys() - CHANGES[program].keys()
    assert set(leaves(asdict(run()))) == CHANGES[program].keys() | free | ELSEWHERE[program]
    assert free <= set(run().free_settings)


@pytest.mark.parametrize(("program", "key"), [(program, key) for program in RUNS for key in CHANGES[program]])
def test_another_value_gives_another_run(program, key, result, squeeze_home, monkeypatch):
    value, context = CHANGES[program][key]
    if key == "mixed_precision":  # or kernels in float32 might do all of a small network
        monkeypatch.setattr(processor, "bfloat16_is_faster", lambda: True)
    assert differ(result(program, *context), result(program, *context, f"{key}={value}"))


@pytest.mark.parametrize(("program", "key"), [(program, key) for program in RUNS for key in FREE[program]])
def test_a_free_setting_leaves_the_run_as_it_is(program, key, result):
    assert not differ(result(program), result(program, f"{key}={FREE[program][key]}"))


def differ(*results: tuple[dict[str, torch.Tensor], list[dict]]) -> bool:
    try:
        assert_same(*results)
    except AssertionError:
        return True
    return False
