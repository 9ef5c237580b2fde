"""Tokens of the three shapes, and every refusal.

(B, h, w) row-major; (B, h, w, q) with q codebooks at each place; (B, L) where the grids of a picture differ in size,
grid after grid, each row-major. Of a single picture the first axis may be left out.
"""

from math import isqrt

import torch
from torch import Tensor

from .quantizers import Quantizer

INTEGER_TYPES = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def token_shape(quantizer: Quantizer, grid_size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the tokens of one picture whose latents are a grid (h, w)."""
    if quantizer.multiscale:
        return (num_places(quantizer, grid_size),)
    return grid_size if quantizer.num_codebooks == 1 else (*grid_size, quantizer.num_codebooks)


def num_places(quantizer: Quantizer, grid_size: tuple[int, int]) -> int:
    """Places of all grids of a picture together."""
    return sum(height * width for height, width in quantizer.grids(*grid_size))


def checked_tokens(tokens: Tensor, quantizer: Quantizer) -> Tensor:
    """Tokens as an int64 batch; ValueError for what are no tokens of this quantizer, whatever the picture's size."""
    rule = rule_of(quantizer)
    if not isinstance(tokens, Tensor) or tokens.dtype not in INTEGER_TYPES:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens of {kind}; the rule is an integer tensor {rule}, as encode returns it")
    num_axes = len(rule.split(","))
    if tokens.ndim not in (num_axes - 1, num_axes) or tokens.numel() == 0:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}; the rule is {rule} or {single(rule)}, none of them 0")
    low, high = (value.item() for value in torch.aminmax(tokens.to(torch.int64)))
    if low < 0 or high >= quantizer.vocab_size:
        raise ValueError(f"tokens run from {low} to {high}; they must lie in [0, {quantizer.vocab_size})")
    return tokens.to(torch.int64) if tokens.ndim == num_axes else tokens[None].to(torch.int64)


def rule_of(quantizer: Quantizer) -> str:
    """The shape of a batch of tokens, in words."""
    if quantizer.multiscale:
        return "(B, L)"
    return "(B, h, w)" if quantizer.num_codebooks == 1 else f"(B, h, w, {quantizer.num_codebooks})"


def single(rule: str) -> str:
    """The shape of the tokens of a single picture, in words."""
    return "(L,)" if rule == "(B, L)" else rule.replace("B, ", "")


def grid_of(tokens: Tensor, quantizer: Quantizer, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    """The grid (h, w) of the latents that a batch of tokens stands for; ValueError where it is none, or not the given.

    Where the grids differ in size their sum does not tell the sides: the picture is a square unless a grid is given.
    Of a quantizer from coarse to fine the first codebooks, or with a given grid the first scales, are enough.
    """
    shape = tuple(tokens.shape)
    if quantizer.multiscale:
        return scaled_grid(shape, quantizer, grid_size)
    depth = shape[3] if len(shape) == 4 else 1
    if depth > quantizer.num_codebooks or (depth < quantizer.num_codebooks and not quantizer.coarse_to_fine):
        allowed = f"1..{quantizer.num_codebooks}" if quantizer.coarse_to_fine else f"{quantizer.num_codebooks}"
        raise ValueError(f"tokens of shape {shape} have {depth} codebooks; this tokenizer decodes {allowed} of them")
    found = (shape[1], shape[2])
    if grid_size not in (None, found):
        raise ValueError(
            f"tokens of shape {shape} are no grid of {grid_size[0]} x {grid_size[1]}, as image_size says; "
            f"give the size of the picture that they stand for, or leave it out"
        )
    return found


def scaled_grid(shape: tuple[int, ...], quantizer: Quantizer, grid_size: tuple[int, int] | None) -> tuple[int, int]:
    """`grid_of` for tokens (B, L)."""
    length = shape[1]
    if grid_size is None:
        squares = {num_places(quantizer, (side, side)): side for side in range(1, isqrt(length) + 2)}
        if length not in squares:
            near = sorted(squares, key=lambda each: abs(each - length))[:2]
            raise ValueError(
                f"tokens of shape {shape}: no square picture has {length} tokens (the nearest have "
                f"{' and '.join(map(str, sorted(near)))}); give image_size=(H, W) of the picture that they stand for"
            )
        return squares[length], squares[length]
    sizes = [height * width for height, width in quantizer.grids(*grid_size)]
    lengths = [sum(sizes[: count + 1]) for count in range(len(sizes))]
    if not quantizer.coarse_to_fine:
        lengths = lengths[-1:]
    if length not in lengths:
        raise ValueError(
            f"tokens of shape {shape} are not those of a grid of {grid_size[0]} x {grid_size[1]}, as image_size says: "
            f"it has {lengths[-1]}, and {', '.join(map(str, lengths[:-1])) or 'no fewer'} after the scales before"
        )
    return grid_size
