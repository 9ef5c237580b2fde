"""A small encoder with each quantizer of the table, trained by two ranks: python two_rank_training.py FOLDER."""

import inspect
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from latents import DIM, latents_of
from safetensors.torch import save_file
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from tokenizer import QUANTIZERS

NUM_STEPS = 8
# Where they apply: fewer codes than vectors, or rounding decides between twins; and a revival at nearly every step.
SETTINGS = {"codebook_size": 32, "revival_threshold": 0.5}
SETTINGS["each"] = {"name": "ema_vq", **SETTINGS}


class Compressor(nn.Module):
    """Its forward pass is its loss, so that it can be wrapped whole."""

    def __init__(self, name: str):
        super().__init__()
        self.encoder = nn.Conv2d(3, DIM, 1)
        choice = QUANTIZERS[name]
        known = inspect.signature(choice).parameters
        self.quantizer = choice(DIM, **{key: value for key, value in SETTINGS.items() if key in known})
        self.decoder = nn.Conv2d(DIM, 3, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        output = self.quantizer(self.encoder(pictures))
        return (self.decoder(output.quantized) - pictures).square().mean() + sum(output.losses.values())


def train(name: str, rank: int, num_ranks: int) -> dict[str, Tensor]:
    """The state after a few steps on this rank's share of the batches."""
    torch.manual_seed(0)
    model = Compressor(name).train()
    wrapped = DistributedDataParallel(model) if num_ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, NUM_STEPS + 1):
        loss = wrapped(latents_of(step, 8, 3, 8, 8).chunk(num_ranks)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.quantizer.step(step / NUM_STEPS)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def train_all(rank: int, num_ranks: int, folder: Path) -> None:
    """Train each quantizer as one of several ranks, and save what it ends with."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    for name in QUANTIZERS:
        save_file(train(name, rank, num_ranks), folder / f"{name}_{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(train_all, (2, Path(sys.argv[1])), nprocs=2, start_method="fork")
