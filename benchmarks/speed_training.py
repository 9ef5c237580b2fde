"""A step of training, images/s, beside a plain PyTorch loop with vector-quantize-pytorch's layer.

Ours is the step of train/vqvae.py with the settings of each model. The peer has the same encoder and decoder with the
same weights, of PyTorch's own layers, its quantizer as its README shows it for images, squared error and AdamW: in
float32, in channels_last, and with bfloat16 besides; its best of all is the second that ours is held against. Floors of
arithmetic and memory stand beside the step, by rates of the same rounds, and the loader alone.
Shapes: B batch, S image side.
"""

import itertools
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from floors import dtypes_on, floors, machine_calls, machine_rates, work_of
from jpeg_photographs import write_photographs
from recording import ROOT, command_line, num_parameters, public_settings, tell
from stopwatch import SpeedRun, finish, four, interleaved, record_speed, speedup, spread
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from tokenizer import ImageTokenizer, attention, normalisation, pointwise, winograd
from train.checkpoint import RunFolder
from train.config import parse
from train.data import Batch, training_batches
from train.evaluation import TokenizerExaminer
from train.optimization import make_accelerator
from train.settings import PHOTOGRAPHS, TokenizerRun, at_least_one
from train.sources import open_splits
from train.step import TrainingStep

PEER_MODES = {
    "peer": {},
    "peer, channels_last": {"channels_last": True},
    "peer, bfloat16": {"channels_last": True, "bfloat16": True},  # where that is worth it
}
MARGIN = 1.25  # side of the pictures that the loader reads, against that of the crops


@dataclass
class TrainingSpeedRun(SpeedRun):
    """Settings of benchmarks/speed.py training."""

    models: list[str] = field(  # settings of train/vqvae.py
        default_factory=lambda: [
            "train/presets/cifar10/vqvae.yaml",
            "image_size=128",
            "image_size=128 mixed_precision=bf16",
            "image_size=128 model.autoencoder.norm_groups=32",
        ]
    )
    data: str = PHOTOGRAPHS  # that the loader reads; the embedded ones are cut into JPEG files of 1.25 S first
    named: str | None = None  # what the record calls the data; default: the setting `data`
    images: int = 1024  # JPEG files, and images that the loader reads for a figure
    profiled_steps: int = 8  # with the loader, of which the shares of time are taken
    seconds: float = 1.0  # that a figure is measured over, at least; one step is

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "images", "profiled_steps")


def main(config: TrainingSpeedRun, root: Path = ROOT) -> None:
    """Measure every model and write results/speed_training.json under `root`."""
    rows = []
    for words in config.models:
        tell(words)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row_of(words, config, Path(folder)))
    settings = public_settings(config)
    command = command_line("speed", "training", settings, public_settings(TrainingSpeedRun()), ())
    record_speed("training", {"command": command, "settings": settings, "rows": rows}, root)


def row_of(words: str, config: TrainingSpeedRun, folder: Path) -> dict[str, Any]:
    """Everything measured of one model."""
    ours = Training(words, config, folder)
    batch = ours.next_batch()
    calls = {"ours": lambda: ours.step(batch)}
    dtypes = dtypes_on(ours.accelerator.device)
    peers = {name: modes for name, modes in PEER_MODES.items() if "bfloat16" in dtypes or "bfloat16" not in modes}
    for name, modes in peers.items():
        calls[name] = Peer(ours.network, ours.run, **modes).bind(batch.crops)
    seconds = interleaved(calls | machine_calls(ours.accelerator.device), config.rounds, config.seconds)
    best = min(peers, key=lambda name: median(seconds[name]))
    size = len(batch.crops)
    work, rates = work_of(calls["ours"]), machine_rates(seconds)
    return {
        "model": words,
        "image_size": ours.run.image_size,
        "batch": size,
        "mixed_precision": ours.run.mixed_precision,
        "optimizer": ours.run.optimizer.name,
        "parameters": num_parameters(ours.network),
        "images_per_second": {name: spread([size / each for each in seconds[name]]) for name in ("ours", *peers)},
        "float32": speedup(seconds["ours"], seconds["peer"]),
        "fastest": {"peer": best, **speedup(seconds["ours"], seconds[best])},
        "operations_per_image": work.operations.total() // size,
        "rates_per_second": rates,
        "floor_images_per_second": floors(work, rates, size),
        "shares_of_time": ours.shares_of_time(config.profiled_steps),
        "loader_images_per_second": spread([ours.loader_speed(config.images) for _ in range(config.rounds)]),
    }


class Training:
    """What train/vqvae.py does with the settings in `words`, a step at a time, once the codes are placed."""

    def __init__(self, words: str, config: TrainingSpeedRun, folder: Path):
        given = [*shlex.split(words), f"output_dir={folder / 'run'}", f"speed.threads={config.threads}"]
        run = parse(TokenizerRun, [*given, f"seed={config.seed}"])
        data = config.data
        if data == PHOTOGRAPHS:
            write_photographs(folder / "jpeg", config.images, round(MARGIN * run.image_size), config.seed)
            data = str(folder / "jpeg")
        self.run = replace(run, data=data, split="train", eval_split=None)
        AcceleratorState._reset_state(reset_partial_state=True)  # the model before may have had another precision
        self.accelerator = make_accelerator(self.run)
        self.source, _ = open_splits(self.run)
        set_seed(self.run.seed)
        self.network = ImageTokenizer(self.run.model).to(self.accelerator.device)
        self.take_step = TrainingStep(self.network, self.run, self.accelerator, RunFolder(self.run))
        loss = self.take_step.reconstruction_loss
        self.examiner = TokenizerExaminer(self.network, loss, self.run, self.accelerator, self.source, [])
        self.step(self.next_batch())  # places the codes: the middle of a run is later than any placement

    def batches(self) -> Iterator[Batch]:
        """The training crops from the first one on."""
        return training_batches(self.source, self.run, self.accelerator, 0, set())

    def next_batch(self) -> Batch:
        return next(self.batches())

    def step(self, *batches: Batch) -> None:
        """The step in the middle of the run."""
        self.take_step(self.run.steps // 2, batches, self.examiner)

    def loader_speed(self, num_images: int) -> float:
        """Images a second of the crops alone, decoded for the first time, by the run's own workers."""
        batches = self.batches()  # the workers have started and made the first one
        num_batches = max(1, num_images // self.run.batch_size)
        begun = time.perf_counter()
        for _ in itertools.islice(batches, num_batches):
            pass
        return num_batches * self.run.batch_size / (time.perf_counter() - begun)

    def shares_of_time(self, num_steps: int) -> dict[str, float]:
        """Where the time of so many steps with their data goes, in shares of the whole."""
        network, step, batches = self.network, self.take_step, self.batches()
        places = {
            "encoder": [(network.autoencoder.encoder, "forward")],
            "quantizer": [(network.quantizer, "forward"), (network.quantizer, "step")],
            "decoder": [(network.autoencoder.decoder, "forward")],
            "losses": [(step.reconstruction_loss, "forward")],
            "backward": [(self.accelerator, "backward")],
            "optimizer": [(step.optimization, "take"), (step.optimization, "update_average")],
        }
        with clocked(places) as seconds:
            begun, waited = time.perf_counter(), 0.0
            for _ in range(num_steps):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                self.step(batch)
            finish()
            total = time.perf_counter() - begun
        seconds["data"] = waited
        seconds["rest"] = total - sum(seconds.values())
        return {name: four(each / total) for name, each in seconds.items()}


@contextmanager
def clocked(places: dict[str, list[tuple[Any, str]]]) -> Iterator[dict[str, float]]:
    """The seconds that methods of objects take inside the block, by name, a GPU's work included."""
    seconds = dict.fromkeys(places, 0.0)

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            finish()
            begun = time.perf_counter()
            result = method(*arguments, **options)
            finish()
            seconds[name] += time.perf_counter() - begun
            return result

        return call

    found = [(name, owner, method) for name, each in places.items() for owner, method in each]
    for name, owner, method in found:
        setattr(owner, method, timed(name, getattr(owner, method)))
    try:
        yield seconds
    finally:
        for _, owner, method in found:
            delattr(owner, method)  # the class's own is there again


class Peer(nn.Module):
    """The same encoder and decoder, of PyTorch's layers, around vector-quantize-pytorch's, and a plain loop's step."""

    def __init__(self, ours: ImageTokenizer, run: TokenizerRun, channels_last: bool = False, bfloat16: bool = False):
        super().__init__()
        self.autoencoder, self.bfloat16 = deepcopy(ours.autoencoder), bfloat16
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        size = ours.quantizer.num_codes
        layer = VectorQuantize(ours.config.codebook_dim, size, decay=0.8, commitment_weight=1.0, accept_image_fmap=True)
        self.quantizer = layer.to(ours.device)  # decay and weight as in its README
        self.to(memory_format=self.layout).train()
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=run.learning_rate)

    def bind(self, crops: Tensor) -> Callable[[], None]:
        """A step by a batch, uint8 (B, C, S, S)."""

        def step() -> None:
            images = (crops.float() / 255 * 2 - 1).to(memory_format=self.layout)
            in_bfloat16 = torch.autocast(crops.device.type, torch.bfloat16, enabled=self.bfloat16)
            with ExitStack() as changed:
                for module in (attention, pointwise, winograd):
                    changed.enter_context(patch.object(module, "LIBRARY", None))  # PyTorch's own instead
                changed.enter_context(patch.object(normalisation, "LANES", 0))
                changed.enter_context(in_bfloat16)
                codes, _, commitment = self.quantizer(self.autoencoder.encoder(images))
                loss = F.mse_loss(self.autoencoder.decoder(codes).float(), images) + commitment.sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

        return step
