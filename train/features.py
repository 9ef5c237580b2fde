"""Networks that others trained, as judges of pictures: downloaded when first used, never a silent zero."""

import hashlib
import pickle
import warnings

import torch
from torch import Tensor, nn

from .config import UserError

PERCEPTUAL_WEIGHTS = {  # torchvision's names
    "alex": "AlexNet_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
    "vgg": "VGG16_Weights",
}


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924, equation 1, version 0.1), in float32, its network frozen.

    Raises UserError where the weights cannot be had, with the file's name and where to put it.
    """

    def __init__(self, network: str):
        super().__init__()
        try:
            import lpips
            import torchvision
        except ImportError as error:
            raise UserError(f"LPIPS cannot be imported ({error}); pip install 'tokengrid[train]'") from None
        weights = getattr(torchvision.models, PERCEPTUAL_WEIGHTS[network]).IMAGENET1K_V1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips calls torchvision by an old name of a setting
                self.lpips = lpips.LPIPS(net=network, verbose=False)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:  # no connection, or a spoilt file
            raise UserError(
                f"the {network} weights of LPIPS cannot be loaded ({' '.join(str(error).split())[:200]}); "
                f"put {weights.url} into {torch.hub.get_dir()}/checkpoints/ (TORCH_HOME moves that)"
            ) from None
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each image, at least 0: (B, C, H, W) twice, in [0, 1], to (B,); grey counts as equal colours."""
        scaled = [2 * batch.float().expand(-1, 3, -1, -1) - 1 for batch in (images, references)]
        return self.lpips(*scaled).flatten()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: its dropout would make a random judge."""
        return super().train(False)


def weights_hash(network: nn.Module) -> str:
    """sha256 (hex) over the names and values of all that a network has learned."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
