"""Training programs as real processes, and what their run folders are compared by."""

import json
import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(arguments: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def interrupt(arguments: list[str], send: int, at: str) -> tuple[int, str]:
    """Start a run in a process group of its own and send the group a signal once it has told of a step."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        told = ""
        for line in job.stderr:
            told += line
            if at in line:
                os.killpg(job.pid, send)
        return job.wait(), told


def assert_equal_runs(one: Path, two: Path) -> None:
    """The same weights, codebook statistics and optimizer state to the bit, and the same figures in the log."""
    for name in ("model.safetensors", "checkpoints/step_10/model.safetensors"):
        left, right = load_file(one / name), load_file(two / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    for path in (*(one / "checkpoints/step_10").glob("*.bin"), *(one / "checkpoints/step_10").glob("custom_*.pkl")):
        left, right = (torch.load(run / "checkpoints/step_10" / path.name) for run in (one, two))
        assert str(left) == str(right)
    assert records(one) == records(two)


def records(output: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_per_second")} for line in lines]
