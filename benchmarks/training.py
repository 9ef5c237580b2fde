"""Run the training program once, timed, and record what it measured: python benchmarks/training.py NAME [arguments].

The arguments are those of train/vqvae.py. Writes results/training_NAME.json (command, commit, hardware, versions,
seconds, the last evaluation) and leaves the run in runs/NAME. Nothing else should run on the machine meanwhile.
"""

import json
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main(name: str, arguments: list[str]) -> None:
    run = Path("runs") / name
    if run.exists():
        sys.exit(f"error: {run} is there already; a run is timed from its start, move it away")
    command = ["accelerate", "launch", "train/vqvae.py", *arguments]
    begun = time.perf_counter()
    subprocess.run([*command, f"output_dir={run.resolve()}"], cwd=ROOT, check=True)
    seconds = time.perf_counter() - begun
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {
        "command": " ".join(command),
        "seconds": round(seconds, 1),
        "metrics": [record for record in records if "psnr" in record][-1],
        "images_per_second": max(record["images_per_second"] for record in records if "images_per_second" in record),
        **circumstances(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"training_{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


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


if __name__ == "__main__":
    if len(sys.argv) < 2 or "=" in sys.argv[1] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
