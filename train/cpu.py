"""What a program asks of a CPU: threads that do not wait for each other, and memory that stays with it."""

import ctypes
import os

import torch
from accelerate import Accelerator

from .settings import ThreadSettings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
KEPT = 2**28  # bytes


def tune_for_cpu(accelerator: Accelerator, speed: ThreadSettings, num_busy_workers: int = 0) -> None:
    """Where the work is a CPU's, share its cores out among the ranks, and keep what is freed.

    accelerate launch and torchrun leave one thread to each rank; more threads than cores without a busy worker wait
    for each other.
    """
    if accelerator.device.type == "cpu":
        num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(speed.threads or max(1, num_cores // num_local_ranks - num_busy_workers))
        keep_freed_memory()


def keep_freed_memory() -> None:
    """From now on glibc gives less of what is freed back to the system, so that fewer pages are asked for anew.

    Large tensors lie in its heap too, of which it keeps up to KEPT at the end, and below that end whatever is free, as
    the allocators do that PyTorch's tuning guide advises for a CPU. Nothing changes with another C library, nor where
    the environment has settings for glibc's: MALLOC_TRIM_THRESHOLD_=131072 is its default.
    """
    own = os.environ.get("GLIBC_TUNABLES") or any(name.startswith("MALLOC_") for name in os.environ)
    change = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if change and not own:
        change(M_MMAP_MAX, 0)
        change(M_TRIM_THRESHOLD, KEPT)
