"""Generation, tokens/s, beside a Llama of the same width, depth, heads and vocabulary by transformers' `generate`.

Both have random weights of the same type and draw whole grids from the plain distribution. The peer with each cache it
documents for a CPU, its faster one is what ours is held against. Guidance, two passes in one, beside none. Floors: of
memory, weights and cache read once a step at the rate of a large copy; of arithmetic, the products at the rate of a
large one. Weights that the processor's own cache holds may be read faster than the first.
Shapes: B batch, T tokens of a grid.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the peer's weights are random, nothing is to be looked up

import torch
from recording import ROOT, command_line, num_parameters, record, tell, version_of
from stopwatch import SpeedRun, four, interleaved, peak_memory, speedup, spread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prior import AutoregressivePrior, PriorConfig
from train.settings import require

CACHES = {"transformers, dynamic cache": "dynamic", "transformers, static cache": "static"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPIED = 2**28  # bytes, more than a processor's own cache holds
PRODUCT = 1024  # rows and columns of the product that tells the rate of arithmetic


@dataclass
class GenerationRun(SpeedRun):
    """Settings of benchmarks/speed.py generation."""

    width: int = 256
    num_layers: int = 8
    num_heads: int = 8
    vocab_size: int = 1024
    grid_sides: list[int] = field(default_factory=lambda: [8])  # of square grids: T is the square
    batch_sizes: list[int] = field(default_factory=lambda: [1, 64])  # B
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))
    guidance_scale: float = 2.0  # of the guided figure
    seconds: float = 0.0  # that a figure is measured over, at least; one call is

    def __post_init__(self) -> None:
        super().__post_init__()
        require(set(self.dtypes) <= set(DTYPES), f"dtypes={self.dtypes}", f"be of {', '.join(DTYPES)}")


def main(config: GenerationRun, root: Path = ROOT) -> None:
    """Measure every grid, type and batch and write results/speed_generation.json under `root`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rows = []
    for side in config.grid_sides:
        for dtype in config.dtypes:
            models = prior(config, side), llama(config, side)
            ours, peer = (model.eval().to(config.device, DTYPES[dtype]) for model in models)
            for batch in config.batch_sizes:
                tell(f"{batch} grids of {side} x {side} tokens in {dtype}")
                rows.append({"grid_side": side, "dtype": dtype, "batch": batch} | row_of(ours, peer, batch, config))
    command = command_line("speed", "generation", asdict(config), asdict(GenerationRun()), ())
    peer_version = version_of("transformers")
    figures = {"command": command, "settings": asdict(config), "transformers": peer_version, "rows": rows}
    record("speed_generation", figures, root)


def prior(config: GenerationRun, side: int) -> AutoregressivePrior:
    """Ours, with one class beside the null class, so that it can be guided."""
    sizes = {name: getattr(config, name) for name in ("vocab_size", "width", "num_layers", "num_heads")}
    return AutoregressivePrior(PriorConfig(grid_size=[side, side], num_classes=1, **sizes))


def llama(config: GenerationRun, side: int) -> LlamaForCausalLM:
    """The peer with a feed-forward layer as wide as ours; no token ends it early."""
    feed_forward = prior(config, side).transformer.blocks[0].feed_forward
    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=feed_forward.project.in_features,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=side**2 + 1,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(settings)


def row_of(ours: AutoregressivePrior, peer: LlamaForCausalLM, batch: int, config: GenerationRun) -> dict[str, Any]:
    """Everything measured of one pair of models at B = batch."""
    num_tokens, names = ours.config.num_tokens, ("ours", "ours, guided", *CACHES)
    calls = {
        "ours": lambda: ours.generate([0] * batch, batch_size=batch),
        "ours, guided": lambda: ours.generate([0] * batch, batch_size=batch, guidance_scale=config.guidance_scale),
    } | {name: generating(peer, batch, num_tokens, cache) for name, cache in CACHES.items()}
    memory = {name: peak_memory(calls[name], config.device) for name in names}
    seconds = interleaved(calls | machine_calls(ours), config.rounds, config.seconds)
    best = min(CACHES, key=lambda name: sum(seconds[name]))
    rates = {name: [batch * num_tokens / each for each in seconds[name]] for name in names}
    return {
        "parameters": {"ours": num_parameters(ours), "transformers": num_parameters(peer)},
        "each": {name: {"tokens_per_second": spread(rates[name]), "peak_memory": memory[name]} for name in names},
        "against_peer": {"peer": best, **speedup(seconds["ours"], seconds[best])},
        "cost_of_guidance": speedup(seconds["ours"], seconds["ours, guided"]),
        "floors": floors(ours, batch, seconds),
    }


def generating(peer: LlamaForCausalLM, batch: int, num_tokens: int, cache: str) -> Callable[[], Tensor]:
    """One call of the peer, after a single first token."""
    begin = torch.zeros(batch, 1, dtype=torch.int64, device=peer.device)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": num_tokens, "cache_implementation": cache}
    return lambda: peer.generate(begin, attention_mask=torch.ones_like(begin), **settings)


def machine_calls(model: AutoregressivePrior) -> dict[str, Callable[[], Tensor]]:
    """What tells the rates of memory and of arithmetic in the model's type."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    factor = torch.randn(PRODUCT, PRODUCT, device=model.device).to(model.head.weight.dtype)
    return {"copy": lambda: target.copy_(source), "product": lambda: factor @ factor}


def floors(model: AutoregressivePrior, batch: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Tokens a second that neither memory nor arithmetic lets anyone exceed, by the fastest copy and product."""
    bandwidth = 2 * COPIED / min(seconds["copy"])  # bytes/s, read and written
    operations = 2 * PRODUCT**3 / min(seconds["product"])  # operations/s
    read = num_parameters(model.transformer) + num_parameters(model.head)
    config = model.config
    cached = config.num_layers * 2 * config.width * (config.num_tokens + 1) / 2  # of one sequence, at the mean step
    step = (read + batch * cached) * model.head.weight.element_size() / bandwidth
    return {
        "memory_tokens_per_second": four(batch / step),
        "arithmetic_tokens_per_second": four(operations / (2 * (read + cached))),
        "bytes_per_second": four(bandwidth),
        "operations_per_second": four(operations),
    }
