"""How large the tensors get between a call and its result."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation returns, in the backward pass too."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        sizes = [each.numel() for each in tree_leaves(results) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return results
