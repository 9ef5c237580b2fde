"""Two floors for a time: the products of a call at the rate of a large one, its traffic at the rate of a large copy.

Traffic is what every operation reads and writes, once each. What the processor's own cache still holds comes faster, so
that small tensors may go below the second floor.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from stopwatch import four
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tokenizer import attention, kernels, normalisation, pointwise, processor, winograd
from tokenizer.kernels.memory import WORKSPACE
from tokenizer.processor import multiplies_bfloat16
from tokenizer.products import ONEDNN_LINEAR, product

PRODUCT = 2048  # rows and columns of the matrices
COPIED = 2**28  # bytes, more than a processor's own cache holds
UNTOUCHED = {torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like}
COUNTS = flop_registry | {
    ONEDNN_LINEAR: lambda left, weight, *_, **__: 2 * left.numel() * len(weight),
}
ATTENTION_PRODUCTS = {"attention": 2, "attention_gradients": 5}
LOOKUPS = {torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Work(TorchDispatchMode):
    """Inside it: the operations of products and convolutions by type, and the bytes of all that is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[torch.dtype] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        options = options or {}
        with self:
            result = operation.decompose(*given, **options)
        if result is not NotImplemented:
            return result  # its parts have been counted
        result = operation(*given, **options)
        read = [result, *given[1:]] if operation.overloadpacket in LOOKUPS else given  # of a table what is looked up
        tensors = [leaf for leaf in tree_leaves((read, options, result)) if isinstance(leaf, Tensor)]
        if not operation.is_view and operation.overloadpacket not in UNTOUCHED:
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        count = COUNTS.get(operation.overloadpacket)
        if count:
            self.operations[tensors[0].dtype] += count(*given, **options, out_val=result)
        return result

    def run(self, kernel: str, *given: Any) -> int:
        """A kernel of ours, which PyTorch does not see: its tensors but for its workspace."""
        if kernel in ("winograd_convolve", "winograd_weight_gradient"):
            shape = given[0]
            self.operations[torch.float32] += 2 * shape.tiles * shape.products * shape.channels * shape.out_channels
        elif kernel in ("pointwise_convolve", "pointwise_to_features", "pointwise_to_weight"):
            places, channels, out_channels, *_ = (each for each in given if isinstance(each, int))
            self.operations[torch.float32] += 2 * places * channels * out_channels
        elif kernel in ATTENTION_PRODUCTS:
            pictures, places, channels, *_ = (each for each in given if isinstance(each, int))
            self.operations[torch.float32] += 2 * ATTENTION_PRODUCTS[kernel] * pictures * places**2 * channels
        held = WORKSPACE.of(0).untyped_storage().data_ptr()
        tensors = (each for each in given if isinstance(each, Tensor))
        self.bytes += sum(each.nbytes for each in tensors if each.untyped_storage().data_ptr() != held)
        return kernels.run(kernel, *given)


def dtypes_on(device: str | torch.device) -> list[str]:
    """What is worth measuring there, by name: not bfloat16 on a CPU that has no instructions for it."""
    return list(DTYPES) if torch.device(device).type != "cpu" or multiplies_bfloat16() else ["float32"]


def work_of(call: Callable[[], object]) -> Work:
    """What one call does."""
    with Work() as work, ExitStack() as changed:
        changed.enter_context(patch.object(processor, "is_watched", lambda: False))  # else no kernel would run
        for module in (attention, winograd, pointwise, normalisation):
            changed.enter_context(patch.object(module, "run", work.run))
        call()
    return work


def machine_calls(device: str | torch.device) -> dict[str, Callable[[], Tensor]]:
    """What tells the rates of the machine, to be timed in turns with what is held against them."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    for name in dtypes_on(device):
        matrix = torch.randn(PRODUCT, PRODUCT, device=device).to(DTYPES[name])
        calls[f"product, {name}"] = lambda matrix=matrix: product(matrix, matrix)
    return calls


def machine_rates(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Operations a second of each type and bytes a second, read and written, by the fastest of the `machine_calls`."""
    products = {name: f"product, {name}" for name in DTYPES}
    rates = {name: four(2 * PRODUCT**3 / min(seconds[call])) for name, call in products.items() if call in seconds}
    return rates | {"bytes": four(2 * COPIED / min(seconds["copy"]))}


def floors(work: Work, rates: dict[str, float], items: int) -> dict[str, float]:
    """Items a second by the rates of the machine, where the work on so many were products alone, or traffic alone.

    What is in a type that was not worth measuring counts at the rate of float32.
    """
    counts = {name: work.operations[dtype] for name, dtype in DTYPES.items() if work.operations[dtype]}
    operations = sum(count / rates.get(name, rates["float32"]) for name, count in counts.items())
    return {"arithmetic": four(items / operations), "memory": four(items * rates["bytes"] / work.bytes)}
