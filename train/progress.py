"""What a run tells: metrics.jsonl always, a bar on a terminal or lines in a log, trackers if asked for."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tokenizer.images import tensor_to_pil
from tokenizer.metrics import perplexity, usage
from tokenizer.pretrained import written_whole

from .counting import LARGEST_WITH_USAGE, TOKENS_PER_CODE

METRICS_NAME = "metrics.jsonl"
PICTURE_WIDTH = 1600  # pixels, at most, of a sample picture
SMALLEST_SHOWN = 128  # pixels; smaller samples are enlarged


class Progress:
    """Writes one record a line to metrics.jsonl and to the trackers, and shows the bar; only the main rank speaks."""

    def __init__(self, folder: Path, accelerator: Accelerator, steps_done: int, steps: int):
        self.accelerator, self.path = accelerator, folder / METRICS_NAME
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            initial=steps_done, total=steps, unit="step", dynamic_ncols=True, file=sys.stderr,
            disable=not (accelerator.is_main_process and self.on_terminal),
        )  # fmt: skip
        self.clock = time.perf_counter()
        self.steps, self.begun_at = steps, steps_done
        if accelerator.is_main_process:  # what came after the checkpoint that the run resumes from is told again
            kept = [line for line in read_lines(self.path) if json.loads(line)["step"] <= steps_done]
            with written_whole(self.path) as part:
                part.write_text("".join(kept))

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append a record to metrics.jsonl and send it to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
        self.accelerator.log(values, step=step)

    def due(self, step: int) -> bool:
        """Whether a step is one of those that are told."""
        return step == 1 or step % max(1, min(50, self.steps // 100)) == 0

    def show(self, step: int, figures: dict[str, str]) -> None:
        """Advance to a step: its figures beside the bar, or in a line where there is no terminal."""
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.accelerator.is_main_process and not self.on_terminal:
            left = (time.perf_counter() - self.clock) / (step - self.begun_at) * (self.steps - step)
            told = ", ".join(f"{name} {value}" for name, value in figures.items())
            print(f"step {step}/{self.steps}: {told}, {tqdm.format_interval(left)} left", file=sys.stderr, flush=True)


def read_lines(path: Path) -> list[str]:
    """The whole lines of a text file, with their ends; none where there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]


class UsageWindow:
    """Usage and perplexity of the tokens of the last training batches, while the codebook moves.

    Of a vocabulary that is too large for a usage there are no figures: evaluations count what can be counted.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.counts: Tensor | None = None
        self.num_tokens = 0
        self.figures: dict[str, float] = {}

    def add(self, tokens: Tensor) -> None:
        """Count a batch; each time there are enough tokens, the figures are made anew."""
        if self.vocab_size > LARGEST_WITH_USAGE:
            return
        counts, flat = tokens.new_zeros(self.vocab_size), tokens.flatten()
        if self.counts is not None:
            counts += self.counts.to(counts.device)  # which a checkpoint has left on the CPU
        self.counts = counts.index_add_(0, flat, torch.ones_like(flat))
        self.num_tokens += tokens.numel()
        if self.num_tokens >= TOKENS_PER_CODE * self.vocab_size:
            self.figures = {"running_usage": usage(self.counts), "running_perplexity": perplexity(self.counts)}
            self.counts, self.num_tokens = None, 0

    def state_dict(self) -> dict[str, object]:
        return {"counts": self.counts, "num_tokens": self.num_tokens, "figures": self.figures}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.counts, self.num_tokens, self.figures = state["counts"], state["num_tokens"], state["figures"]


class StopRequest:
    """Whether the process was asked to end, by SIGTERM (pre-emption) or Ctrl-C."""

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block the two signals only leave a note; the handlers of before are put back."""
        names = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(name, self.note) for name in names]
        try:
            yield
        finally:
            for name, handler in zip(names, before, strict=True):
                signal.signal(name, handler)

    def note(self, number: int, frame: object) -> None:
        self.received = number


def save_sheet(path: Path, rows: list[list[Tensor]]) -> None:
    """A PNG of rows of (C, H, W) pictures in [0, 1], one size to a column, as many columns as fit the width."""
    columns = []
    for column in zip(*rows, strict=True):
        pictures = [tensor_to_pil(picture).convert("RGB") for picture in column]
        scale = max(1, -(-SMALLEST_SHOWN // min(pictures[0].size)))
        size = [side * scale for side in pictures[0].size]
        columns.append([picture.resize(size, Image.Resampling.NEAREST) for picture in pictures])
    while len(columns) > 1 and sum(column[0].width for column in columns) > PICTURE_WIDTH:
        columns.pop()
    height = max(column[0].height for column in columns)
    sheet = Image.new("RGB", (sum(column[0].width for column in columns), len(rows) * height), "white")
    left = 0
    for column in columns:
        for number, picture in enumerate(column):
            sheet.paste(picture, (left, number * height))
        left += column[0].width
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        sheet.save(part, format="PNG")
