"""Residual quantization: each stage quantizes what the stages before it have left.

Lee et al. 2022, arXiv:2203.01941 (RQ-VAE), section 3.1; quantizer dropout: Zeghidour et al. 2021, arXiv:2107.03312
(SoundStream), section III-C.
Shapes: B batch, D codebook_dim, h w grid sides, q depth.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .base import Quantizer, QuantizerOutput
from .checks import check_codebook_dim
from .parts import DEFAULT_PART, SuccessiveQuantizer, build_part, evaluated, place_shared

MAX_DEPTH = 16


class ResidualQuantizer(SuccessiveQuantizer):
    """Codes that are sums of `depth` codes, coarse to fine; the first k indices of a place decode by themselves.

    The losses are summed over the stages, as in the paper. Each stage passes an equal share of the gradient, so that
    straight-through stages pass it once. Quantizer dropout draws for each picture, as in SoundStream, how many stages
    its codes are summed over; all stages see all pictures, in search, statistics and losses, so that ranks stay alike.

    Codes that never move would leave nothing to the stages after the first, so they are made `refinement` times finer
    from stage to stage: each stage quantizes its residual times refinement^stage. Its losses are weighted by
    refinement^(-2 stage), which makes of squared errors those of the residuals.

    A stage is placed on the residuals that the placed stages before it leave of the latents of the same batch. With a
    shared codebook, statistics, losses and candidates for its codes are taken from the inputs of all stages at once.
    """

    coarse_to_fine = True

    def __init__(
        self,
        codebook_dim: int,
        each: dict[str, Any] = DEFAULT_PART,  # the quantizer of a stage and its hyperparameters
        depth: int = 4,  # q, stages
        shared: bool = False,  # one codebook for all stages, as in RQ-VAE; else each has its own, as in SoundStream
        quantizer_dropout: float = 0.0,  # share of the pictures of a training batch that keep only the first stages
        refinement: float | None = None,  # times that a stage's codes are finer than those before; null: by the part
    ):
        super().__init__()
        check_codebook_dim(codebook_dim)
        if not 2 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth={depth} must lie in 2..{MAX_DEPTH}; one stage is its part by itself")
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout={quantizer_dropout} must lie in [0, 1]: it is a share of the pictures")
        if refinement is not None and refinement < 1:
            raise ValueError(f"refinement={refinement} must be at least 1, or null for what suits the part")
        parts = [build_part(each, codebook_dim, "residual") for _ in range(1 if shared else depth)]
        self.parts = torch.nn.ModuleList(parts)
        self.vocab_size = parts[0].vocab_size
        self.num_codebooks = depth
        self.quantizer_dropout = quantizer_dropout
        self.refinement = parts[0].refinement if refinement is None else refinement
        self.scales = [self.refinement**-stage for stage in range(depth)]  # of the codes of each stage

    @property
    def stages(self) -> list[Quantizer]:
        """The part of each stage, the same one again and again where it is shared."""
        return [self.parts[stage % len(self.parts)] for stage in range(self.num_codebooks)]

    @property
    def shared(self) -> bool:
        return len(self.parts) < self.num_codebooks

    def code_numbers(self, indices: Tensor, grid_size: tuple[int, int]) -> Tensor:
        stages = torch.arange(self.num_codebooks, device=indices.device)
        return indices + self.vocab_size * (stages % len(self.parts))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            self.remember(latents)
            together = self.training and self.shared and self.placed and self.refinement == 1
            outputs = self.at_once(latents) if together else self.in_turn(latents)
            kept = self.stages_kept(latents)
            quantized = sum(
                torch.where(stage < kept, share(output.quantized, kept), 0.0) for stage, output in enumerate(outputs)
            )
        indices = torch.stack([output.indices for output in outputs], dim=-1)
        losses = {name: sum(output.losses[name] for output in outputs) for name in outputs[0].losses}
        return QuantizerOutput(quantized, indices, losses)

    def in_turn(self, latents: Tensor) -> list[QuantizerOutput]:
        """The output of each stage, the codes of those before taken off its input as constants."""
        outputs, residual = [], latents
        for stage, scale in zip(self.stages, self.scales, strict=True):
            found = stage(residual / scale)
            losses = {name: scale**2 * loss for name, loss in found.losses.items()}
            outputs.append(QuantizerOutput(scale * found.quantized, found.indices, losses))
            residual = residual - outputs[-1].quantized.detach()
        return outputs

    def at_once(self, latents: Tensor) -> list[QuantizerOutput]:
        """The same of a shared part in a single call, so that it gathers from the inputs of all stages."""
        output = self.parts[0](self.stage_inputs(latents, self.parts[0]))
        quantized, indices = output.quantized.chunk(self.num_codebooks, 2), output.indices.chunk(self.num_codebooks, 1)
        return [QuantizerOutput(*each, output.losses) for each in zip(quantized, indices, strict=True)]

    def stage_inputs(self, latents: Tensor, part: Quantizer) -> Tensor:
        """What all stages give to a shared part in eval mode, below one another (B, D, q * h, w)."""
        inputs, residual = [latents], latents
        for before, scale in pairwise(self.scales):
            residual = residual - before * evaluated(part, inputs[-1]).quantized
            inputs.append(residual / scale)
        return torch.cat(inputs, dim=2)

    def stages_kept(self, latents: Tensor) -> Tensor:
        """Of how many stages the codes of each picture are the sum, (B, 1, 1, 1)."""
        shape, device = (len(latents), 1, 1, 1), latents.device
        kept = torch.full(shape, self.num_codebooks, device=device)
        if not self.training or not self.quantizer_dropout:
            return kept
        drawn = torch.randint(1, self.num_codebooks + 1, shape, device=device)
        return torch.where(torch.rand(shape, device=device) < self.quantizer_dropout, drawn, kept)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w, k) of the first k stages to codes (B, D, h, w) float32."""
        stages = zip(self.stages, self.scales, indices.unbind(-1), strict=False)
        return sum(scale * stage.indices_to_codes(each) for stage, scale, each in stages)

    @torch.no_grad()
    def place(self, latents: Tensor, progress: float) -> bool:
        """Place stage after stage: before the first is placed, the others see nothing but zeros."""
        if self.shared:
            return place_shared(self.parts[0], latents, lambda part: self.stage_inputs(latents, part), progress)
        self.discard()
        for part, scale in zip(self.parts, self.scales, strict=True):
            part(latents / scale)
            part.step(progress)
            if not part.placed:  # it is too early
                return False
            latents = latents - scale * evaluated(part, latents / scale).quantized
        return True


def share(quantized: Tensor, count: Tensor) -> Tensor:
    """The same values to the bit, with the gradient divided by the count."""
    return quantized.detach() + (quantized - quantized.detach()) / count
