"""Quality against bits: tokenizers as points, codecs as curves.

A row has `name`, `bits_per_pixel` and, by a measure's name, {mean, low, high}, of a tokenizer's LPIPS also {network,
trained_on}; a codec has a row per quality.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from recording import save_plot

TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS-{network} (less is better)"}

Row = dict[str, Any]


def at_same_bits(bits: float, codec_rows: list[Row]) -> dict[str, dict[str, float] | None]:
    """What each codec reaches at so many bits per pixel: its means, linear in log(bits) between two qualities.

    None where the bits lie outside the codec's range: it cannot make files as small, or as large.
    """
    reached = {}
    for name, curve in curves(codec_rows).items():
        places = [row["bits_per_pixel"] for row in curve]
        if places[0] <= bits <= places[-1]:
            values = {measure: [row[measure]["mean"] for row in curve] for measure in measures(curve[0])}
            means = {each: np.interp(np.log(bits), np.log(places), values[each]).item() for each in values}
            reached[name] = means
        else:
            reached[name] = None
    return reached


def curves(codec_rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each codec, from few bits to many."""
    ordered = sorted(codec_rows, key=lambda row: (row["name"], row["bits_per_pixel"]))
    return {name: list(rows) for name, rows in groupby(ordered, key=lambda row: row["name"])}


def measures(row: Row) -> list[str]:
    """The measures of quality that a row has."""
    return [measure for measure in TITLES if measure in row]


def plot(path: Path, rows: list[Row]) -> None:
    """A PNG with a panel per measure: means with their intervals over bits per pixel, on a logarithmic axis."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a screen
    from matplotlib.ticker import LogLocator, NullLocator

    codec_rows = [row for row in rows if "quality" in row]
    tokenizer_rows = [row for row in rows if "quality" not in row]
    shown = measures(rows[0])
    figure = Figure(figsize=(4.5 * len(shown), 3.8), layout="constrained")
    for measure, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        for name, curve in curves(codec_rows).items():
            draw(axes, curve, measure, name, ".-")
        for row in tokenizer_rows:
            seen = row[measure].get("trained_on") is True
            draw(axes, [row], measure, f"{row['name']}, trained on it" if seen else row["name"], "o")
        axes.set(xscale="log", xlabel="bits per pixel", title=TITLES[measure].format(**rows[0][measure]))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_plot(path, figure, 100)


def draw(axes: Any, rows: list[Row], measure: str, name: str, style: str) -> None:
    """One tokenizer or codec in one panel."""
    means, lows, highs = (np.array([row[measure][end] for row in rows]) for end in ("mean", "low", "high"))
    spread = np.clip([means - lows, highs - means], 0, None)
    axes.errorbar([row["bits_per_pixel"] for row in rows], means, spread, fmt=style, label=name, capsize=2)
