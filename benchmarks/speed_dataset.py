"""A data set to tokens, images/s from JPEG files to parquet, as a share of what the tokenizer alone encodes.

train/encode_dataset.py with a tokenizer of about 11 million random weights, from the moment that it claims its folder
to tokens.json, beside `encode` on pictures that are decoded already, both with the same threads; the workers that
decode have no core of their own unless the machine has one to spare. As one process, and as several of equal threads.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jpeg_photographs import write_photographs
from recording import ROOT, command_line, num_parameters, public_settings, tell
from stopwatch import DeviceRun, in_turns, ratio, record_speed, seconds_of, spread

from tokenizer import ImageTokenizer, TokenizerConfig
from train.checkpoint import SETTINGS_NAME
from train.config import UserError
from train.cpu import keep_freed_memory
from train.settings import PHOTOGRAPHS, StoreRun, at_least_one, require
from train.token_store import INDEX_NAME, TokenStore

AUTOENCODER = {  # VQGAN's at factor 8
    "name": "convolutional",
    "patch_size": 1,
    "base_channels": 64,
    "channel_multipliers": [1, 1, 2, 4],
    "num_res_blocks": 1,
    "middle_attention": True,
    "latent_channels": 64,
    "norm_groups": 32,
}
MODEL = TokenizerConfig(autoencoder=AUTOENCODER, quantizer={"name": "ema_vq", "codebook_size": 16384})
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


@dataclass
class DatasetRun(DeviceRun):
    """Settings of benchmarks/speed.py dataset."""

    data: str = PHOTOGRAPHS  # photographs to encode; the embedded ones are cut into JPEG files first
    named: str | None = None  # what the record calls the data; default: the setting `data`
    images: int = 128  # JPEG files cut from the embedded photographs, the last shard's to validate on
    side: int = 224  # pixels of these
    image_size: int = 128  # pixels, side of the square that is encoded
    batch_size: int = 16  # pictures encoded at once
    rows_per_shard: int = 16  # images of one file of the store
    num_workers: int = 1  # processes per rank that decode
    ranks: int = 2  # that are held against one

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "images", "side", "ranks", "batch_size")
        rule = f"be above rows_per_shard={self.rows_per_shard}, those to validate on"
        require(self.images > self.rows_per_shard, f"images={self.images}", rule)


def main(config: DatasetRun, root: Path = ROOT, model: TokenizerConfig = MODEL) -> None:
    """Measure and write results/speed_dataset.json under `root`."""
    torch.set_num_threads(config.threads)
    keep_freed_memory()  # as the program does
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = ImageTokenizer(model)
        tokenizer.save_pretrained(folder / "tokenizer")
        figures = measured(config, folder, tokenizer.eval().to(config.device))
    settings = public_settings(config)
    command = command_line("speed", "dataset", settings, public_settings(DatasetRun()), ())
    record_speed("dataset", {"command": command, "settings": settings, **figures}, root)


def measured(config: DatasetRun, folder: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """All figures."""
    run = settings_of(config, folder)
    pictures = torch.randint(0, 256, (config.batch_size, 3, config.image_size, config.image_size), dtype=torch.uint8)
    several = f"{config.ranks} ranks"
    calls = {
        "encode alone": lambda: config.batch_size / seconds_of(lambda: tokenizer.encode(pictures), 3),
        "1 rank": lambda: end_to_end(run, 1, config.device),
        several: lambda: end_to_end(run, config.ranks, config.device),
    }
    speeds = in_turns(calls, config.rounds, told=True)
    return {
        "parameters": num_parameters(tokenizer),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "images_per_second": {name: spread(each) for name, each in speeds.items()},
        "share_of_encode_alone": ratio(speeds["1 rank"], speeds["encode alone"]),
        "ranks_against_one": ratio(speeds[several], speeds["1 rank"]),
    }


def settings_of(config: DatasetRun, folder: Path) -> StoreRun:
    """The settings of the program, whose data is written where none is given."""
    data = config.data
    if data == PHOTOGRAPHS:
        tell("writing JPEG files")
        write_photographs(folder / "data" / "train", config.images - config.rows_per_shard, config.side, config.seed)
        write_photographs(folder / "data" / "validation", config.rows_per_shard, config.side, config.seed + 1)
        data = str(folder / "data")
    run = StoreRun(
        output_dir=str(folder / "store"), tokenizer=str(folder / "tokenizer"), data=data, views="center",
        image_size=config.image_size, batch_size=config.batch_size, rows_per_shard=config.rows_per_shard,
        num_workers=config.num_workers,
    )  # fmt: skip
    run.speed.threads = config.threads
    return run


def end_to_end(run: StoreRun, ranks: int, device: str) -> float:
    """Images a second of the program as so many processes, but for their start and their libraries'."""
    folder = Path(tempfile.mkdtemp(dir=Path(run.tokenizer).parent))
    flat = {key: value for key, value in asdict(replace(run, output_dir=str(folder))).items() if value is not None}
    given = [f"{key}={value}" for key, value in flat.items() if not isinstance(value, dict)]
    launcher = [*LAUNCHER, str(ranks)] if ranks > 1 else []
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "train" / "encode_dataset.py"),
        *given,
        f"speed.threads={run.speed.threads}",
    ]
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    job = subprocess.run(command, env=os.environ | on_cpu, capture_output=True, text=True)
    if job.returncode != 0:
        raise UserError(f"{' '.join(command)} failed: {job.stderr[-500:]}")
    claimed, done = ((folder / name).stat().st_mtime for name in (SETTINGS_NAME, INDEX_NAME))
    return sum(TokenStore.open(folder).index.num_rows.values()) / (done - claimed)
