"""What every program of benchmarks/ records beside its figures, and where: results/*.json."""

import json
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


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
        "versions": {name: version(name) for name in ("torch", "accelerate", "datasets")}
        | {"python": platform.python_version()},
    }


def processor() -> str:
    """The processor's name and its widest vector instructions, on Linux."""
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("amx_bf16", "avx512f", "avx2") if flag in flags), "")
    return f"{fields.get('model name', platform.machine())} {widest}".strip()
