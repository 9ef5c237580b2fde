"""Encoding and decoding, images/s, beside diffusers' VQModel of the same architecture with the same weights.

A VQModel with random weights is saved as diffusers saves it and read by `ImageTokenizer.from_diffusers`. From uint8
images to tokens and from tokens to images in [0, 1], in float32 and in bfloat16; the peer also in channels_last, and
its best of all is what ours in bfloat16 is held against. Shapes: B batch, S image side.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from diffusers_peer import DiffusersTokenizer
from recording import ROOT, command_line, num_parameters, record, tell
from stopwatch import SpeedRun, four, interleaved, peak_memory, speedup, spread
from torch import Tensor, nn

from tokenizer import ImageTokenizer

Calls = dict[str, Callable[[], Tensor]]


@dataclass
class CodecRun(SpeedRun):
    """Settings of benchmarks/speed.py codec; the architecture is VQGAN's at factor 8."""

    block_out_channels: list[int] = field(default_factory=lambda: [64, 64, 128, 128])  # a level each, halving the side
    layers_per_block: int = 1
    attention: bool = False  # at the lowest resolution, between the levels
    codebook_size: int = 16384
    codebook_dim: int = 8
    image_sizes: list[int] = field(default_factory=lambda: [128, 256])  # S, pixels
    max_pixels: int = 2**17  # B x S x S, by which the batch is chosen
    seconds: float = 0.0  # that a figure is measured over, at least; one call is


def main(config: CodecRun, root: Path = ROOT) -> None:
    """Measure every size and write results/speed_codec.json under `root`."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory() as folder:
        vq_model(config).save_pretrained(folder)
        ours = ImageTokenizer.from_diffusers(folder, pixel_range=(0, 1)).to(config.device)
        peer = DiffusersTokenizer(folder).to(config.device)
        fast = ImageTokenizer.from_diffusers(folder, pixel_range=(0, 1)).to(config.device, torch.bfloat16)
    rows = []
    for size in config.image_sizes:
        tell(f"pictures of {size} pixels")
        rows.append(row_of(size, ours, fast, peer, config))
    command = command_line("speed", "codec", asdict(config), asdict(CodecRun()), ())
    figures = {"command": command, "settings": asdict(config), "parameters": num_parameters(ours), "rows": rows}
    record("speed_codec", figures, root)


def vq_model(config: CodecRun) -> VQModel:
    """diffusers' VQModel with random weights, and codes as far apart as its latents are."""
    num_levels = len(config.block_out_channels)
    model = VQModel(
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.block_out_channels[-1],
        num_vq_embeddings=config.codebook_size,
        vq_embed_dim=config.codebook_dim,
        mid_block_add_attention=config.attention,
    )
    model.quantize.embedding.weight.data.normal_()
    return model


def row_of(
    size: int, ours: ImageTokenizer, fast: ImageTokenizer, peer: DiffusersTokenizer, config: CodecRun
) -> dict[str, Any]:
    """Everything measured at S = size."""
    batch = max(1, config.max_pixels // size**2)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=config.device)
    tokens = ours.encode(images)
    encoders: Calls = {"ours": lambda: ours.encode(images), "ours, bfloat16": lambda: fast.encode(images)}
    decoders: Calls = {"ours": lambda: ours.decode(tokens), "ours, bfloat16": lambda: fast.decode(tokens)}
    for name, modes in {"diffusers": {}, "diffusers, channels_last": {"channels_last": True},
                        "diffusers, bfloat16": {"channels_last": True, "bfloat16": True}}.items():  # fmt: skip
        encoders[name] = in_modes(lambda: peer.encode(images), peer, **modes)
        decoders[name] = in_modes(lambda: peer.decode(tokens), peer, **modes)
    with torch.no_grad():
        difference = (encoders["diffusers"]() != tokens).float().mean(), decoders["diffusers"]() - decoders["ours"]()
    return {
        "image_size": size,
        "batch": batch,
        "tokens_that_differ": four(difference[0].item()),
        "largest_difference_of_pixels": four(difference[1].abs().max().item()),
        "encode": compared(encoders, batch, config),
        "decode": compared(decoders, batch, config),
    }


def in_modes(
    call: Callable[[], Tensor], model: nn.Module, channels_last: bool = False, bfloat16: bool = False
) -> Callable[[], Tensor]:
    """The call with the model in a memory layout, under autocast where asked for."""

    def called() -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bfloat16):
            model.to(memory_format=layout)
            return call()

    return called


def compared(calls: Calls, batch: int, config: CodecRun) -> dict[str, Any]:
    """Images a second and peak memory of each, ours against the peer in float32, and the fastest of both."""
    memory = {name: peak_memory(call, config.device) for name, call in calls.items()}
    seconds = interleaved(calls, config.rounds, config.seconds)
    figures = {
        name: {"images_per_second": spread([batch / each for each in seconds[name]]), "peak_memory": memory[name]}
        for name in calls
    }
    best = min((name for name in calls if name.startswith("diffusers")), key=lambda name: sum(seconds[name]))
    return {
        "each": figures,
        "float32": speedup(seconds["ours"], seconds["diffusers"]),
        "fastest": {"peer": best, **speedup(seconds["ours, bfloat16"], seconds[best])},
    }
