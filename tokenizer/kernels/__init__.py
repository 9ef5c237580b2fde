"""Kernels in C for x86 processors, built where the package is installed and there is a compiler.

`LIBRARY` is None where they were not built, or the processor has neither AVX2 nor AVX-512: then all is done by PyTorch,
and takes longer. A file in C has one Python file around it, which says what it computes by PyTorch's operators.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from threading import local

import torch
from torch import Tensor


def library(name: str) -> ctypes.CDLL | None:
    """The kernels for processors with AVX2 or AVX-512, by these names in small letters."""
    for suffix in EXTENSION_SUFFIXES:
        file = Path(__file__).parent / (name + suffix)
        if file.exists():
            return ctypes.CDLL(str(file))  # its threads are PyTorch's: both ask for the same libgomp
    return None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers lie; 0 for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Workspace(local):
    """Memory for what lies between the steps of a kernel, kept from call to call, for each thread that calls."""

    def __init__(self) -> None:
        self.held = torch.empty(0)

    def of(self, floats: int) -> Tensor:
        if len(self.held) < floats:
            self.held = torch.empty(floats)
        return self.held


LIBRARY = library(torch.backends.cpu.get_cpu_capability().lower())
WORKSPACE = Workspace()
