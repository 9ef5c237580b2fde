"""What the processor at hand multiplies fastest, and when an operator may do it that knows nothing but numbers."""

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter
from torch.nn.modules import module

from .kernels import LIBRARY

CAPABILITIES = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch tells nothing


def onednn_operator(namespace: str, name: str) -> Callable[..., Tensor] | None:
    """What `torch.compile` puts in the place of a layer whose weights stay; no public function leads there.

    None: this PyTorch has none, or nobody has measured it here.
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return None
    return getattr(getattr(torch.ops, namespace), name, None)


def multiplies_bfloat16() -> bool:
    """Whether products in bfloat16 are faster than in float32.

    Without instructions for them a convolution was seen to take three to five times as long, with the environment's
    ONEDNN_MAX_CPU_ISA at AVX512_CORE_VNNI and at AVX2.
    """
    if CAPABILITIES.get("architecture") != "x86_64":
        return True  # nobody has measured it
    return CAPABILITIES["avx512_bf16"] or CAPABILITIES["amx_bf16"]


def bfloat16_is_faster() -> bool:
    """Whether convolutions are, too: with dot products alone they take longer than the kernels in float32.

    With products of matrices (AMX) nobody has measured either.
    """
    return multiplies_bfloat16() and (LIBRARY is None or CAPABILITIES.get("amx_bf16", False))


def is_in_float32(features: Tensor, *parameters: Tensor) -> bool:
    """Whether a convolution of these is: under autocast, too, where bfloat16 is not faster."""
    if any(parameter.dtype != torch.float32 for parameter in parameters):
        return False
    if torch.is_autocast_enabled("cpu"):
        return features.dtype in (torch.float32, torch.bfloat16) and not bfloat16_is_faster()
    return features.dtype == torch.float32


def numbers_alone(*tensors: Tensor) -> bool:
    """Whether these lie on a CPU and only their numbers are asked for, gradients aside.

    Operators that are there for `torch.compile` know no autocast, trace, transform, tangent or special kind of tensor.
    """
    return not torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.enabled and are_plain(*tensors)


def are_plain(*tensors: Tensor) -> bool:
    """Whether these lie on a CPU and what is done with them is done now: not traced, compiled, transformed, watched."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not is_watched()
        and all(is_plain(tensor) for tensor in tensors)
    )


def is_watched() -> bool:
    """Whether operators are counted, recorded or replaced, of which what goes past PyTorch would not be one."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to be called when this layer is, who may keep what goes in or out, or change it."""
    own = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    of_all = module._global_forward_hooks, module._global_forward_pre_hooks
    return any((*own, *of_all, module._global_backward_hooks, module._global_backward_pre_hooks))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is dense, on a CPU, of no subclass, holds its numbers as they are, and has no tangent."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and torch._C._has_storage(tensor)  # not so of many gradients at once
        and not tensor.is_neg()
        and unpack_dual(tensor).tangent is None
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether what is made of these has a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
