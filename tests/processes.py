"""Training programs as real processes, and what their run folders are compared by."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(arguments: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    return subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def printed_by_lesser(script: str) -> list[float]:
    """The numbers that a script prints where PyTorch and the kernels are those of a processor without AVX-512."""
    done = run([sys.executable, "-c", script], PYTHONPATH=os.pathsep.join(sys.path), ATEN_CPU_CAPABILITY="avx2")
    assert done.returncode == 0, done.stderr
    return list(map(float, done.stdout.split()))


def interrupt(arguments: list[str], send: int, at: str) -> tuple[int, str]:
    """A program in a process group of its own, to which it sends a signal once it has told of `at`: code and stderr."""
    python, *program = arguments
    command = [python, str(Path(__file__).with_name("interrupted.py")), str(int(send)), at, *program]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        told = job.stderr.read()
        return job.wait(), told


def assert_equal_runs(one: Path, two: Path) -> None:
    """The same weights, codebook statistics and optimizer state to the bit, and the same figures in the log."""
    for name in networks_of(one):
        assert_same(load_file(one / name), load_file(two / name))
    for path in (*(one / "checkpoints/step_10").glob("*.bin"), *(one / "checkpoints/step_10").glob("custom_*.pkl")):
        assert_same(*(torch.load(run / "checkpoints/step_10" / path.name) for run in (one, two)))
    assert records(one) == records(two)


def assert_close_runs(one: Path, two: Path, leave_out: str | None = None) -> None:
    """The same weights and codebook statistics but for rounding, less the tensors whose names begin with a word."""
    for name in networks_of(one):
        left, right = load_file(one / name), load_file(two / name)
        assert left.keys() == right.keys()
        for key in (key for key in left if not (leave_out and key.startswith(leave_out))):
            torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


def networks_of(run: Path) -> list[str]:
    """What is exported and every network of the last checkpoint."""
    return [
        "model.safetensors",
        *(str(path.relative_to(run)) for path in run.glob("checkpoints/step_10/*.safetensors")),
    ]


def assert_same(left: object, right: object) -> None:
    """Two saved states are equal to the bit, whatever they are made of."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def records(output: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_per_second")} for line in lines]
