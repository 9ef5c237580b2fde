"""Gumbel-softmax quantization, dVAE's: codes are drawn at random in training (Jang et al. 2017, arXiv:1611.01144).

Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..ranks import own_rank_and_number
from .base import Quantizer, QuantizerOutput
from .checks import check_codebook, check_not_negative, check_positive
from .soft_assignment import hard_codes, soft_statistics


class GumbelVectorQuantizer(Quantizer):
    """Latents give the logits of a distribution over the codes; training draws from it, eval takes the likeliest code.

    As in dVAE (Ramesh et al. 2021, arXiv:2102.12092, section 2.1 and appendix A), logits are an affine function of the
    latents, the temperature falls on a cosine from `start_temperature` to `end_temperature`, and `kl` holds the
    distribution near the uniform one: log K - entropy, mean over the vectors. Unlike there the forward pass is hard and
    the softmax in its gradient alone (Jang et al., section 2.2), so that a decoder sees codes and nothing between them.
    Noise comes from torch's global generator, other noise on each rank.
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        start_temperature: float = 1.0,  # of the softmax, at the start of a run
        end_temperature: float = 0.0625,  # at its end; dVAE's 1/16
        kl_weight: float = 5e-4,  # of the divergence from the uniform prior, nats per vector; VQGAN's
    ):
        super().__init__()
        check_codebook(codebook_dim, codebook_size)
        check_positive(start_temperature=start_temperature, end_temperature=end_temperature)
        check_not_negative(kl_weight=kl_weight)
        self.vocab_size = codebook_size
        self.start_temperature = start_temperature
        self.end_temperature = end_temperature
        self.kl_weight = kl_weight
        self.codes = nn.Embedding(codebook_size, codebook_dim)
        self.keys = nn.Embedding(codebook_size, codebook_dim)  # the affine function: its rows, one for each code,
        self.bias = nn.Parameter(torch.zeros(codebook_size))  # and its constant
        self.register_buffer("temperature", torch.tensor(start_temperature))

    @property
    def codebook(self) -> Tensor:
        """(K, D) float32."""
        return self.codes.weight.float()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            vectors = rearrange(latents.float(), "b d h w -> (b h w) d")
            logits_of = vectors, self.keys.weight.float(), self.bias.float()
            temperature = self.temperature.float()
            codes, indices = hard_codes(*logits_of, self.codebook, temperature, self.noise_seed())
            _, entropy = soft_statistics(*logits_of, torch.ones_like(temperature))
            losses = {"kl": self.kl_weight * (math.log(self.vocab_size) - entropy)}
            indices = indices.view(latents.shape[0], *latents.shape[2:])
            return QuantizerOutput(codes.view(*indices.shape, -1).movedim(-1, 1), indices, losses)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def noise_seed(self) -> int | None:
        """A draw from the global generator, which is alike on all ranks, made different on each; None in eval mode."""
        return int(torch.randint(2**62, ())) + own_rank_and_number()[0] if self.training else None

    def step(self, progress: float = 1.0) -> bool:
        """Set the temperature."""
        if self.training:
            share = (1 + math.cos(math.pi * progress)) / 2  # of the start's that is left
            self.temperature.fill_(self.end_temperature + share * (self.start_temperature - self.end_temperature))
        return False
