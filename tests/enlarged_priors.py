"""Tiny priors in this process, whose distributions are far from uniform, and all grids of the smallest."""

from itertools import product

import torch

from prior import AutoregressivePrior, PriorConfig

TINY = {"vocab_size": 3, "grid_size": [2, 2], "num_classes": 2, "width": 16, "num_layers": 2, "num_heads": 2}
ALL_GRIDS = torch.tensor(list(product(range(3), repeat=4))).view(81, 2, 2)


def make_prior(**changes):
    """A tiny prior in eval mode, its weights enlarged: fresh ones make nearly uniform distributions."""
    torch.manual_seed(0)
    prior = AutoregressivePrior(PriorConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(15 if parameter.ndim > 1 else 1)
    return prior


def unconditional_twin(prior):
    """An unconditional prior with the weights of a conditional one, its only class the null class."""
    twin = make_prior(num_classes=0, grid_size=prior.config.grid_size, vocab_size=prior.config.vocab_size)
    weights = prior.state_dict()
    twin.load_state_dict(weights | {"class_embedding.weight": weights["class_embedding.weight"][-1:]})
    return twin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
