"""How settings travel, and how a program ends.

defaults of a dataclass < preset YAML < key=value on the command line -> one typed, checked object -> run.yaml.
"""

import errno
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenizer import POSTERIORS, QUANTIZERS
from tokenizer.autoencoder import AUTOENCODERS
from tokenizer.choices import complete
from tokenizer.pretrained import unknown_key

# Settings that name a class and its hyperparameters.
TABLES = {"autoencoder": AUTOENCODERS, "quantizer": QUANTIZERS, "posterior": POSTERIORS}


class UserError(Exception):
    """What the user gave cannot be: one line with the value, the rule and the way out."""

    exit_code = 2


class RunError(UserError):
    """What stops a job that was running: one line with what happened and how to go on."""

    exit_code = 1


class Stopped(Exception):
    """A job was asked to end, has told so, and left its output as far as it came."""

    exit_code = 130  # a shell's for Ctrl-C, so that what waits for the job's end does not go on


def launch(main: Callable[[Any], None], config_class: type) -> None:
    """Run a program on the command line's settings; a UserError becomes one line on stderr and the exit code.

    A full disk does too: whatever is written is written whole or not at all, so that the same command goes on.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("train").setLevel(logging.INFO)
    try:
        main(parse(config_class, sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Stopped:
        sys.exit(Stopped.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.strerror}; make room, the same command goes on from what was saved", file=sys.stderr)
        sys.exit(RunError.exit_code)


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
        return layered(config_class, [*map(read_preset, presets), dotted(settings)])
    except ValueError as error:
        raise UserError(str(error)) from None


def layered(config_class: type, layers: list[dict[str, Any]]) -> Any:
    """Defaults under nested mappings, each over the one before, as a checked object; ValueError for what cannot be."""
    try:
        merged = OmegaConf.structured(config_class)
        for layer in layers:
            check_keys(config_class, layer, "")
            drop_replaced_choices(merged, layer)
            merged = OmegaConf.merge(merged, layer)
            complete_choices(merged)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{key}{str(error).splitlines()[0]}; --help lists the keys and their types") from None


def dotted(settings: list[str]) -> dict[str, Any]:
    """key=value of the command line as a layer of settings."""
    layer = OmegaConf.create()
    for setting in settings:
        try:
            layer.merge_with_dotlist([setting])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            line = " ".join(str(error).split())
            raise ValueError(f"argument {setting!r} has no YAML after its key ({line}); quote it") from None
    return OmegaConf.to_container(layer)


def read_preset(path: str) -> dict[str, Any]:
    """A preset as a layer of settings."""
    try:
        layer = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise UserError(f"preset {path} cannot be read ({error.strerror}); presets are in train/presets") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"preset {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(layer, dict):
        raise UserError(f"preset {path} must hold `key: value` lines")
    return layer


def check_keys(config_class: type, layer: dict[str, Any], prefix: str) -> None:
    """Raise ValueError for a key that no setting has; mappings such as model.quantizer check their own.

    A false where the setting knows the word "no" becomes that word: YAML reads an unquoted no as false.
    """
    known = {part.name for part in fields(config_class)}
    hints = {name: hint for name, hint in get_type_hints(config_class).items() if name in known}
    for key, value in layer.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in hints], "the settings")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key}={value!r} must be given as {prefix}{key}.KEY=..., it is a group")
            check_keys(hints[key], value, f"{prefix}{key}.")
        elif value is False and "no" in get_args(hints[key]):
            layer[key] = "no"


def drop_replaced_choices(merged: DictConfig, layer: dict[str, Any]) -> None:
    """Where a layer names another class of a table, drop the hyperparameters of the one that it replaces."""
    for part in TABLES:
        given = (layer.get("model") or {}).get(part)
        if isinstance(given, dict):
            merged.model[part] = kept_under(OmegaConf.to_container(merged.model[part]), given)


def kept_under(chosen: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What stays of a complete choice under what is merged over it: its name alone where that is another."""
    if given.get("name", chosen["name"]) != chosen["name"]:
        return {"name": given["name"]}
    inside = {key for key in chosen if isinstance(chosen[key], dict) and isinstance(given.get(key), dict)}
    return {key: kept_under(value, given[key]) if key in inside else value for key, value in chosen.items()}


def complete_choices(merged: DictConfig) -> None:
    """Fill in the hyperparameters of the classes named so far, so that the next layer can name others inside them."""
    for part, table in TABLES.items():
        if part in merged.get("model", {}):
            merged.model[part] = complete(part, OmegaConf.to_container(merged.model[part]), table)


def help_text(config_class: type) -> str:
    """Every key with its default and its comment, one a line."""
    program = re.match(r"Settings of (\S+\.py[ \w]*)", config_class.__doc__).group(1)  # and words before the settings
    launcher = "accelerate launch" if program.startswith("train/") else "python"
    lines = [f"usage: {launcher} {program} [preset.yaml] [key=value ...]", ""]
    for key, default, comment in settings_of(config_class):
        lines.append(
            f"  {key}={'null' if default is None else default}".ljust(48) + (f"  {comment}" if comment else "")
        )
    return "\n".join(lines)


def settings_of(config_class: type, prefix: str = "", defaults: Any = None) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, comment) of every setting, groups and choices of a table opened up."""
    documented = [comments_in(each) for each in reversed(config_class.__mro__[:-1])]
    comments = {name: comment for each in documented for name, comment in each.items()}
    defaults, hints = defaults or config_class(), get_type_hints(config_class)
    for part in fields(config_class):
        default = getattr(defaults, part.name)
        if is_dataclass(hints[part.name]):
            yield from settings_of(hints[part.name], f"{prefix}{part.name}.", default)
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


def public_yaml(config: Any) -> str:
    """The settings for others to read: of an absolute path, or one above the current folder, the last name alone."""
    return yaml.safe_dump(without_folders(asdict(config)), sort_keys=False)


def without_folders(value: Any) -> Any:
    """A nested value whose paths outside the current folder have lost what they lie in."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    outside = isinstance(value, str) and os.path.normpath(value).startswith(("/", "~", ".."))
    return os.path.basename(os.path.normpath(value)) if outside else value
