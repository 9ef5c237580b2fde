"""Networks that others trained, as judges of pictures: downloaded when first used, never a silent zero.

Shapes: B batch, C channels (1 or 3), H W sides.
"""

import hashlib
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UserError

PERCEPTUAL_WEIGHTS = {  # torchvision's names
    "alex": "AlexNet_Weights",
    "squeeze": "SqueezeNet1_1_Weights",
    "vgg": "VGG16_Weights",
}
INCEPTION_HASH = "6726825d"  # first digits of the sha256 of its file, which bears them in its name
MOBILENET_SIDE = 224  # pixels


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
        place = f"put {weights.url} into {checkpoints()}/ (TORCH_HOME moves that)"
        with loading(f"the {network} weights of LPIPS", place), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by an old name of a setting
            self.lpips = lpips.LPIPS(net=network, verbose=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each image, at least 0: (B, C, H, W) twice, in [0, 1], to (B,); grey counts as equal colours."""
        scaled = [2 * batch.float().expand(-1, 3, -1, -1) - 1 for batch in (images, references)]
        return self.lpips(*scaled).flatten()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode: its dropout would make a random judge."""
        return super().train(False)


class InceptionFeatures(nn.Module):
    """The features of FID (Heusel et al. 2017, arXiv:1706.08500): pool3 of the Inception-v3 of 2015-12-05, in float32.

    torch-fidelity has TensorFlow's network and its way to resize. Raises UserError where it or the weights cannot be
    had, or the file is not the one that all published FIDs are measured with.
    """

    name, num_features = "inception_v3", 2048
    preparation = "to 299 pixels as TensorFlow 1 resizes, bilinear without antialiasing"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        except ImportError as error:
            raise UserError(f"rFID needs torch-fidelity ({error}); pip install 'tokengrid[bench]'") from None
        path = checkpoints() / URL_INCEPTION_V3.rpartition("/")[2]
        place = f"put {URL_INCEPTION_V3} into {checkpoints()}/ (TORCH_HOME moves that); inception=false does without"
        with loading("the Inception weights of rFID", place):
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_HASH)
            if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(INCEPTION_HASH):
                raise OSError(f"another file, or damaged: its sha256 does not begin with {INCEPTION_HASH}: {path}")
            self.network = FeatureExtractorInceptionV3(self.name, [str(self.num_features)], str(path))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], rounded to 8 bits, to (B, 2048); grey counts as equal colours."""
        return self.network((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0]


class MobileNetFeatures(nn.Module):
    """The 1,280 pooled features of a MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381) that no loss has seen.

    `path` holds the state of torchvision's `mobilenet_v2` with the weights of TensorFlow 2, 1,001 outputs. Raises
    UserError where they cannot be read from there.
    """

    name, num_features = "mobilenet_v2", 1280
    preparation = f"to {MOBILENET_SIDE} pixels, bilinear with antialiasing"

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            from torchvision.models import mobilenet_v2
        except ImportError as error:
            raise UserError(f"torchvision cannot be imported ({error}); pip install 'tokengrid[train]'") from None
        self.network = mobilenet_v2(weights=None, num_classes=1001)
        place = "it must hold the weights of TensorFlow 2 (1.0, 224, 1,001 outputs) by torchvision's names"
        with loading(f"mobilenet={path}", place):
            self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):  # TensorFlow pads right and bottom only
                module.padding = (0, 0)
                module.register_forward_pre_hook(lambda _, inputs: (F.pad(inputs[0], (0, 1, 0, 1)),))
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 1280); grey counts as equal colours."""
        size = (MOBILENET_SIDE, MOBILENET_SIDE)
        images = F.interpolate(images.float().expand(-1, 3, -1, -1), size, mode="bilinear", antialias=True)
        return self.network.features(2 * images - 1).mean(dim=(2, 3))


def checkpoints() -> Path:
    """The folder in which torch keeps downloaded weights."""
    return Path(torch.hub.get_dir(), "checkpoints")


@contextmanager
def loading(what: str, way_out: str) -> Iterator[None]:
    """A UserError in place of what loading weights raises: there is no connection, no such file, or a spoilt one."""
    try:
        yield
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise UserError(f"{what} cannot be loaded ({' '.join(str(error).split())[:200]}); {way_out}") from None


def weights_hash(network: nn.Module) -> str:
    """sha256 (hex) over the names and values of all that a network has learned."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
