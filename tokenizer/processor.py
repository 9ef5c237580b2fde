"""What the processor at hand multiplies faster than float32, as far as PyTorch tells."""

import torch

# An older PyTorch tells nothing: then nothing is done in 8 bits, and bfloat16 is taken to be fast.
CAPABILITIES = getattr(torch.cpu, "get_capabilities", dict)()


def multiplies_bfloat16() -> bool:
    """Whether products in bfloat16 are faster than in float32.

    Without instructions for them a convolution was seen to take three to five times as long (oneDNN held to AVX-512
    without bfloat16, and to AVX2).
    """
    if CAPABILITIES.get("architecture") != "x86_64":
        return True
    return CAPABILITIES["avx512_bf16"] or CAPABILITIES["amx_bf16"]


def multiplies_int8(dtype: torch.dtype) -> bool:
    """Whether there are dot products of 8 bits, for a convolution from features of this type to features of this type.

    Without them sums of two products would go into 16 bits, which overflow. Of bfloat16 only AVX-512 can be made.
    """
    if CAPABILITIES.get("avx512_vnni", False):
        return dtype in (torch.float32, torch.bfloat16)
    return dtype == torch.float32 and CAPABILITIES.get("avx_vnni", False)
