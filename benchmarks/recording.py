"""What every program of benchmarks/ does around its measuring: tell, refuse, and record into results/*.json."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from train.config import UserError, differences

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torchvision", "accelerate", "datasets", "lpips", "torch-fidelity", "pillow")


def tell(progress: str) -> None:
    """What the program is about to do, on stderr."""
    print(progress, file=sys.stderr, flush=True)


@contextmanager
def refusals() -> Iterator[None]:
    """A UserError in place of what a model refuses."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from None


def public_settings(config: Any) -> dict[str, Any]:
    """The settings of a program for its record, the data by its public name, the setting `named`."""
    settings = asdict(config)
    return settings | {"data": settings.pop("named") or config.data}


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
    if not isinstance(value, list):
        return str(value)
    return f"[{','.join(json.dumps(each) if ' ' in str(each) else str(each) for each in value)}]"


def num_parameters(model: torch.nn.Module) -> int:
    """Trained numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def record(name: str, figures: dict[str, object], root: Path = ROOT) -> None:
    """Write the figures and their circumstances to benchmarks/results/NAME.json under `root`, and print them."""
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures | circumstances(), indent=2)
    (folder / f"{name}.json").write_text(text + "\n")
    print(text)


def circumstances() -> dict[str, object]:
    """Commit, hardware and versions: what a figure cannot be understood without."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version_of(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }


def version_of(library: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name and its widest vector instructions, on Linux."""
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("amx_bf16", "avx512f", "avx2") if flag in flags), "")
    return f"{fields.get('model name', platform.machine())} {widest}".strip()
