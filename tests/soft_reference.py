"""Hard codes with the gradient of a softmax, written out with all (N, K) probabilities at once."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_hard_codes(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    values: Tensor,
    temperature: Tensor | float,
    noise: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The codes (N, V) of soft_assignment.hard_codes, and the probabilities (N, K)."""
    soft = ((queries @ keys.t() + bias + noise) / temperature).softmax(1)
    hard = F.one_hot(soft.argmax(1), len(keys)).to(soft)
    return (hard - soft.detach() + soft) @ values, soft


def gumbel_noise(seed: int, *shape: int) -> Tensor:
    """What a seed adds to logits that fit into one chunk."""
    return -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed)).log()


def gradient(latents: Tensor, direction: Tensor, *arguments: Tensor | float, scale: float = 1.0) -> Tensor:
    """Of sum(codes * direction) by latents (B, D, h, w), which are the queries divided by `scale`."""
    given = latents.detach().clone().requires_grad_()
    vectors = given.movedim(1, -1).flatten(0, -2)
    codes, _ = dense_hard_codes(scale * vectors, *arguments)
    (codes * direction.movedim(1, -1).flatten(0, -2)).sum().backward()
    return given.grad


def of_softmax_vq(quantizer, latents: Tensor, direction: Tensor) -> Tensor:
    codes = quantizer.codebook.detach()
    return gradient(latents, direction, codes, -codes.square().sum(1), codes, quantizer.temperature, scale=2.0)


def of_gumbel_vq(quantizer, latents: Tensor, direction: Tensor) -> Tensor:
    noise = gumbel_noise(int(torch.randint(2**62, ())), latents[:, 0].numel(), quantizer.vocab_size)
    logits_of = quantizer.keys.weight.detach(), quantizer.bias.detach(), quantizer.codebook.detach()
    return gradient(latents, direction, *logits_of, quantizer.temperature, noise)


def of_ibq(quantizer, latents: Tensor, direction: Tensor) -> Tensor:
    codes = quantizer.codebook.detach()
    return gradient(latents, direction, codes, torch.zeros(len(codes)), codes, 1.0)


# The gradient of sum(quantized * direction) by the latents, of quantizers that have not a copied one.
GRADIENTS_OF_SOFTMAX = {"softmax_vq": of_softmax_vq, "gumbel_vq": of_gumbel_vq, "ibq": of_ibq}
