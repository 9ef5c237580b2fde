"""Generated pictures of one shape each, every combination of five factors: what disentanglement is measured on.

After dSprites (Matthey et al. 2017), with colour in place of rotation. Shapes: N pictures of S
pixels a side, K factors.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIDE = 32  # pixels
OUTLINES = ("disc", "square", "triangle")
COLOURS = ((230, 60, 60), (60, 200, 80), (70, 110, 240), (240, 210, 60))  # red, green, blue, yellow
RADII = (4.0, 6.0, 8.0)  # pixels, half the width
CENTRES = tuple(10 + 12 * step / 7 for step in range(8))  # pixels from an edge
FACTORS = {"outline": OUTLINES, "colour": COLOURS, "size": RADII, "x": CENTRES, "y": CENTRES}


@dataclass
class Shapes:
    pixels: Tensor  # (N, 3, S, S) uint8
    factors: Tensor  # (N, K) int64, the number of each factor's value in FACTORS


def all_shapes() -> Shapes:
    """Every combination once, the last factor running fastest."""
    factors = torch.tensor(list(product(*(range(len(values)) for values in FACTORS.values()))))
    outline, colour, size, x, y = factors.T
    radius, centre_x, centre_y = (
        torch.tensor(values)[numbers][:, None, None] for values, numbers in ((RADII, size), (CENTRES, x), (CENTRES, y))
    )
    places = torch.arange(SIDE) + 0.5
    right, down = places[None, None] - centre_x, places[None, :, None] - centre_y  # (N, 1, S) and (N, S, 1)
    distances = torch.stack([disc(right, down, radius), square(right, down, radius), triangle(right, down, radius)])
    outside = distances[outline, torch.arange(len(factors))]  # (N, S, S) pixels
    cover = (0.5 - outside).clamp(0, 1)[:, None]  # of a pixel, so that edges are smooth
    paint = torch.tensor(COLOURS)[colour][..., None, None]  # (N, 3, 1, 1)
    return Shapes((cover * paint).round().to(torch.uint8), factors)


# Distances (N, S, S) in pixels from an outline, negative inside.


def disc(right: Tensor, down: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(right, down) - radius


def square(right: Tensor, down: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(right.abs(), down.abs()) - 0.9 * radius


def triangle(right: Tensor, down: Tensor, radius: Tensor) -> Tensor:
    """Pointing up, as wide as it is high."""
    sides = (2 * right.abs() - down - radius) / 5**0.5
    return torch.maximum(sides, down - radius)
