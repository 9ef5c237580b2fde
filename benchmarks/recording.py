"""What every program of benchmarks/ does around its measuring: tell, refuse, and record into results/*.json."""

import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tokenizer.pretrained import written_whole
from train.config import UserError, differences, dotted, launch, without_folders

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torchvision", "accelerate", "datasets", "lpips", "torch-fidelity", "pillow")


def tell(progress: str) -> None:
    """What the program is about to do, on stderr."""
    print(progress, file=sys.stderr, flush=True)


def launch_named(main: Callable[..., None], config_class: type, usage: str | None) -> None:
    """`launch` of a program whose first argument is the NAME of its record; without one its `usage` is told."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if not {"-h", "--help"} & set(sys.argv[1:]):
        if not name or "=" in name:
            sys.exit(usage)
        if not re.fullmatch(r"\w[\w.-]*", name):
            sys.exit(f"error: NAME {name!r} must be letters, digits, '_', '-' and '.': files are called by it")
        sys.argv.pop(1)
    launch(partial(main, name), config_class)


@contextmanager
def refusals() -> Iterator[None]:
    """A UserError in place of what a model refuses."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def public_settings(config: Any) -> dict[str, Any]:
    """The settings of a program for its record, the data by its public name `named`, else of a path the last name."""
    settings = asdict(config)
    return settings | {"data": settings.pop("named") or without_folders(config.data)}


def command_line(
    program: str, name: str, settings: dict[str, Any], defaults: dict[str, Any], always: tuple[str, ...]
) -> str:
    """The command that measures the same: the settings in `always`, then those that are not the defaults."""
    changed = {key: value for key, (value, _) in differences(settings, defaults).items() if key not in always}
    given = {key: settings[key] for key in always} | changed
    words = [shlex.quote(f"{key}={as_yaml(value)}") for key, value in given.items()]
    return " ".join([f"python benchmarks/{program}.py", name, *words])


def as_yaml(value: Any) -> str:
    """A setting's value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(json.dumps(each) if is_quoted(each) else as_yaml(each) for each in value)}]"
    if value is None:
        return "null"
    return json.dumps(value) if is_quoted(value) else str(value)


def is_quoted(value: Any) -> bool:
    """Whether it is text that a command line would read as something else, alone or in a list."""
    if not isinstance(value, str):
        return False
    try:
        return dotted([f"key=[{value}]"])["key"] != [value] or dotted([f"key={value}"])["key"] != value
    except ValueError:
        return True


def num_parameters(model: torch.nn.Module) -> int:
    """Trained numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def record(name: str, figures: dict[str, object], root: Path = ROOT) -> None:
    """Write the figures and their circumstances to benchmarks/results/NAME.json under `root`, and print them."""
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures | circumstances(), indent=2)
    with written_whole(folder / f"{name}.json") as part:
        part.write_text(text + "\n")
    print(text)


def save_plot(path: Path, figure: Any, dpi: int) -> None:
    """A figure of matplotlib as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        figure.savefig(part, dpi=dpi, format="png")


def circumstances() -> dict[str, object]:
    """Commit, hardware and versions: what a figure cannot be understood without."""
    return {
        "commit": commit(ROOT),
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version_of(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def commit(root: Path) -> str:
    """The commit of a repository, "-dirty" behind it where tracked files differ; those that measuring writes may."""
    written = [f":(exclude){folder}" for folder in ("benchmarks/results", "docs")]
    status = ["status", "--porcelain", "--untracked-files=no", "--", ".", *written]
    name, changed = (
        subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], status)
    )
    return f"{name}-dirty" if changed else name


def version_of(library: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name, which kind of that name it is, and its widest vector instructions, on Linux."""
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("amx_bf16", "avx512f", "avx2") if flag in flags), "")
    kind = f"(family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return " ".join(filter(None, (fields.get("model name", platform.machine()), kind, widest)))
