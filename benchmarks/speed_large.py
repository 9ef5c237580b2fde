"""Large pictures in tiles: seconds, peak memory, and how far the tiles are from the picture as a whole.

The picture is a mosaic of photographs, each at a size that the tokenizer knows, whose borders lie apart from those of
the tiles. Up to `largest_whole` it is also coded as a whole: the share of tokens that differ, and of the same tokens
the mean difference of pixels, near where one tile gives way to the next and elsewhere, in levels of 256; beside them
the mean error of coding itself. Shapes: N photographs, C channels, S side in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from labelled_images import content_hash, validation_pictures
from recording import ROOT, command_line, num_parameters, public_settings, refusals, tell
from stopwatch import DeviceRun, each_at_least_one, four, interleaved, peak_memory, record_speed, seconds_of, spread
from torch import Tensor

from tokenizer import ImageTokenizer
from train.settings import PHOTOGRAPHS, SourceSettings, at_least_one, require


@dataclass
class LargeRun(DeviceRun):
    """Settings of benchmarks/speed.py large."""

    tokenizer: str = "runs/vqvae"  # folder or repo id, of a model without classes
    data: str = PHOTOGRAPHS  # embedded ones; or as for train/vqvae.py
    named: str | None = None  # the Hub id of `data` where that is a path; stands in the record in its place
    split: str = "train"  # split that the tokenizer was trained on
    eval_split: str | None = None  # split of the mosaic; default: validation, else test, else a seeded 2% held out
    photograph_size: int = 160  # pixels of a side in the mosaic; short sides are brought to it
    image_sizes: list[int] = field(default_factory=lambda: [768, 4096])  # S, pixels
    tile_size: int = 256  # pixels
    tile_overlaps: list[int] = field(default_factory=lambda: [0, 16, 32, 64])  # pixels; where not whole, the last
    largest_whole: int = 1024  # S up to which the picture is coded as a whole too
    data_options: SourceSettings = field(default_factory=SourceSettings)

    streaming: ClassVar[bool] = False  # the mosaic is held in memory

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "photograph_size")
        each_at_least_one(self, "image_sizes")
        require(bool(self.tile_overlaps), "tile_overlaps=[]", "hold at least one number of pixels")


def main(config: LargeRun, root: Path = ROOT) -> None:
    """Measure every size and write results/speed_large.json under `root`."""
    torch.set_num_threads(config.threads)
    with refusals():
        tokenizer = ImageTokenizer.from_pretrained(config.tokenizer).to(config.device)
        for size in config.image_sizes:
            tokenizer.grid_size(size)
    require(not tokenizer.config.num_classes, f"tokenizer={config.tokenizer}", "be a model without classes")
    limit = num_across(max(config.image_sizes), config.photograph_size) ** 2  # what the largest has room for
    photographs = validation_pictures(config, tokenizer.config.image_channels, config.photograph_size, limit)
    rows = []
    for size in config.image_sizes:
        with refusals():
            rows += rows_of(tokenizer, mosaic(photographs, size).to(config.device), config)
    always = ("tokenizer", "data")
    settings = public_settings(config)
    figures = {
        "command": command_line("speed", "large", settings, public_settings(LargeRun()), always),
        "settings": settings,
        "parameters": num_parameters(tokenizer),
        "photographs": {"images": len(photographs), "sha256": content_hash(photographs)},
        "rows": rows,
    }
    record_speed("large", figures, root)


def num_across(side: int, photograph_size: int) -> int:
    """Photographs along a side of a mosaic; the last are cut off."""
    return -(-side // photograph_size)


def mosaic(photographs: Tensor, side: int) -> Tensor:
    """Photographs (N, C, S, S), from the first again where they do not suffice, as one picture (C, side, side)."""
    across = num_across(side, photographs.shape[2])
    chosen = photographs[torch.arange(across**2) % len(photographs)].unflatten(0, (across, across))
    return chosen.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[:, :side, :side].contiguous()


def rows_of(tokenizer: ImageTokenizer, picture: Tensor, config: LargeRun) -> list[dict[str, Any]]:
    """Everything measured of one picture (C, S, S) uint8: as a whole where that fits, and by each overlap."""
    side = picture.shape[1]
    with_whole = side <= config.largest_whole
    overlaps = config.tile_overlaps if with_whole else config.tile_overlaps[-1:]
    ways: dict[str, dict[str, int]] = {"whole": {}} if with_whole else {}
    ways |= {f"{each}": {"tile_size": config.tile_size, "tile_overlap": each} for each in overlaps}
    tell(f"a picture of {side} pixels a side")
    tokens = tokenizer.encode(picture, **next(iter(ways.values())))
    rebuilt = tokenizer.decode(tokens) if with_whole else None
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, way in ways.items():
        calls[f"encode {name}"] = lambda way=way: tokenizer.encode(picture, **way)
        calls[f"decode {name}"] = lambda way=way: tokenizer.decode(tokens, (side, side), **way)
    memory = {name: peak_memory(call, config.device) for name, call in calls.items()}
    if with_whole:
        seconds = interleaved(calls, config.rounds, seconds=0.0)
    else:  # long calls, alone and already warm
        seconds = {name: [seconds_of(call, 1) for _ in range(config.rounds)] for name, call in calls.items()}
    rows = []
    for name, way in ways.items():
        row: dict[str, Any] = {"image_size": side, "picture_bytes": 4 * picture.numel(), **way}
        for part in ("encode", "decode"):
            row[part] = {"seconds": spread(seconds[f"{part} {name}"]), "peak_memory": memory[f"{part} {name}"]}
        if way and with_whole:
            row |= differences(tokenizer, picture, tokens, rebuilt, way)
        rows.append(row)
    return rows


def differences(
    tokenizer: ImageTokenizer, picture: Tensor, tokens: Tensor, rebuilt: Tensor, way: dict[str, int]
) -> dict[str, float]:
    """How far coding in tiles is from `tokens` and `rebuilt`, the picture coded as a whole."""
    changed = (tokenizer.encode(picture, **way) != tokens).double().mean().item()
    errors = 255 * (tokenizer.decode(tokens, tuple(picture.shape[1:]), **way) - rebuilt).abs().mean((0, 1))  # (H, W)
    at_seams = near_seams(tokenizer, picture.shape[1], way).to(errors.device)
    coding = (rebuilt[0] - picture / 255).abs().mean().item()
    return {
        "tokens_that_differ": four(changed),
        "error_at_seams": four(errors[at_seams].mean().item()),
        "error_elsewhere": four(errors[~at_seams].mean().item()),
        "error_of_coding": four(255 * coding),
    }


def near_seams(tokenizer: ImageTokenizer, side: int, way: dict[str, int]) -> Tensor:
    """Which pixels (side, side) lie as near a seam as a token is wide."""
    factor = tokenizer.downsample_factor
    near = torch.zeros(side, dtype=torch.bool)
    for cut in tokenizer.tiles(**way).cuts(side // factor, factor):
        near[cut - factor : cut + factor] = True
    return near[:, None] | near
