"""Models as shapes and types alone, for weights that come from a file."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Made = TypeVar("Made")

INITIALISERS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)


class Undrawn(TorchFunctionMode):
    """Inside it nothing is drawn at random: tensors stay as they are.

    Even on the meta device, where a tensor has no values, torch would work out what a draw comes to, by the machinery
    of its compiler, whose import alone takes seconds.
    """

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function in INITIALISERS:
            return arguments[0] if arguments else options["tensor"]
        return (torch.empty if function is torch.randn else function)(*arguments, **options)


def unfilled(make: Callable[[], Made]) -> Made:
    """What `make` makes, on the meta device: no weight takes memory, none is drawn."""
    with torch.device("meta"), Undrawn():
        return make()
