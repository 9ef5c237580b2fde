"""Pictures of latent spaces beside each other: traversals, planes, interpolations, and where the images lie.

Shapes: N images, D latents of a global code, R rows and C columns of pictures of S pixels a side.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from comparison_sheet import title
from recording import save_plot
from shapes import COLOURS, FACTORS, Shapes
from torch import Tensor

from tokenizer import ImageVAE
from tokenizer.posteriors.normal import gaussian_kl
from train.progress import save_sheet

STEPS = torch.linspace(-2, 2, 9)  # deviations of a model's own latents, from their mean
PAIRS = ((5, 1900), (1500, 420))  # numbers of the images between which is interpolated
BETWEEN = torch.linspace(0, 1, 9)
ENLARGED = 2  # times, each side
GAP = 4  # white pixels between pictures
NUM_SAMPLES = 9


@dataclass
class Space:
    """A trained model whose grid is 1 x 1, and its posteriors of all shapes."""

    name: str
    vae: ImageVAE
    shapes: Shapes
    mean: Tensor  # (N, D)
    log_variance: Tensor  # (N, D)

    @property
    def order(self) -> Tensor:
        """The latents (D,) from the one that holds most nats."""
        return gaussian_kl(self.mean, self.log_variance).mean(0).argsort(descending=True)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (R, C, D) to pictures (R, C, 3, S, S)."""
        return self.vae.decode(codes.flatten(0, 1)[..., None, None]).unflatten(0, codes.shape[:2])

    def moved(self, start: Tensor, dimension: int, steps: Tensor) -> Tensor:
        """The codes (..., D) with one latent set to so many deviations from the mean: (..., D) for steps (...)."""
        codes = start.expand(*steps.shape, -1).clone()
        codes[..., dimension] = self.mean[:, dimension].mean() + steps * self.mean[:, dimension].std()
        return codes


def draw_traversals(path: Path, spaces: list[Space]) -> None:
    """A PNG with a panel for each space: a row for each latent, moved while the others stay as one image has them."""
    panels = []
    for space in spaces:
        start = space.mean[PAIRS[0][1]]
        codes = torch.stack([space.moved(start, int(dimension), STEPS) for dimension in space.order])  # (D, C, D)
        panels.append(tiled(space.decode(codes)))
    save_panels(path, [f"{space.name}: each latent from -2 to 2 deviations" for space in spaces], panels)


def draw_planes(path: Path, spaces: list[Space]) -> None:
    """A PNG with a panel for each space: the two latents that hold most, over a square, the others at their mean.

    Below each a row of pictures drawn from N(0, I), which a decoder knows only where the KL has put its latents there.
    """
    panels = []
    for space in spaces:
        first, second = space.order[:2].tolist()
        down, across = torch.meshgrid(STEPS, STEPS, indexing="ij")
        codes = space.moved(space.mean.mean(0), first, down)
        codes[..., second] = space.moved(space.mean.mean(0), second, across)[..., second]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(1, NUM_SAMPLES, codes.shape[-1], generator=generator)
        panels.append(torch.cat([tiled(space.decode(codes)), tiled(space.decode(drawn))], dim=1))
    save_panels(path, [f"{space.name}: two latents, then draws of N(0, I)" for space in spaces], panels)


def draw_interpolations(path: Path, spaces: list[Space]) -> None:
    """A PNG with a panel for each space: straight ways between the codes of two images; the first is between pixels."""
    pixels, weights = spaces[0].shapes.pixels / 255, BETWEEN[:, None, None, None]
    blended = torch.stack([torch.lerp(pixels[left], pixels[right], weights) for left, right in PAIRS])
    panels = [tiled(blended)]
    for space in spaces:
        codes = [torch.lerp(space.mean[left], space.mean[right], BETWEEN[:, None]) for left, right in PAIRS]
        panels.append(tiled(space.decode(torch.stack(codes))))
    save_panels(path, ["between two images: pixels", *(space.name for space in spaces)], panels)


def draw_scatter(path: Path, spaces: list[Space]) -> None:
    """A PNG with a panel for each space: the images in its two fullest latents, in the colours of the shapes."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a screen

    figure = Figure(figsize=(4 * len(spaces), 4), layout="constrained")
    axes = figure.subplots(1, len(spaces), squeeze=False)[0]
    number = list(FACTORS).index("colour")
    for space, plot in zip(spaces, axes, strict=True):
        first, second = space.order[:2].tolist()
        paint = torch.tensor(COLOURS)[space.shapes.factors[:, number]] / 255
        plot.scatter(space.mean[:, first], space.mean[:, second], s=3, c=paint.numpy())
        angle = torch.linspace(0, 2 * torch.pi, 100)
        plot.plot(2 * angle.cos(), 2 * angle.sin(), color="black", linewidth=1)
        plot.set(title=space.name, xlabel=f"latent {first}", ylabel=f"latent {second}")
        plot.set_aspect("equal", adjustable="datalim")
    figure.suptitle("posterior means; the circle is at 2 deviations of the prior")
    save_plot(path, figure, 80)


def tiled(pictures: Tensor) -> Tensor:
    """Pictures (R, C, 3, S, S), enlarged, side by side with white between them, as one (3, H, W)."""
    pictures = pictures.repeat_interleave(ENLARGED, 3).repeat_interleave(ENLARGED, 4)
    rows, columns, channels, side, _ = pictures.shape
    sheet = torch.ones(rows, columns, channels, side + GAP, side + GAP)
    sheet[..., :side, :side] = pictures
    return sheet.permute(2, 0, 3, 1, 4).reshape(channels, rows * (side + GAP), columns * (side + GAP))


def save_panels(path: Path, titles: list[str], panels: list[Tensor]) -> None:
    """A PNG of panels of one size below each other, each beside its title."""
    save_sheet(path, [[title(text, panel.shape[1]), panel] for text, panel in zip(titles, panels, strict=True)])
