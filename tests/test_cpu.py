"""Threads of the ranks of a machine, and memory that stays with the process."""

import ctypes
import os
import sys

import pytest
import torch
from accelerate import Accelerator
from processes import run

from train import cpu, optimization
from train.config import parse
from train.settings import ThreadSettings, TokenizerRun

FREED = """
import torch
from train.cpu import keep_freed_memory
KEPT
def resident():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
torch.zeros(10).add_(1)
before = resident()
torch.zeros(10**7).add_(1)
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc alone")
@pytest.mark.parametrize(("kept", "low", "high"), [("keep_freed_memory()", 36e6, 80e6), ("", 0, 4e6)])
def test_freed_memory_stays_with_the_process_where_that_is_asked_for(kept, low, high):
    assert low <= freed(kept) < high


def freed(kept: str, **settings: str) -> int:
    """Bytes that a fresh process with these settings of its allocator has kept of 40 MB."""
    settings = {"GLIBC_TUNABLES": "", "LD_PRELOAD": ""} | settings
    done = run([sys.executable, "-c", FREED.replace("KEPT", kept)], PYTHONPATH=os.pathsep.join(sys.path), **settings)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc alone")
@pytest.mark.parametrize("own", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_settings_of_the_environment_stay(own):
    assert freed("keep_freed_memory()", **own) < 4e6


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(
    ("given", "ranks", "busy", "threads"),
    [(None, 1, 0, 6), (None, 2, 0, 3), (None, 2, 2, 1), (None, 9, 3, 1), (5, 2, 2, 5)],
)
def test_the_cores_are_shared_out_and_freed_memory_is_kept(given, ranks, busy, threads, monkeypatch):
    kept, before = [], torch.get_num_threads()
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: kept.append("so"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    try:
        cpu.tune_for_cpu(Accelerator(cpu=True), ThreadSettings(given), busy)
        assert (torch.get_num_threads(), kept) == (threads, ["so"])
    finally:
        torch.set_num_threads(before)


def test_bf16_is_warned_of_where_it_is_slower(tmp_path, monkeypatch, caplog, fresh_accelerator):
    given = parse(TokenizerRun, ["mixed_precision=bf16", f"output_dir={tmp_path}", "speed.threads=1"])
    for fast in (True, False):
        monkeypatch.setattr(optimization, "multiplies_bfloat16", lambda fast=fast: fast)
        optimization.make_accelerator(given)
        assert ("mixed_precision=bf16 is slower than no on this processor" in caplog.text) is not fast
