"""Random latents, and quantizers that have seen some."""

import torch

DIM = 4


def latents_of(seed: int, *shape: int) -> torch.Tensor:
    """Normal deviates, (2, DIM, 3, 5) unless told otherwise; the seed alone decides them."""
    return torch.randn(shape or (2, DIM, 3, 5), generator=torch.Generator().manual_seed(seed))


def trained(quantizer, batches: int = 3):
    """The quantizer after a few training steps on random latents."""
    for seed in range(batches):
        quantizer.train()(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
    return quantizer
