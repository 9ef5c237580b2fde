"""Start-up: seconds of importing and of loading a tokenizer from a folder, beside diffusers' VQModel, same weights.

Each figure is of a process of its own, in turns; the files lie in the system's cache. What `import torch` takes is
counted apart, since both need it. Beside them stands what reading the weights takes, into memory that is the process's
own, as ours does; diffusers leaves them in the mapped file, to be read when they are first used.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from recording import ROOT, command_line, num_parameters
from speed_codec import ARCHITECTURES
from stopwatch import MIN_ROUNDS, in_turns, record_speed, speedup, spread

from tokenizer import ImageTokenizer
from train.settings import require

STARTED = """
import json, sys, time
begun = time.perf_counter()
import torch
torch_there = time.perf_counter()
IMPORT
library_there = time.perf_counter()
LOAD
print(json.dumps([torch_there - begun, library_there - torch_there, time.perf_counter() - library_there]))
"""
STARTS = {  # of each what is imported, and how the weights in the folder sys.argv[1] are loaded
    "ours": ("from tokenizer import ImageTokenizer", "ImageTokenizer.from_pretrained(sys.argv[1])"),
    "diffusers": ("from diffusers import VQModel", "VQModel.from_pretrained(sys.argv[1])"),
    "reading alone": (
        "from safetensors.torch import load_file",
        "[each.clone() for each in load_file(f'{sys.argv[1]}/model.safetensors').values()]",
    ),
}
PARTS = ("import_torch", "import_library", "load")


@dataclass
class StartRun:
    """Settings of benchmarks/speed.py start."""

    model: str = "76M"  # one of the architectures of speed_codec.py
    rounds: int = 7  # processes of each, of which the median is taken

    def __post_init__(self) -> None:
        require(self.model in ARCHITECTURES, f"model={self.model}", f"be one of {', '.join(ARCHITECTURES)}")
        require(self.rounds >= MIN_ROUNDS, f"rounds={self.rounds}", f"be at least {MIN_ROUNDS}")


def main(config: StartRun, root: Path = ROOT) -> None:
    """Measure and write results/speed_start.json under `root`."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = f"{folder}/theirs", f"{folder}/ours"
        ARCHITECTURES[config.model].vq_model().save_pretrained(theirs)
        model = ImageTokenizer.from_diffusers(theirs, pixel_range=(0, 1))
        model.save_pretrained(ours)
        folders = {"ours": ours, "diffusers": theirs, "reading alone": ours}
        for name in STARTS:  # fills the system's cache and does not count
            started(name, folders[name])
        starts = {name: partial(started, name, folders[name]) for name in STARTS}
        seconds = in_turns(starts, config.rounds, told=True)
    command = command_line("speed", "start", asdict(config), asdict(StartRun()), ())
    figures = {"command": command, "settings": asdict(config), "parameters": num_parameters(model)}
    record_speed("start", figures | {"each": summaries(seconds)}, root)


def summaries(seconds: dict[str, list[list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median and spread over the rounds of each part, of all parts after torch, and how much faster ours is there."""
    beyond = {name: [sum(each[1:]) for each in rounds] for name, rounds in seconds.items()}
    return {
        name: {part: spread(list(each)) for part, each in zip(PARTS, zip(*rounds, strict=True), strict=True)}
        | {"beyond_torch": spread(beyond[name]), "ours_is_faster": speedup(beyond["ours"], beyond[name])}
        for name, rounds in seconds.items()
    }


def started(name: str, folder: str) -> list[float]:
    """Seconds of the PARTS in a new process; RuntimeError with what it said where it fails."""
    library, load = STARTS[name]
    code = STARTED.replace("IMPORT", library).replace("LOAD", load)
    finished = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{name} did not start:\n{finished.stderr}")
    return json.loads(finished.stdout.splitlines()[-1])
