"""Hard codes with the gradient of a softmax over all of them, and statistics of that softmax, in bounded memory.

Logits are `queries @ keys.T + bias`, (N, K). Neither they nor anything of their size is ever held for more than a chunk
of rows: the forward pass keeps none, the backward pass computes each chunk anew. A chunk has all K codes of its rows,
so that a plain softmax does. The dense formulas stand in tests/test_soft_assignment.py as the reference.

Shapes: N vectors, K codes, D components of queries and keys, V components of values.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..products import product
from .search import SMALLEST_PRODUCT, rows_per_chunk


def hard_codes(
    queries: Tensor, keys: Tensor, bias: Tensor, values: Tensor, temperature: Tensor, noise_seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """The values (N, V) of the largest logits and their indices (N,), the lowest index on a tie.

    With y = (logits + noise) / temperature, forward is hardmax(y) @ values and backward that of
    (stop_grad(hardmax(y) - softmax(y)) + softmax(y)) @ values: queries (N, D), keys (K, D) and bias (K,) get the
    gradient of the softmax, values (K, V) that of the code which was chosen. `temperature` is a scalar tensor. With a
    seed the noise is Gumbel's, so that indices are drawn by softmax(logits) (Jang et al. 2017, arXiv:1611.01144).
    """
    # Where keys and values are one tensor: torch.compile traces no function that is given a tensor twice.
    return HardCodes.apply(queries, keys, bias, values.view_as(values), temperature, noise_seed)


def soft_statistics(queries: Tensor, keys: Tensor, bias: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Of softmax(logits / temperature): its mean over the vectors (K,), and the mean of its entropies in nats."""
    return SoftStatistics.apply(queries, keys, bias, temperature)


class HardCodes(Function):
    @staticmethod
    def forward(ctx, queries, keys, bias, values, temperature, noise_seed):
        chunks = logits_by_chunk(queries, keys, bias, temperature, noise_seed)
        indices = torch.cat([logits.argmax(1) for _, logits in chunks])
        ctx.save_for_backward(queries, keys, bias, values, temperature, indices)
        ctx.noise_seed = noise_seed
        ctx.mark_non_differentiable(indices)
        return values[indices], indices

    @staticmethod
    @once_differentiable
    def backward(ctx, by_codes, _):
        *softmax, values, temperature, indices = ctx.saved_tensors

        def by_probabilities(rows: slice, log_probabilities: Tensor) -> Tensor:
            return by_codes[rows] @ values.t()

        with torch.autocast(values.device.type, enabled=False):
            gradients = through_softmax(*softmax, temperature, ctx.noise_seed, by_probabilities)
            by_values = torch.zeros_like(values).index_add_(0, indices, by_codes)
        return *gradients, by_values, None, None


class SoftStatistics(Function):
    @staticmethod
    def forward(ctx, queries, keys, bias, temperature):
        ctx.save_for_backward(queries, keys, bias, temperature)
        probabilities, entropy = torch.zeros_like(bias), queries.new_zeros(())
        for _, logits in logits_by_chunk(queries, keys, bias, temperature):
            log_probabilities = logits.log_softmax(1)
            probabilities += log_probabilities.exp().sum(0)
            entropy -= (log_probabilities.exp() * log_probabilities).sum()
        return probabilities / len(queries), entropy / len(queries)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_mean, by_entropy):
        queries, keys, bias, temperature = ctx.saved_tensors

        def by_probabilities(rows: slice, log_probabilities: Tensor) -> Tensor:
            # d(-p log p) = -(log p + 1) dp, whose 1 falls away since probabilities add up to a constant
            return (by_mean - by_entropy * log_probabilities) / len(queries)

        with torch.autocast(keys.device.type, enabled=False):
            return *through_softmax(queries, keys, bias, temperature, None, by_probabilities), None


def logits_by_chunk(
    queries: Tensor, keys: Tensor, bias: Tensor, temperature: Tensor, noise_seed: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk and their (logits + noise) / temperature; a seed gives the same noise each time.

    No product has fewer rows than round alike, so that a token does not depend on the number of others.
    """
    chunk_rows, transposed = max(rows_per_chunk(keys), SMALLEST_PRODUCT), keys.t()
    generator = None if noise_seed is None else torch.Generator(keys.device).manual_seed(noise_seed)
    for start in range(0, len(queries), chunk_rows):
        rows = slice(start, start + chunk_rows)
        part = queries[rows]
        enough = F.pad(part, (0, 0, 0, max(0, SMALLEST_PRODUCT - len(part))))
        logits = product(enough, transposed).add_(bias)[: len(part)]
        if generator is not None:
            exponential = torch.empty_like(logits).exponential_(generator=generator)
            logits -= exponential.clamp_(min=torch.finfo(logits.dtype).tiny).log_()  # -log Exp(1) is Gumbel(0, 1)
        yield rows, logits.div_(temperature)


def through_softmax(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    temperature: Tensor,
    noise_seed: int | None,
    by_probabilities: Callable[[slice, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by queries, keys and bias of a loss whose derivative by the probabilities of some rows is given.

    `by_probabilities(rows, log_probabilities)` is that derivative, (rows, K), up to a constant in each row.
    """
    by_queries, by_keys, by_bias = (torch.zeros_like(each) for each in (queries, keys, bias))
    for rows, logits in logits_by_chunk(queries, keys, bias, temperature, noise_seed):
        log_probabilities = logits.log_softmax(1)
        probabilities, slopes = log_probabilities.exp(), by_probabilities(rows, log_probabilities)
        mean_slopes = (probabilities * slopes).sum(1, keepdim=True)
        by_logits = probabilities * (slopes - mean_slopes) / temperature
        by_queries[rows] = by_logits @ keys
        by_keys.addmm_(by_logits.t(), queries[rows])
        by_bias += by_logits.sum(0)
    return by_queries, by_keys, by_bias
