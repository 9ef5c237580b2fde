"""Memory for what kernels compute, and for what lies between their steps.

New memory is cleared by the system, page by page, before a large result can be written: so what large results leave
behind is kept for the next ones.
"""

import ctypes
import math
import mmap
from threading import local
from weakref import finalize

import torch
from torch import Tensor

LARGE = 2**22  # bytes of a result: the system's own allocator keeps what is smaller
MOST_HELD = 2**28  # bytes: the results of a network that are there together at 256 x 256 pixels and 128 channels


def empty(*shape: int, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Numbers for a kernel, whatever the process has as default type and device. Large ones cannot be resized."""
    if 4 * math.prod(shape) < LARGE:
        return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=memory_format)
    layout = torch.empty(shape, dtype=torch.float32, device="meta", memory_format=memory_format)
    storage = torch.frombuffer(RESERVE.take(layout.nbytes), dtype=torch.float32).untyped_storage()
    return torch.empty(0, dtype=torch.float32, device="cpu").set_(storage, 0, layout.shape, layout.stride())


class Reserve:
    """Memory whose tensors are gone, the latest last. Threads and the collector may come in between at any place."""

    def __init__(self):
        self.held: list[mmap.mmap] = []

    def take(self, length: int) -> ctypes.Array:
        """So many bytes, which come back once nothing refers to them."""
        memory = next((each for each in reversed(self.held) if len(each) == length), None)
        try:
            self.held.remove(memory)
        except ValueError:  # there is none, or another thread has it
            memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # it comes 4096 bytes at a time otherwise
                memory.madvise(mmap.MADV_HUGEPAGE)
        array = (ctypes.c_char * length).from_buffer(memory)
        finalize(array, self.keep, memory).atexit = False
        return array

    def keep(self, memory: mmap.mmap) -> None:
        if len(memory) <= MOST_HELD:
            self.held.append(memory)
        while sum(map(len, self.held)) > MOST_HELD:
            del self.held[:1]  # which raises nothing where another thread was first


RESERVE = Reserve()


class Workspace(local):
    """Memory for what lies between the steps of a kernel, kept from call to call, for each thread that calls."""

    held: Tensor | None = None

    def of(self, count: int) -> Tensor:
        """At least so many numbers."""
        if self.held is None or len(self.held) < count:
            self.held = empty(count)
        return self.held


WORKSPACE = Workspace()
