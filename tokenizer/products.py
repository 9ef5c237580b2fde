"""Products of matrices in float32 on a CPU, by the faster of the two libraries that PyTorch has for them.

PyTorch leaves them to MKL, which on other processors than Intel's uses half of a vector unit of 512 bits; oneDNN, which
computes its convolutions, fills it.
"""

import torch
from torch import Tensor

# What `torch.compile` puts in the place of a frozen linear layer; no public function leads there. None: it is not here.
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
FEWEST_ROWS = 4  # of the left matrix: with fewer, MKL is done before oneDNN has begun


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, (n, m) from (n, d) and (d, m), up to rounding and without gradients."""
    if for_onednn(left) and right.dtype == torch.float32:
        return ONEDNN_LINEAR(left, right.t(), None, "none", [], "")
    return left @ right


def for_onednn(left: Tensor) -> bool:
    """Whether the product with this matrix is oneDNN's, which neither autocast nor a trace for a compiler knows."""
    return (
        ONEDNN_LINEAR is not None
        and left.device.type == "cpu"
        and left.dtype == torch.float32
        and len(left) >= FEWEST_ROWS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
