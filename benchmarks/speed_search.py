"""The search for the nearest code, and a training step of it, beside vector-quantize-pytorch's and diffusers'.

All have the same codes and latents and are called as their users call them. Search: from latents to codes and indices
in eval mode. Training step: the same with the losses, the gradient of the latents through the straight-through
estimator and the codebook's statistics; diffusers' class has no EMA codebook, it learns by gradient, which is timed in
its place. Floors: our search alone, without lookup and losses, beside the bare product of latents and codes and
beside what the rates of arithmetic and memory would make of it.
Shapes: B pictures, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from floors import floors, machine_calls, machine_rates, work_of
from recording import ROOT, command_line, tell
from stopwatch import DeviceRun, each_at_least_one, four, interleaved, peak_memory, record_speed, speedup, spread
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from tokenizer.quantizers.ema_vq import EMAVectorQuantizer
from tokenizer.quantizers.search import nearest_codes
from train.settings import require

GRID = 16  # h and w
PEERS = ("diffusers", "vector-quantize-pytorch")


@dataclass
class SearchRun(DeviceRun):
    """Settings of benchmarks/speed.py search."""

    codebook_sizes: list[int] = field(default_factory=lambda: [512, 4096, 16384, 262144])  # K
    codebook_dims: list[int] = field(default_factory=lambda: [8, 16, 256])  # D
    max_scores: int = 2**26  # N x K, by which the number of vectors is chosen: the peers hold several of that size
    max_vectors: int = 4096  # N
    seconds: float = 0.02  # that a figure is measured over, at least

    def __post_init__(self) -> None:
        super().__post_init__()
        each_at_least_one(self, "codebook_sizes", "codebook_dims")
        require(self.max_vectors >= GRID**2, f"max_vectors={self.max_vectors}", f"be at least {GRID**2}, a picture")


def main(config: SearchRun, root: Path = ROOT) -> None:
    """Measure every size and write results/speed_search.json under `root`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rows, rates = [], machine_rates(interleaved(machine_calls(config.device), config.rounds, config.seconds))
    for size in config.codebook_sizes:
        for dim in config.codebook_dims:
            tell(f"{size} codes of {dim} components")
            rows.append(row_of(size, dim, rates, config))
    command = command_line("speed", "search", asdict(config), asdict(SearchRun()), ())
    figures = {"command": command, "settings": asdict(config), "rates_per_second": rates, "rows": rows}
    record_speed("search", figures, root)


def row_of(size: int, dim: int, rates: dict[str, float], config: SearchRun) -> dict[str, Any]:
    """Everything measured of K = size and D = dim."""
    num_images = max(1, min(config.max_vectors, config.max_scores // size) // GRID**2)
    latents = torch.randn(num_images, dim, GRID, GRID, device=config.device)
    codes = torch.randn(size, dim, device=config.device)
    quantizers = {"ours": our_quantizer(codes), **their_quantizers(codes)}
    vectors = latents.movedim(1, -1).reshape(-1, dim)
    searches = {name: searching(quantizer, latents) for name, quantizer in quantizers.items()}
    trainings = {name: training(quantizer, latents) for name, quantizer in quantizers.items()}
    chosen = {name: parts_of(search())[1].flatten() for name, search in searches.items()}
    alone = {"ours": lambda: nearest_codes(vectors, codes), "product": lambda: vectors @ codes.T}
    return {
        "codebook_size": size,
        "codebook_dim": dim,
        "vectors": len(vectors),
        "same_codes": {name: four((chosen[name] == chosen["ours"]).float().mean().item()) for name in PEERS},
        "search": compared(searches, len(vectors), config),
        "alone": compared(alone, len(vectors), config),
        "floor_vectors_per_second": floors(work_of(alone["ours"]), rates, len(vectors)),
        "training": compared(trainings, len(vectors), config),
    }


def our_quantizer(codes: Tensor) -> nn.Module:
    """An EMA codebook that is placed, and that moves no code but by its averages, as those of the peers."""
    size, dim = codes.shape
    quantizer = EMAVectorQuantizer(dim, size, revival_threshold=0.0).to(codes.device)
    quantizer.ema_sum.copy_(codes)
    quantizer.num_steps.fill_(1)
    return quantizer


def their_quantizers(codes: Tensor) -> dict[str, nn.Module]:
    """The peers with the same codes, by name."""
    size, dim = codes.shape
    diffusers = DiffusersQuantizer(size, dim, beta=0.25, legacy=False).to(codes.device)
    diffusers.embedding.weight.data.copy_(codes)
    lucidrains = VectorQuantize(
        dim, size, decay=0.99, commitment_weight=0.25, rotation_trick=False, accept_image_fmap=True
    ).to(codes.device)
    for name in ("embed", "embed_avg"):
        getattr(lucidrains._codebook, name).data.copy_(codes)
    return dict(zip(PEERS, (diffusers, lucidrains), strict=True))


def parts_of(output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized latents, indices and the sum of the losses, of whatever a quantizer returns."""
    if hasattr(output, "quantized"):
        return output.quantized, output.indices, sum(output.losses.values())
    first, second, third = output
    if isinstance(third, tuple):  # diffusers
        return first, third[2], second
    return first, second, third.sum()


def searching(quantizer: nn.Module, latents: Tensor) -> Callable[[], object]:
    """One call in eval mode."""

    def search() -> object:
        with torch.no_grad():
            return quantizer.eval()(latents)

    return search


def training(quantizer: nn.Module, latents: Tensor) -> Callable[[], object]:
    """One step of training: forward, backward, and the codebook's own step where it has one."""
    latents = latents.clone().requires_grad_()

    def step() -> None:
        quantized, _, loss = parts_of(quantizer.train()(latents))
        (F.mse_loss(quantized, torch.zeros_like(quantized)) + loss).backward()
        latents.grad = None
        quantizer.zero_grad()
        if hasattr(quantizer, "step"):
            quantizer.step()

    return step


def compared(calls: dict[str, Callable[[], object]], num_vectors: int, config: SearchRun) -> dict[str, Any]:
    """Vectors a second and peak memory of each, and how many times as fast as the others ours is."""
    memory = {name: peak_memory(call, config.device) for name, call in calls.items()}
    seconds = interleaved(calls, config.rounds, config.seconds)
    return {
        name: {
            "vectors_per_second": spread([num_vectors / each for each in figures]),
            "peak_memory": memory[name],
            **({} if name == "ours" else {"ours_is_faster": speedup(seconds["ours"], figures)}),
        }
        for name, figures in seconds.items()
    }
