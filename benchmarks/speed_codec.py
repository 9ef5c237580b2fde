"""Encoding and decoding, images/s, beside diffusers' VQModel of the same architecture with the same weights.

A VQModel with random weights is saved as diffusers saves it and read by `ImageTokenizer.from_diffusers`. From uint8
images to tokens and from tokens to images in [0, 1], in float32, in the fast mode and in bfloat16 throughout. The peer
is measured as its documentation shows it, in channels_last, with bfloat16 besides and compiled besides: its best of all
is what the two faster modes are held against. On a CPU without instructions for bfloat16 all that is in it is left out.
Floors of arithmetic and memory stand beside each, by rates of the same rounds. Shapes: B batch, S image side.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import VQModel
from diffusers_peer import DiffusersTokenizer
from floors import dtypes_on, floors, machine_calls, machine_rates, work_of
from recording import ROOT, command_line, num_parameters, tell
from stopwatch import DeviceRun, four, interleaved, peak_memory, record_speed, speedup, spread
from torch import Tensor, nn

from tokenizer import ImageTokenizer
from tokenizer.winograd import WinogradConv2d
from train.cpu import keep_freed_memory
from train.settings import at_least_one, require

Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Architecture:
    """VQGAN's, and the pictures that it is measured on."""

    image_size: int  # S, pixels
    widths: tuple[int, ...]  # a level each, halving the side
    layers_per_block: int
    attention_at_last: bool  # in the blocks of the lowest resolution; between them it is always
    latent_channels: int
    codebook_dim: int
    codebook_size: int = 16384

    def vq_model(self) -> VQModel:
        """diffusers' VQModel with random weights, and codes as far apart as its latents are."""
        num_plain = len(self.widths) - self.attention_at_last
        kinds = [""] * num_plain + ["Attn"] * self.attention_at_last
        model = VQModel(
            block_out_channels=self.widths,
            down_block_types=tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            num_vq_embeddings=self.codebook_size,
            vq_embed_dim=self.codebook_dim,
        )
        model.quantize.embedding.weight.data.normal_()
        return model


ARCHITECTURES = {
    "11M": Architecture(128, (64, 64, 128, 256), 1, False, latent_channels=64, codebook_dim=8),
    "76M": Architecture(256, (128, 128, 256, 256, 512), 2, True, latent_channels=256, codebook_dim=256),  # taming's f16
}


@dataclass
class CodecRun(DeviceRun):
    """Settings of benchmarks/speed.py codec."""

    models: list[str] = field(default_factory=lambda: list(ARCHITECTURES))
    max_pixels: int = 2**16  # B x S x S, by which the batch is chosen
    compiled: bool = True  # whether the peer is measured compiled too
    seconds: float = 0.0  # that a figure is measured over, at least; one call is
    keep_memory: bool = False  # what is freed stays with the process, ours and the peer's: a record of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "max_pixels")
        require(bool(self.models), "models=[]", "name at least one")
        for name in self.models:
            require(name in ARCHITECTURES, f"models={name}", f"be one of {', '.join(ARCHITECTURES)}")


def main(config: CodecRun, root: Path = ROOT) -> None:
    """Measure every model and write results/speed_codec.json, or speed_codec_kept_memory.json, under `root`."""
    if config.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(config.threads)
    rows = []
    for name in config.models:
        tell(name)
        torch.manual_seed(config.seed)
        rows.append({"model": name, **row_of(ARCHITECTURES[name], config)})
    command = command_line("speed", "codec", asdict(config), asdict(CodecRun()), ())
    part = "codec_kept_memory" if config.keep_memory else "codec"
    record_speed(part, {"command": command, "settings": asdict(config), "rows": rows}, root)


def row_of(architecture: Architecture, config: CodecRun) -> dict[str, Any]:
    """Everything measured of one model."""
    size = architecture.image_size
    batch = max(1, config.max_pixels // size**2)
    in_bfloat16 = "bfloat16" in dtypes_on(config.device)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=config.device)
    with tempfile.TemporaryDirectory() as folder:
        architecture.vq_model().save_pretrained(folder)
        ours, fast, bfloat16 = (
            ImageTokenizer.from_diffusers(folder, pixel_range=(0, 1)).to(config.device) for _ in range(3)
        )
        modes = {"ours": ours, "ours, fast": fast.fast()}
        if in_bfloat16:
            modes["ours, bfloat16"] = bfloat16.bfloat16()
        plain, laid_out = (
            DiffusersTokenizer(folder).to(config.device, memory_format=layout)
            for layout in (torch.contiguous_format, torch.channels_last)
        )
    tokens = ours.encode(images)
    parts: dict[str, Calls] = {}
    for part, given in {"encode": images, "decode": tokens}.items():
        calls: Calls = {name: partial(getattr(mode, part), given) for name, mode in modes.items()}
        parts[part], best = calls, getattr(laid_out, part)
        calls["diffusers"] = called(getattr(plain, part), given)
        calls["diffusers, channels_last"] = called(best, given)
        if in_bfloat16:
            calls["diffusers, bfloat16"] = called(best, given, in_bfloat16)
        if config.compiled:
            name = "diffusers, bfloat16, compiled" if in_bfloat16 else "diffusers, compiled"
            calls[name] = called(torch.compile(best), given, in_bfloat16)
    with torch.no_grad():
        differing = (plain.encode(images) != tokens).float().mean(), plain.decode(tokens) - ours.decode(tokens)
    return {
        "image_size": size,
        "batch": batch,
        "parameters": num_parameters(ours),
        "second_kernels_mib": four(second_kernels(ours) / 2**20),
        "tokens_that_differ": four(differing[0].item()),
        "largest_difference_of_pixels": four(differing[1].abs().max().item()),
        **{part: compared(calls, batch, config) for part, calls in parts.items()},
    }


def second_kernels(model: nn.Module) -> int:
    """Bytes of what its convolutions hold beside their weights, by the pictures that they have met."""
    packed = [layer.packed for layer in model.modules() if isinstance(layer, WinogradConv2d)]
    return sum(held[0].nbytes for held in packed if held is not None)


def called(call: Callable[[Tensor], Tensor], given: Tensor, in_bfloat16: bool = False) -> Callable[[], Tensor]:
    """The call, under autocast or not."""

    def bound() -> Tensor:
        with torch.autocast(given.device.type, torch.bfloat16, enabled=in_bfloat16):
            return call(given)

    return bound


def compared(calls: Calls, batch: int, config: CodecRun) -> dict[str, Any]:
    """Images a second, peak memory and floors of each, and ours against the peer's ways."""
    memory = {name: peak_memory(call, config.device) for name, call in calls.items()}
    seconds = interleaved(calls | machine_calls(config.device), config.rounds, config.seconds)
    rates = machine_rates(seconds)
    figures = {
        name: {"images_per_second": spread([batch / each for each in seconds[name]]), "peak_memory": memory[name]}
        for name in calls
    }
    for name in (name for name in calls if name.startswith("ours") or name == "diffusers"):
        work = work_of(calls[name])
        figures[name] |= {
            "operations_per_image": work.operations.total() // batch,
            "floor_images_per_second": floors(work, rates, batch),
        }
    best = min((name for name in calls if name.startswith("diffusers")), key=lambda name: median(seconds[name]))
    fast, bfloat16 = seconds["ours, fast"], seconds.get("ours, bfloat16")
    return {
        "each": figures,
        "float32": speedup(seconds["ours"], seconds["diffusers"]),
        "fastest": {"peer": best, **speedup(fast, seconds[best])},
        "bfloat16": {"peer": best, **speedup(bfloat16, seconds[best])} if bfloat16 else None,
        "documented": speedup(fast, seconds["diffusers"]),  # the peer as its documentation shows it
        "rates_per_second": rates,
    }
