"""Lookup-free quantization: the code of a vector is the signs of its components; the codebook is never stored.

Yu et al. 2023 (MAGVIT-v2), arXiv:2310.05737, section 3.1.
Shapes: B batch, D codebook_dim and number of bits, h w grid sides, N = B*h*w vectors.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .base import MAX_BITS, Quantizer, QuantizerOutput
from .bits import batch_entropy, bits_to_indices, indices_to_bits, sample_entropy
from .checks import check_codebook_dim, check_not_negative
from .gradients import straight_through

MAX_BITS_PER_GROUP = 24  # 2^24 probabilities are 64 MB


class LookupFreeQuantizer(Quantizer):
    """LFQ: codes of -1 and 1 (equation 3); index sum of 2^k [x_k > 0] (equation 4), channel 0 the lowest bit.

    Two entropies in nats make codes distinct and all of them used (equation 5), in training mode alone: the mean
    entropy of a vector's soft code is lowered, that of the mean soft code is raised, with
    q(code | x) proportional to exp(-inverse_temperature * |x - code|^2). The first is exact for any number of bits, the
    second up to bits_per_group of them, and a sum over groups of bits beyond, which is an upper bound, see bits.py.
    The mean is over the batches of all ranks; batches that are accumulated have one each.
    """

    refinement = 2.0

    def __init__(
        self,
        codebook_dim: int,  # D, the number of bits
        entropy_weight: float = 0.1,  # of both entropies
        diversity: float = 1.0,  # gamma, of the batch's entropy against the vectors'
        inverse_temperature: float = 100.0,
        commitment_weight: float = 0.25,
        bits_per_group: int = 18,  # whose entropy in the batch is exact
    ):
        super().__init__()
        check_hyperparameters(
            codebook_dim, entropy_weight, diversity, inverse_temperature, commitment_weight, bits_per_group
        )
        self.vocab_size = 2**codebook_dim
        self.num_bits = codebook_dim
        self.entropy_weight = entropy_weight
        self.diversity = diversity
        self.inverse_temperature = inverse_temperature
        self.commitment_weight = commitment_weight
        self.bits_per_group = bits_per_group
        self.scale = 1.0  # of each component of a code

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.compared(latents.float())
            bits = latents > 0
            codes = self.codes_of(bits)
            losses = {"commitment": self.commitment_weight * F.mse_loss(latents, codes)}
            if self.training:
                losses |= self.entropy_losses(latents)
            quantized = straight_through(latents, codes)
        return QuantizerOutput(quantized, bits_to_indices(bits), losses)

    def compared(self, latents: Tensor) -> Tensor:
        """The latents (B, D, h, w) as they are compared with the codes."""
        return latents

    def codes_of(self, bits: Tensor) -> Tensor:
        """Bits (B, D, h, w) bool to codes (B, D, h, w) float32."""
        return self.scale * (2.0 * bits - 1.0)

    def entropy_losses(self, latents: Tensor) -> dict[str, Tensor]:
        """The two weighted entropies of latents (B, D, h, w) as they are compared with the codes."""
        vectors = rearrange(latents, "b d h w -> (b h w) d")
        # |x + s|^2 - |x - s|^2 = 4 s x in each component of a code of -s and s
        logits = 4 * self.scale * self.inverse_temperature * vectors
        in_batch = batch_entropy(logits, self.bits_per_group)
        return {
            "sample_entropy": self.entropy_weight * sample_entropy(logits),
            "batch_entropy": -self.entropy_weight * self.diversity * in_batch,
        }

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self.codes_of(indices_to_bits(indices, self.num_bits))


def check_hyperparameters(
    codebook_dim: int,
    entropy_weight: float,
    diversity: float,
    inverse_temperature: float,
    commitment_weight: float,
    bits_per_group: int,
) -> None:
    """Raise a ValueError that names the value and the rule."""
    check_codebook_dim(codebook_dim)
    if codebook_dim > MAX_BITS:
        raise ValueError(
            f"codebook_dim={codebook_dim} is the number of bits of an index, an int64, and at most {MAX_BITS}; "
            f"lower codebook_dim"
        )
    check_not_negative(entropy_weight=entropy_weight, diversity=diversity, commitment_weight=commitment_weight)
    if inverse_temperature <= 0:
        raise ValueError(f"inverse_temperature={inverse_temperature} must be above 0: at 0 all codes are alike")
    if not 1 <= bits_per_group <= MAX_BITS_PER_GROUP:
        raise ValueError(
            f"bits_per_group={bits_per_group} must lie in [1, {MAX_BITS_PER_GROUP}]: 2^bits_per_group probabilities "
            f"are held"
        )
