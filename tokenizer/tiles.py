"""Large pictures tile by tile: a network is applied to squares that overlap, and what it gives is put together again.

At a border within the picture a tile ends in padding where the picture goes on. So of each overlap a tile's outer part
is dropped: latents are taken from the tile in which they lie farthest from such a border, and pixels pass from one tile
to the next over the middle half of the overlap. Where the network looks no further than a quarter of the overlap
(a half, when it encodes) that is exactly what it gives of the whole picture. Group norm and attention look at all they
are given: with them tiles are near the whole, never equal.

Shapes: B batch, C D channels, H W image sides in pixels, h w grid sides (H / downsample_factor).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

DEFAULT_OVERLAP = 4  # the tile's side is so many times as long


@dataclass(frozen=True)
class Tiles:
    """Squares of `size` places of the grid, of which neighbours share `overlap` places or more."""

    size: int
    overlap: int
    factor: int  # pixels of a side per place

    def encoded(self, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """`encode` of images (B, C, H, W), sides divisible by the factor, in tiles: (B, D, h, w)."""
        return self.applied(encode, images, self.factor, 1, blend=1)

    def decoded(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        """`decode` of latents (B, D, h, w) in tiles: (B, C, H, W)."""
        return self.applied(decode, latents, 1, self.factor, blend=max(1, self.overlap * self.factor // 2))

    def applied(
        self, network: Callable[[Tensor], Tensor], features: Tensor, before: int, after: int, blend: int
    ) -> Tensor:
        """`network` in tiles; a place of the grid has sides of `before` in what goes in and of `after` in what comes.

        From one tile to the next the result passes over a width of `blend`; 1 cuts.
        """
        height, width = (side // before for side in features.shape[2:])
        whole = None
        for rows_in, rows, row_shares in self.axis(height, before, after, blend):
            for columns_in, columns, column_shares in self.axis(width, before, after, blend):
                part = network(features[:, :, rows_in, columns_in])
                if whole is None:
                    whole = part.new_zeros(*part.shape[:2], height * after, width * after)
                whole[:, :, rows, columns] += part * row_shares.to(part)[:, None] * column_shares.to(part)
        return whole

    def axis(self, places: int, before: int, after: int, blend: int) -> list[tuple[slice, slice, Tensor]]:
        """Of each tile along an axis: where it lies in what goes in, in what comes out, and its weights there."""
        positions = torch.arange(places * after, dtype=torch.float64) + 0.5
        passed = [((positions - cut) / blend + 0.5).clamp(0, 1) for cut in self.cuts(places, after)]
        passed = [torch.ones_like(positions), *passed, torch.zeros_like(positions)]
        shares = [this - following for this, following in pairwise(passed)]  # of each tile; over all they sum to 1
        return [
            (
                slice(before * start, before * stop),
                slice(after * start, after * stop),
                share[after * start : after * stop],
            )
            for (start, stop), share in zip(self.spans(places), shares, strict=True)
        ]

    def spans(self, places: int) -> list[tuple[int, int]]:
        """Where along an axis the tiles begin and end: all of one size, evenly over its places."""
        size = min(self.size, places)
        steps = -(-(places - size) // (self.size - self.overlap))
        starts = [index * (places - size) // max(1, steps) for index in range(steps + 1)]
        return [(start, start + size) for start in starts]

    def cuts(self, places: int, after: int) -> list[int]:
        """Where one tile gives way to the next, in the middle of what they share, with `after` to a place."""
        return [after * (stop + start) // 2 for (_, stop), (start, _) in pairwise(self.spans(places))]


def checked_tiles(tile_size: int | None, tile_overlap: int | None, factor: int) -> Tiles | None:
    """The tiles that are asked for in pixels, None for none; ValueError for what the factor does not divide."""
    if tile_size is None:
        if tile_overlap is not None:
            raise ValueError(f"tile_overlap={tile_overlap} was given without a tile_size; give both, or neither")
        return None
    if not isinstance(tile_size, Integral) or tile_size < 1 or tile_size % factor:
        raise ValueError(
            f"tile_size={tile_size!r} must be a side in pixels, a positive multiple of downsample_factor={factor}, "
            f"or None for the picture as a whole"
        )
    if tile_overlap is None:
        tile_overlap = tile_size // DEFAULT_OVERLAP // factor * factor
    if not isinstance(tile_overlap, Integral) or not 0 <= tile_overlap < tile_size or tile_overlap % factor:
        raise ValueError(
            f"tile_overlap={tile_overlap!r} must be pixels below tile_size={tile_size}, a multiple of "
            f"downsample_factor={factor}, or None for a quarter of the tile"
        )
    return Tiles(tile_size // factor, tile_overlap // factor, factor)
