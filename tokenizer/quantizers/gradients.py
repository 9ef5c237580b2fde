"""How the gradient of quantized latents reaches the latents: estimators of what argmin does not have.

Each maps latents and their codes (B, D, h, w), float32, to the codes with a gradient. The value is that of the codes to
the bit, since what carries the gradient is added as a difference that is exactly zero. Codes get no gradient.
"""

from torch import Tensor
from torch.nn import functional as F

SMALLEST_NORM = 1e-6  # of latents whose length divides


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The gradient of the codes, copied (van den Oord et al. 2017, arXiv:1711.00937, section 3.2)."""
    return codes.detach() + (latents - latents.detach())


def rotation(latents: Tensor, codes: Tensor) -> Tensor:
    """The gradient turned and scaled as the latents are to become their codes (Fifty et al. 2024, arXiv:2410.06424).

    Section 4.2: codes = lambda R latents with lambda = |codes| / |latents| and R = I - 2 r r^T + 2 c l^T, where l and c
    are latents and codes at unit length and r is l + c at unit length; lambda and R are held constant.
    """
    fixed, codes = latents.detach(), codes.detach()
    before, after = F.normalize(fixed, dim=1), F.normalize(codes, dim=1)
    between = F.normalize(before + after, dim=1)
    scale = codes.norm(dim=1, keepdim=True) / fixed.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    change = latents - fixed  # zero; linear in it, so that its gradient is (lambda R)^T times that of the result
    reflected = change - 2 * between * (between * change).sum(1, keepdim=True)
    turned = reflected + 2 * after * (before * change).sum(1, keepdim=True)
    return codes + scale * turned


GRADIENTS = {"straight_through": straight_through, "rotation": rotation}
