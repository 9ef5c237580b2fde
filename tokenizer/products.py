"""Products of matrices in float32 on a CPU, by the faster of the two libraries that PyTorch has for them.

PyTorch leaves them to MKL. oneDNN, which computes its convolutions, takes less than half the time on AMD processors
with vectors of 512 bits, and about as long where vectors have 256.
"""

import platform

import torch
from torch import Tensor

# What `torch.compile` puts in the place of a frozen linear layer; no public function leads there. None: it is not here,
# or nobody has measured it here.
ONEDNN_LINEAR = None
if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64"):
    ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
FEWEST_ROWS = 4  # of the left matrix: with fewer, MKL is done before oneDNN has begun


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, (n, m) from (n, d) and (d, m), up to rounding."""
    if is_for_onednn(left, right):
        return ONEDNN_LINEAR(left, right.t(), None, "none", [], "")
    return left @ right


def is_for_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN is to multiply these, of which no backward pass, autocast or trace for a compiler knows."""
    return (
        ONEDNN_LINEAR is not None
        and torch.backends.mkldnn.enabled
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and len(left) >= FEWEST_ROWS
        and left.shape[1] == right.shape[0] > 0
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
