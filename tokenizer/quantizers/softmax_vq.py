"""Vector quantization with the gradient of a softmax over the codes in place of a copied one.

Shapes: B batch, D codebook_dim, h w grid sides, K codebook_size, N = B*h*w vectors.
"""

import torch
from einops import rearrange
from torch import Tensor

from .base import QuantizerOutput
from .checks import check_positive
from .soft_assignment import hard_codes
from .vq import LearnedCodebook


class SoftmaxVectorQuantizer(LearnedCodebook):
    """The nearest code, with the gradient of softmax(-|latent - code|^2 / temperature) over all codes.

    Assignment: Agustsson et al. 2017, arXiv:1704.00648, their sigma being 1 / temperature; hard forward and soft
    backward: the straight-through softmax of Jang et al. 2017, arXiv:1611.01144, section 2.2, without noise. With
    logits y: quantized = (stop_grad(hardmax(y) - softmax(y)) + softmax(y)) @ codebook, so that the reconstruction moves
    latents and codes, and there is no `codebook` loss. A temperature far below the squared distance of neighbouring
    codes leaves the latents hardly any gradient.
    """

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int = 1024,  # K, number of codes
        temperature: float = 1.0,  # of the softmax, a squared distance
        commitment_weight: float = 0.25,  # holds latents near their codes, where the softmax has a gradient
        normalize: bool = False,  # latents and codes on the unit sphere: logits are cosines, times 2 / temperature
        placement: float = 0.1,  # share of the run that is done when the codes are placed
        revival_threshold: float = 0.05,  # a code used less than this share of the mean is moved; 0 never moves one
    ):
        check_positive(temperature=temperature)
        options = {"gradient": "straight_through", "normalize": normalize}
        super().__init__(codebook_dim, codebook_size, placement, revival_threshold, commitment_weight, **options)
        self.temperature = temperature

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            latents = self.comparable(latents.float())
            vectors = rearrange(latents, "b d h w -> (b h w) d")
            codebook, temperature = self.codebook, latents.new_tensor(self.temperature)
            # |latent|^2 is left out: it is the same for all codes
            codes, nearest = hard_codes(2 * vectors, codebook, -codebook.square().sum(1), codebook, temperature)
            self.gather(vectors.detach(), nearest)
            indices = nearest.view(latents.shape[0], *latents.shape[2:])
            codes = codes.view(*indices.shape, -1).movedim(-1, 1)  # (B, D, h, w)
            codes = self.once_placed(codes, latents)
            return QuantizerOutput(codes, indices, self.losses(latents, codes))
