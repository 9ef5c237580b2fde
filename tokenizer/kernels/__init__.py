"""Kernels in C for x86 processors, built where the package is installed and there is a compiler.

`LIBRARY` is None where they were not built, or the processor has neither AVX2 nor AVX-512: then all is done by PyTorch,
and takes longer. Each file in C has its reference in Python, by PyTorch's operators.
"""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from warnings import warn

import torch
from torch import Tensor
from torch.nn import functional as F

INTERFACE = 4  # of vectors.c, raised where what kernels are called with changes
COUNTS = (
    "lanes",
    "attention_gradients_room",
    "attention_room",
    "decoding_room",
    "muon_room",
    "norm_gradients_room",
    "norm_room",
    "pointwise_rest",
    "pointwise_room",
    "winograd_numbers",
    "winograd_room",
    "winograd_tiles",
)


def library(name: str) -> ctypes.CDLL | None:
    """The kernels for processors with AVX2 or AVX-512, by these names in small letters."""
    files = [Path(__file__).parent / (name + suffix) for suffix in EXTENSION_SUFFIXES]
    for file in filter(Path.exists, files):
        try:
            found = ctypes.CDLL(str(file))  # its threads are PyTorch's where that has a libgomp.so.1, as on Linux
            if found.interface() == INTERFACE:
                for count in COUNTS:
                    getattr(found, count).restype = ctypes.c_ssize_t
                return found
            reason = "it was built from another version"
        except (OSError, AttributeError) as error:  # another libgomp, or cut off
            reason = str(error)
        warn(f"{file.name} is left out, so that all takes longer: {reason}; install the package again", stacklevel=2)
    return None


LIBRARY = library(torch.backends.cpu.get_cpu_capability().lower())
LANES = LIBRARY.lanes() if LIBRARY else 0  # what the channels that they take are multiples of


def run(kernel: str, *given: Tensor | ctypes.Structure | int | float | None) -> int:
    """Call a kernel with the addresses of tensors and structures, sizes, and floats as doubles."""
    return getattr(LIBRARY, kernel)(*map(as_argument, given))


def as_argument(value: Tensor | ctypes.Structure | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_ssize_t(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_void_p() if value is None else ctypes.byref(value)  # of a structure or an array


def filled(count: int, unit: int) -> int:
    """The next multiple of the unit."""
    return -(-count // unit) * unit


def filled_up(tensor: Tensor, missing: int) -> Tensor:
    """With so many zeros after what is last along the last axis, and without gaps."""
    return (F.pad(tensor, (0, missing)) if missing else tensor).contiguous()
