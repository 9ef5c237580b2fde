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

    It keeps up to KEPT at the end of its heap, and large tensors lie in the heap too. The allocators that PyTorch's
    tuning guide advises for a CPU keep memory as well. With another C library nothing changes.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if change:
        change(M_MMAP_MAX, 0)
        change(M_TRIM_THRESHOLD, KEPT)
