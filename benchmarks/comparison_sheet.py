"""A sheet of pictures, what each contender made of them, and its errors, each row with its name.

Shapes: N pictures, C channels, S side in pixels, uint8.
"""

import math
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokenizer.images import pil_to_tensor
from train.progress import SMALLEST_SHOWN, save_sheet

NUM_SHOWN = 8  # pictures
ERROR_GAIN = 4  # of the errors, around grey
TITLE_SIZE = 13  # pixels, height of the letters
TITLE_LETTERS = 22  # of a line


def save_comparison(path: Path, shown: list[Tensor], rows: list[dict[str, Any]]) -> None:
    """A PNG: `shown` has the pictures (N, C, S, S), then what became of them in the order of the measured `rows`.

    Of tokenizers all are drawn, with their errors; of each codec the quality whose bits are nearest to the first
    tokenizer's.
    """
    pictures, *reconstructed = shown
    lines = [(f"pictures, {pictures.shape[-1]} x {pictures.shape[-1]}", pictures / 255)]
    for number in drawn(rows):
        row, reconstructions = rows[number], reconstructed[number]
        quality = f" quality {row['quality']}" if "quality" in row else ""
        lines.append((f"{row['name']}{quality}, {row['bits_per_pixel']:.3f} bits per pixel", reconstructions / 255))
        if not quality:
            errors = 0.5 + ERROR_GAIN * (reconstructions.float() - pictures.float()) / 255
            lines.append((f"its errors, {ERROR_GAIN} times, around grey", errors.clamp(0, 1)))
    side = pictures.shape[-1]
    height = side * max(1, math.ceil(SMALLEST_SHOWN / side))  # as the sheet enlarges them
    save_sheet(path, [[title(text, height), *batch.expand(-1, 3, -1, -1)] for text, batch in lines])


def drawn(rows: list[dict[str, Any]]) -> list[int]:
    """The numbers of the rows on the sheet."""
    tokenizers = [number for number, row in enumerate(rows) if "quality" not in row]
    bits = math.log(rows[0]["bits_per_pixel"])
    nearest: dict[str, int] = {}
    for number in sorted(
        set(range(len(rows))) - set(tokenizers), key=lambda number: abs(math.log(rows[number]["bits_per_pixel"]) - bits)
    ):
        nearest.setdefault(rows[number]["name"], number)
    return tokenizers + sorted(nearest.values())


def title(text: str, height: int) -> Tensor:
    """Black on white, (3, height, W) in [0, 1]."""
    font = ImageFont.load_default(TITLE_SIZE)
    image = Image.new("RGB", (TITLE_SIZE * 12, height), "white")
    wrapped = "\n".join(textwrap.wrap(text, TITLE_LETTERS))
    ImageDraw.Draw(image).multiline_text((6, height // 2), wrapped, fill="black", font=font, anchor="lm")
    return pil_to_tensor(image) / 255
