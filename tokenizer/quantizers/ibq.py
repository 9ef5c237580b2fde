"""IBQ, index backpropagation quantization: every code learns from every latent (Shi et al. 2024, arXiv:2412.02692).

Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..ranks import mean_over_ranks
from .base import Quantizer, QuantizerOutput
from .checks import check_codebook, check_not_negative, check_positive
from .soft_assignment import hard_codes, soft_statistics


class IndexBackpropagationQuantizer(Quantizer):
    """The code of the largest scalar product, with the gradient of the softmax over all of them.

    The gradient passes the one-hot index, (stop_grad(hard - soft) + soft) @ codebook, so that no code is left behind
    and none is placed or revived. The double quantization loss is three terms: `commitment` and `codebook` with the
    chosen code, as in VQ-VAE, and `index`, the distance again, with the gradient that passes the index. `entropy` is
    the mean entropy of the softmax, made small, less the entropy of its mean over all ranks' vectors, made large.
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        commitment_weight: float = 0.25,  # of the term that draws latents to their codes; the paper's is 1
        codebook_weight: float = 0.25,  # beta, of the term that draws codes to their latents
        index_weight: float = 0.25,  # of the distance whose gradient passes the index; the paper's is 1
        entropy_weight: float = 0.05,  # of the entropy penalty; 0 does without
        entropy_temperature: float = 0.01,  # of the softmax in it
    ):
        super().__init__()
        check_codebook(codebook_dim, codebook_size)
        check_not_negative(commitment_weight=commitment_weight, codebook_weight=codebook_weight)
        check_not_negative(index_weight=index_weight, entropy_weight=entropy_weight)
        check_positive(entropy_temperature=entropy_temperature)
        self.vocab_size = codebook_size
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.index_weight = index_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codes = nn.Embedding(codebook_size, codebook_dim)

    @property
    def codebook(self) -> Tensor:
        """(K, D) float32."""
        return self.codes.weight.float()

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            vectors, codebook = rearrange(latents.float(), "b d h w -> (b h w) d"), self.codebook
            logits_of = vectors, codebook, codebook.new_zeros(len(codebook))
            codes, indices = hard_codes(*logits_of, codebook, codebook.new_ones(()))
            chosen = F.embedding(indices, codebook)  # the same values; their gradient reaches the chosen code alone
            losses = {
                "commitment": self.commitment_weight * F.mse_loss(vectors, chosen.detach()),
                "codebook": self.codebook_weight * F.mse_loss(chosen, vectors.detach()),
                "index": self.index_weight * F.mse_loss(codes, vectors),
            }
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self.entropy_penalty(*logits_of)
            indices = indices.view(latents.shape[0], *latents.shape[2:])
            return QuantizerOutput(codes.view(*indices.shape, -1).movedim(-1, 1), indices, losses)

    def entropy_penalty(self, vectors: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
        """Nats; smallest, -log K, where each vector is sure of its code and all codes are used alike."""
        temperature = codebook.new_tensor(self.entropy_temperature)
        probabilities, entropy = soft_statistics(vectors, codebook, bias, temperature)
        if self.training:  # in eval mode one rank may be alone in calling
            probabilities = mean_over_ranks(probabilities)
        logarithms = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()  # finite, its slope too
        return entropy + (probabilities * logarithms).sum()

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook).movedim(-1, 1)
