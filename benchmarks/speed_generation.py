"""Generation, tokens/s, beside a Llama of the same width, depth, heads and vocabulary by transformers' `generate`.

Both have random weights of the same type and draw whole grids from the plain distribution. The peer with each cache it
documents for a CPU, its faster one is what ours is held against. Guidance, two passes in one, beside none. Floors: of
memory, weights and cache read once a step at the rate of a large copy; of arithmetic, the products at the rate of a
large one. Weights that the processor's own cache holds may be read faster than the first.
Shapes: B batch, T tokens of a grid.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from floors import DTYPES, dtypes_on, machine_calls, machine_rates
from recording import ROOT, command_line, num_parameters, refusals, tell, version_of
from stopwatch import DeviceRun, each_at_least_one, four, interleaved, peak_memory, record_speed, speedup, spread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from prior import AutoregressivePrior, PriorConfig
from prior.transformer import inner_width
from train.settings import require

CACHES = {"transformers, dynamic cache": "dynamic", "transformers, static cache": "static"}


@dataclass
class GenerationRun(DeviceRun):
    """Settings of benchmarks/speed.py generation."""

    width: int = 256
    num_layers: int = 8
    num_heads: int = 8
    vocab_size: int = 1024
    grid_sides: list[int] = field(default_factory=lambda: [8])  # of square grids: T is the square
    batch_sizes: list[int] = field(default_factory=lambda: [1, 64])  # B
    dtypes: list[str] = field(default_factory=lambda: list(DTYPES))  # those that are worth measuring on the device
    guidance_scale: float = 2.0  # of the guided figure
    seconds: float = 0.0  # that a figure is measured over, at least; one call is

    def __post_init__(self) -> None:
        super().__post_init__()
        each_at_least_one(self, "grid_sides", "batch_sizes")
        known = bool(self.dtypes) and set(self.dtypes) <= set(DTYPES)
        require(known, f"dtypes={self.dtypes}", f"be of {', '.join(DTYPES)}, one or more")
        with refusals():
            for side in self.grid_sides:
                config_of(self, side)


def main(config: GenerationRun, root: Path = ROOT) -> None:
    """Measure every grid, type and batch and write results/speed_generation.json under `root`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    rows = []
    for side in config.grid_sides:
        for dtype in [name for name in config.dtypes if name in dtypes_on(config.device)]:
            models = prior(config, side), llama(config, side)
            ours, peer = (model.eval().to(config.device, DTYPES[dtype]) for model in models)
            for batch in config.batch_sizes:
                tell(f"{batch} grids of {side} x {side} tokens in {dtype}")
                rows.append({"grid_side": side, "dtype": dtype, "batch": batch} | row_of(ours, peer, batch, config))
    command = command_line("speed", "generation", asdict(config), asdict(GenerationRun()), ())
    peer_version = version_of("transformers")
    figures = {"command": command, "settings": asdict(config), "transformers": peer_version, "rows": rows}
    record_speed("generation", figures, root)


def prior(config: GenerationRun, side: int) -> AutoregressivePrior:
    """Ours."""
    return AutoregressivePrior(config_of(config, side))


def config_of(config: GenerationRun, side: int) -> PriorConfig:
    """With one class beside the null class, so that it can be guided; ValueError for sizes that no prior has."""
    sizes = {name: getattr(config, name) for name in ("vocab_size", "width", "num_layers", "num_heads")}
    return PriorConfig(grid_size=[side, side], num_classes=1, **sizes)


def llama(config: GenerationRun, side: int) -> LlamaForCausalLM:
    """The peer with a feed-forward layer as wide as ours; no token ends it early."""
    settings = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=inner_width(config.width),
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
    seconds = interleaved(calls | machine_calls(config.device), config.rounds, config.seconds)
    best, machine = min(CACHES, key=lambda name: median(seconds[name])), machine_rates(seconds)
    rates = {name: [batch * num_tokens / each for each in seconds[name]] for name in names}
    return {
        "parameters": {"ours": num_parameters(ours), "transformers": num_parameters(peer)},
        "each": {name: {"tokens_per_second": spread(rates[name]), "peak_memory": memory[name]} for name in names},
        "against_peer": {"peer": best, **speedup(seconds["ours"], seconds[best])},
        "cost_of_guidance": speedup(seconds["ours"], seconds["ours, guided"]),
        "rates_per_second": machine,
        "floor_tokens_per_second": floors(ours, batch, machine),
    }


def generating(peer: LlamaForCausalLM, batch: int, num_tokens: int, cache: str) -> Callable[[], Tensor]:
    """One call of the peer, after a single first token."""
    begin = torch.zeros(batch, 1, dtype=torch.int64, device=peer.device)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": num_tokens, "cache_implementation": cache}
    return lambda: peer.generate(begin, attention_mask=torch.ones_like(begin), **settings)


def floors(model: AutoregressivePrior, batch: int, machine: dict[str, float]) -> dict[str, float]:
    """Tokens a second that neither memory nor arithmetic lets anyone exceed, by the rates of the machine."""
    read = num_parameters(model.transformer) + num_parameters(model.head)
    config, kind = model.config, model.head.weight
    cached = config.num_layers * 2 * config.width * (config.num_tokens + 1) / 2  # of one sequence, at the mean step
    step = (read + batch * cached) * kind.element_size() / machine["bytes"]
    operations = machine[str(kind.dtype).removeprefix("torch.")]
    return {"memory": four(batch / step), "arithmetic": four(operations / (2 * (read + cached)))}
