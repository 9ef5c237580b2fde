"""Settings of the training programs, and how they travel.

defaults of a dataclass < preset YAML < key=value on the command line -> one typed, checked object -> run.yaml.
"""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenizer import QUANTIZERS, TokenizerConfig
from tokenizer.autoencoder import AUTOENCODERS
from tokenizer.pretrained import unknown_key

TABLES = {"autoencoder": AUTOENCODERS, "quantizer": QUANTIZERS}  # settings that name a class and its hyperparameters


class UserError(Exception):
    """What the user gave cannot be: one line with the value, the rule and the way out."""

    exit_code = 2


class RunError(UserError):
    """What stops a job that was running: one line with what happened and how to go on."""

    exit_code = 1


@dataclass
class OptimizerSettings:
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # and of their squares
    weight_decay: float = 0.0  # decoupled, times the learning rate
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    accumulation_steps: int = 1  # batches whose gradients make one step
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a NaN or infinite loss or gradient does to the run


@dataclass
class AverageSettings:
    decay: float = 0.0  # per step, of averaged weights and codebook statistics, which are then what is kept; 0: none


@dataclass
class DataSettings:
    subset: str | None = None  # of a Hub dataset that has several ("configs" there)
    image_column: str | None = None  # default: the only column of images
    label_column: str | None = None  # default: the only column of classes, where there is one
    flip: bool = True  # mirror half of the training images
    shuffle_colors: float | None = None  # share of crops with shuffled channels; default 0.5 if data=photographs
    shuffle_buffer: int = 1000  # images held to shuffle a stream
    max_corrupt_fraction: float = 0.01  # share of unreadable images that stops the run
    eval_images: int = 256  # at most so many validation images, the first ones


@dataclass
class LossSettings:
    reconstruction: Literal["l1", "l2"] = "l2"  # on the [0, 1] scale, mean over pixels and channels
    reconstruction_weight: float = 10.0  # against the losses of the quantizer


@dataclass
class SpeedSettings:
    compile: bool = False  # torch.compile; needs a C++ compiler on CPU
    threads: int | None = None  # of each rank on CPU; default: the cores shared among the ranks of the machine


@dataclass
class CardSettings:
    license: str | None = None  # of the trained weights; required to publish
    data: str | None = None  # what the data is; default: the setting `data`
    data_license: str | None = None  # required to publish


@dataclass
class TokenizerRun:
    """Settings of train/vqvae.py. Those left empty that depend on the run's length follow `steps`."""

    data: str = "photographs"  # embedded ones; or a folder, a file, a pattern, or a Hub id such as uoft-cs/cifar10
    split: str = "train"  # split to train on
    eval_split: str | None = None  # default: validation, else test, else a seeded 2% of the training split held out
    streaming: bool = False  # read the data as it comes, never the whole of it on disk
    image_size: int = 64  # pixels, side of the random training crop; limits nothing afterwards
    output_dir: str = "runs/vqvae"  # the run's folder
    steps: int = 700  # optimizer steps
    batch_size: int = 16  # images per rank and optimizer step, or per batch that is accumulated
    learning_rate: float = 1.5e-3  # highest, after the warm-up; then a cosine down to zero
    warmup_steps: int | None = None  # optimizer steps; default steps // 20
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # of the networks; quantizer and losses stay in float32
    seed: int = 0  # of weights, order, crops and codes
    num_workers: int = 2  # processes per rank that decode images
    eval_every: int | None = None  # steps; default steps // 10
    save_every: int | None = None  # steps between checkpoints; default steps // 10
    keep_checkpoints: int = 2  # older ones are deleted
    log_with: Literal["tensorboard", "wandb"] | None = None  # beside metrics.jsonl
    push_to_hub: str | None = None  # repo id to publish to, or null
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    average: AverageSettings = field(default_factory=AverageSettings)
    data_options: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    card: CardSettings = field(default_factory=CardSettings)

    def __post_init__(self) -> None:
        for name in ("image_size", "steps", "batch_size", "eval_every", "save_every", "keep_checkpoints"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "be >= 1")
        require(self.num_workers >= 0, f"num_workers={self.num_workers}", "be >= 0")
        require(0 <= self.average.decay < 1, f"average.decay={self.average.decay}", "lie in [0, 1)")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate}", "be above 0")
        require(
            self.warmup_steps is None or 0 <= self.warmup_steps <= self.steps,
            f"warmup_steps={self.warmup_steps}",
            f"lie in 0..steps={self.steps}",
        )
        if self.warmup_steps is None:
            self.warmup_steps = self.steps // 20
        if self.data_options.shuffle_colors is None:
            self.data_options.shuffle_colors = 0.5 if self.data == "photographs" else 0.0
        share = self.data_options.shuffle_colors
        require(0 <= share <= 1, f"data_options.shuffle_colors={share}", "lie in [0, 1]")
        self.eval_every = self.eval_every or max(1, self.steps // 10)
        self.save_every = self.save_every or max(1, self.steps // 10)
        if self.push_to_hub:
            missing = [f"card.{name}=..." for name in ("license", "data_license") if not getattr(self.card, name)]
            require(not missing, f"push_to_hub={self.push_to_hub}", f"come with {' and '.join(missing)}")


def require(condition: bool, given: str, rule: str) -> None:
    """Raise the ValueError that a setting breaks a rule."""
    if not condition:
        raise ValueError(f"{given} must {rule}")


def launch(main: Callable[[Any], None], config_class: type) -> None:
    """Run a program on the command line's settings; a UserError becomes one line on stderr and the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        main(parse(config_class, sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def parse(config_class: type, arguments: list[str]) -> Any:
    """`[preset.yaml] [key=value ...]` to a checked object of `config_class`; UserError for what cannot be.

    `--help` prints every key with its default and its comment and exits.
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text(config_class))
        sys.exit(0)
    presets = [argument for argument in arguments if argument.endswith((".yaml", ".yml")) and "=" not in argument]
    settings = [argument for argument in arguments if argument not in presets]
    for argument in settings:
        if "=" not in argument:
            raise UserError(f"argument {argument!r} is neither a preset (*.yaml) nor key=value; --help lists the keys")
    try:
        merged = OmegaConf.structured(config_class)
        for layer in [*map(read_preset, presets), OmegaConf.to_container(OmegaConf.from_dotlist(settings))]:
            check_keys(config_class, layer, "")
            drop_replaced_choices(merged, layer)
            merged = OmegaConf.merge(merged, layer)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{key}{str(error).splitlines()[0]}; --help lists the keys and their types") from None
    except ValueError as error:
        raise UserError(str(error)) from None


def read_preset(path: str) -> dict[str, Any]:
    """A preset as a layer of settings."""
    try:
        layer = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UserError(f"preset {path} cannot be read ({error.strerror}); presets are in train/presets") from None
    except yaml.YAMLError as error:
        raise UserError(f"preset {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(layer, dict):
        raise UserError(f"preset {path} must hold `key: value` lines")
    return layer


def check_keys(config_class: type, layer: dict[str, Any], prefix: str) -> None:
    """Raise ValueError for a key that no setting has; mappings such as model.quantizer check their own."""
    hints = get_type_hints(config_class)
    for key, value in layer.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in hints], "the settings")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key}={value!r} must be given as {prefix}{key}.KEY=..., it is a group")
            check_keys(hints[key], value, f"{prefix}{key}.")


def drop_replaced_choices(merged: DictConfig, layer: dict[str, Any]) -> None:
    """Where a layer names another class of a table, drop the hyperparameters of the one that it replaces."""
    for part, chosen in layer.get("model", {}).items():
        if isinstance(chosen, dict) and chosen.get("name", merged.model[part].name) != merged.model[part].name:
            merged.model[part] = {"name": chosen["name"]}


def help_text(config_class: type) -> str:
    """Every key with its default and its comment, one a line."""
    program = config_class.__doc__.split()[2].rstrip(".")
    lines = [f"usage: accelerate launch {program} [preset.yaml] [key=value ...]", ""]
    for key, default, comment in settings_of(config_class):
        lines.append(
            f"  {key}={'null' if default is None else default}".ljust(48) + (f"  {comment}" if comment else "")
        )
    return "\n".join(lines)


def settings_of(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, comment) of every setting, groups and choices of a table opened up."""
    comments, defaults, hints = comments_in(config_class), config_class(), get_type_hints(config_class)
    for part in fields(config_class):
        default = getattr(defaults, part.name)
        if is_dataclass(hints[part.name]):
            yield from settings_of(hints[part.name], f"{prefix}{part.name}.")
        elif part.name in TABLES:
            table, inner = TABLES[part.name], comments_in(TABLES[part.name][default["name"]].__init__)
            inner["name"] = f"one of {', '.join(table)}"
            yield from ((f"{prefix}{part.name}.{key}", value, inner.get(key, "")) for key, value in default.items())
        else:
            yield f"{prefix}{part.name}", default, comments.get(part.name, "")


def comments_in(documented: Any) -> dict[str, str]:
    """The comment beside each annotated name in the source of a dataclass or a function."""
    return dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(documented), re.M))


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ between two nested mappings, with both values."""
    found = {}
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            found |= differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found[f"{prefix}{key}"] = (mine, other)
    return found


def to_yaml(config: Any) -> str:
    """Every setting as YAML, in the order of the dataclass."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
