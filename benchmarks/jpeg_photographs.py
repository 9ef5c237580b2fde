"""JPEG photographs for measurements that need a data set to read: seeded cuts of the embedded ones."""

from pathlib import Path

import numpy as np
from PIL import Image

from train.sources import embedded

QUALITY = 90  # as a camera or a browser would save them


def write_photographs(folder: Path, count: int, side: int, seed: int) -> None:
    """So many JPEG files of side x side pixels, each a square of some photograph, scaled down from whatever it was."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.open(row["path"]).convert("RGB") for row in embedded("train").data.to_pydict()["image"]]
    random = np.random.default_rng(seed)
    for number in range(count):
        source = sources[number % len(sources)]
        width = int(random.integers(min(side, *source.size), min(source.size) + 1))
        left, top = (int(random.integers(length - width + 1)) for length in source.size)
        cut = source.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + width, top + width))
        cut.save(folder / f"{number:05d}.jpg", quality=QUALITY)
