"""What one rank meets, every rank decides by: two processes."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from train import encode_dataset
from train.checkpoint import RunFolder
from train.config import Stopped, parse
from train.optimization import Optimization, make_accelerator
from train.progress import StopRequest
from train.settings import StoreRun, TokenizerRun

SKIPPING = ["optimizer.on_nonfinite=skip", "speed.threads=1"]


def decide_on_a_rank(rank: int, folder: Path, store: list[str]) -> None:
    """Save what this rank decides where the other one, rank 1, alone meets something."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    os.environ["MASTER_ADDR"] = "localhost"  # Accelerate asks for it, though the two have met by then
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    run = parse(TokenizerRun, [*SKIPPING, f"output_dir={folder / 'run'}"])
    accelerator = make_accelerator(run)
    assert accelerator.num_processes == 2
    network = nn.Linear(2, 1)
    optimization = Optimization(network, run, accelerator, RunFolder(run))
    decided = []
    for loss_of_one, signal_of_one in [(1.0, None), (torch.nan, None), (1.0, signal.SIGTERM)]:
        optimization.stop.received = signal_of_one if rank == 1 else None
        accelerator.backward(optimization.model(torch.ones(4, 2)).sum())
        loss = torch.tensor(loss_of_one if rank == 1 else 1.0)  # of which no gradient tells the other rank
        decided.append((optimization.take(1, {"l2": loss}), optimization.stopping))
    encode_dataset.StopRequest = lambda: asked_to_stop(rank)
    try:
        encode_dataset.encode_dataset(parse(StoreRun, store), accelerator)
        decided.append("encoded")
    except Stopped:
        decided.append("stopped")
    torch.save({"decided": decided, "weight": network.weight.detach()}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def asked_to_stop(rank: int) -> StopRequest:
    """As if a signal had reached rank 1 alone."""
    stop = StopRequest()
    stop.received = signal.SIGTERM if rank == 1 else None
    return stop


@pytest.fixture
def store(tiny_tokenizer, two_classes, tmp_path) -> list[str]:
    """Settings of a token store with two shards for each rank."""
    given = [f"tokenizer={tiny_tokenizer}", f"data={two_classes}", f"output_dir={tmp_path / 'store'}"]
    return [*given, "image_size=8", "rows_per_shard=5", "num_workers=0", "speed.threads=1"]


def test_a_value_that_is_not_finite_and_a_signal_at_one_rank_are_those_of_all(store, tmp_path):
    torch.multiprocessing.spawn(decide_on_a_rank, (tmp_path, store), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["decided"] == second["decided"] == [(True, False), (False, False), (True, True), "stopped"]
    assert torch.equal(first["weight"], second["weight"])
