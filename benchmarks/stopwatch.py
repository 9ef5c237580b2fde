"""How long calls take beside each other on a machine that others use too, and how much memory each of them."""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from recording import ROOT, record, tell

from tokenizer.kernels.memory import RESERVE
from train.settings import at_least_one, require

MIN_ROUNDS = 5
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Figure = TypeVar("Figure")


@dataclass
class SpeedRun:
    """What every part of benchmarks/speed.py that measures in this process can be told."""

    rounds: int = 5  # figures of each, of which the median is taken
    threads: int = 1  # of each process
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        require(self.rounds >= MIN_ROUNDS, f"rounds={self.rounds}", f"be at least {MIN_ROUNDS}")
        at_least_one(self, "threads")


@dataclass
class DeviceRun(SpeedRun):
    """And of every part that does so on a device of its choice."""

    device: str = "cpu"  # as torch names it

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)


def check_device(device: str) -> None:
    """Raise ValueError unless something can be computed there."""
    try:
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device} cannot be used ({reason}); `cpu`, or one that torch sees") from None


def each_at_least_one(config: object, *names: str) -> None:
    """Raise ValueError unless these settings are lists of numbers of at least 1."""
    for name in names:
        values = getattr(config, name)
        require(bool(values) and min(values) >= 1, f"{name}={values}", "hold numbers of at least 1, one or more")


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds that a call takes, of each name one figure a round.

    A figure is the mean over as many calls as take `seconds`, at least one, after a first call that does not count.
    """
    repeats = {}
    for name, call in calls.items():
        seconds_of(call, 1)
        repeats[name] = max(1, math.ceil(seconds / seconds_of(call, 1)))
    return in_turns({name: partial(seconds_of, call, repeats[name]) for name, call in calls.items()}, rounds)


def in_turns(measures: dict[str, Callable[[], Figure]], rounds: int, told: bool = False) -> dict[str, list[Figure]]:
    """What the calls return, of each name one figure a round; `told`: each round is announced.

    A round goes through all of them, the next one backwards, so that what else the machine does meets them alike.
    """
    found: dict[str, list[Figure]] = {name: [] for name in measures}
    for number in range(rounds):
        if told:
            tell(f"round {number + 1} of {rounds}")
        for name in list(measures)[:: -1 if number % 2 else 1]:
            found[name].append(measures[name]())
    return found


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """The mean time of a call."""
    finish()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return (time.perf_counter() - begun) / repeats


def finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(figures: list[float]) -> dict[str, float]:
    """Median, lowest and highest, to four digits."""
    return {"median": four(median(figures)), "low": four(min(figures)), "high": four(max(figures))}


def speedup(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as fast as they we are, round by round."""
    return ratio(theirs, ours)


def ratio(figures: list[float], others: list[float]) -> dict[str, float]:
    """Of figures to others, round by round."""
    return spread([figure / other for figure, other in zip(figures, others, strict=True)])


def record_speed(part: str, figures: dict[str, object], root: Path = ROOT) -> None:
    """To results/speed_PART.json, or of a processor without AVX-512 to speed_avx2_PART.json beside it."""
    kind = "speed_avx2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "speed"
    record(f"{kind}_{part}", figures, root)


def four(figure: float) -> float:
    """Rounded to four digits: more were never measured."""
    return float(f"{figure:.4g}")


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call takes at its height beyond what was held before; None where the system does not tell.

    On a GPU what PyTorch allocates there, on a CPU what of the process lies in memory (Linux).
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    RESERVE.held.clear()  # or the call would fill what earlier ones have left behind
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the height begins anew
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at the height."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024
