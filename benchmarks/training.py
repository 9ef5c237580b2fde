"""Run the training program once, timed, and record what it measured: python benchmarks/training.py NAME [arguments].

The arguments are those of train/vqvae.py. Writes results/training_NAME.json (command, commit, hardware, versions,
seconds, the last evaluation) and leaves the run in runs/NAME. Nothing else should run on the machine meanwhile.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from recording import ROOT, record


def main(name: str, arguments: list[str]) -> None:
    run = Path("runs") / name
    if run.exists():
        sys.exit(f"error: {run} is there already; a run is timed from its start, move it away")
    command = ["accelerate", "launch", "train/vqvae.py", *arguments]
    begun = time.perf_counter()
    subprocess.run([*command, f"output_dir={run.resolve()}"], cwd=ROOT, check=True)
    seconds = time.perf_counter() - begun
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "command": " ".join(command),
        "seconds": round(seconds, 1),
        "metrics": [each for each in records if "psnr" in each][-1],
        "images_per_second": max(each["images_per_second"] for each in records if "images_per_second" in each),
    }
    record(f"training_{name}", figures)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "=" in sys.argv[1] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
