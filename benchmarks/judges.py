"""Who measures in benchmarks/reconstruction.py, and what is kept of it: little, however many pictures there are.

Of each contender a score per picture and measure; of each network of features the moments of all pictures, for a
Frechet distance, and the features of the first ones, for a kernel distance. Shapes: B pictures, C channels, S side.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

from tokenizer.distances import IMAGES_PER_FEATURE, FeatureMoments, frechet_distance, kernel_distance, mean_estimate
from tokenizer.metrics import MS_SSIM_WEIGHTS, SSIM_WINDOW, ms_ssim, psnr, ssim
from train.features import InceptionFeatures, MobileNetFeatures, PerceptualDistance, weights_hash

NUM_KEPT = 4096  # pictures, the first ones, whose features are kept
DISTANCE_NAMES = {InceptionFeatures.name: "rfid"}  # FID is of no other features

Scores = dict[str, Tensor]  # one value per picture (B,), by the measure's name


class Judges:
    """The measures that the pictures allow and the networks that were asked for, on one device."""

    def __init__(self, perceptual: str | None, inception: bool, mobilenet: str | None, device: torch.device):
        self.device, self.perceptual_name = device, perceptual
        self.perceptual = PerceptualDistance(perceptual).to(device) if perceptual else None
        networks = [InceptionFeatures()] if inception else []
        networks += [MobileNetFeatures(mobilenet)] if mobilenet else []
        self.networks = {network.name: network.to(device) for network in networks}

    @torch.no_grad()
    def scores(self, reconstructions: Tensor, pictures: Tensor) -> Scores:
        """Every measure of each picture, of uint8 reconstructions and pictures (B, C, S, S)."""
        pair = [self.floats(batch) for batch in (reconstructions, pictures)]
        scores = {"psnr": psnr(*pair).clamp(max=highest_psnr(pictures)), "ssim": ssim(*pair)}
        if pictures.shape[-1] >= SSIM_WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1):
            scores["ms_ssim"] = ms_ssim(*pair)
        if self.perceptual is not None:
            scores["lpips"] = self.perceptual(*pair)
        return {measure: values.double().cpu() for measure, values in scores.items()}

    @torch.no_grad()
    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """The features (B, D) of uint8 pictures in each network, on the CPU."""
        return {name: network(self.floats(pictures)).float().cpu() for name, network in self.networks.items()}

    def floats(self, pictures: Tensor) -> Tensor:
        """uint8 to float32 in [0, 1], on the device."""
        return pictures.to(self.device).float() / 255

    def protocol(self) -> dict[str, object]:
        """The networks with the hashes of their weights, and the rules."""
        lpips = {"network": self.perceptual_name, "sha256": weights_hash(self.perceptual)} if self.perceptual else None
        networks = {
            name: {"features": network.num_features, "input": network.preparation, "sha256": weights_hash(network)}
            for name, network in self.networks.items()
        }
        return {
            "lpips": lpips,
            "features": networks,
            "frechet_distance": f"from {IMAGES_PER_FEATURE} pictures a feature on; below, the kernel distance alone",
            "kernel_distance": f"unbiased, cubic kernel, pairs of different pictures among the first {NUM_KEPT:,}",
            "psnr": "of a picture that comes back whole: as if a single value were one level off",
        }


def highest_psnr(pictures: Tensor) -> float:
    """PSNR of a picture of which a single value is one level off: infinity has no mean."""
    return 10 * math.log10(255**2 * pictures[0].numel())


@dataclass
class Tally:
    """What is kept of the batches, each by the number of its first picture."""

    scores: dict[int, Scores] = field(default_factory=dict)
    features: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # of the first NUM_KEPT pictures
    moments: dict[str, FeatureMoments] = field(default_factory=dict)  # by network
    hashes: dict[int, list[bytes]] = field(default_factory=dict)  # of the pictures

    def add(self, first: int, scores: Scores, features: dict[str, Tensor]) -> None:
        """One batch."""
        self.scores[first] = scores
        if first < NUM_KEPT:
            self.features[first] = {name: each[: NUM_KEPT - first] for name, each in features.items()}
        self.add_moments({name: FeatureMoments.of(each) for name, each in features.items()})

    def add_moments(self, moments: dict[str, FeatureMoments]) -> None:
        self.moments |= {
            name: self.moments[name] + new if name in self.moments else new for name, new in moments.items()
        }

    def add_hashes(self, first: int, pictures: Tensor) -> None:
        """Of one batch (B, C, S, S) uint8."""
        self.hashes[first] = [sha256(picture.contiguous().numpy().tobytes()).digest() for picture in pictures]

    @classmethod
    def of_all(cls, parts: Iterable["Tally"]) -> "Tally":
        """What the ranks kept, in the order of the pictures."""
        whole = cls()
        for part in parts:
            whole.add_moments(part.moments)
            for ours, theirs in (
                (whole.scores, part.scores), (whole.features, part.features), (whole.hashes, part.hashes),
            ):  # fmt: skip
                ours |= theirs
        for batches in (whole.scores, whole.features, whole.hashes):
            ordered = sorted(batches.items())
            batches.clear()
            batches |= ordered
        return whole

    def estimates(self, seed: int) -> dict[str, dict[str, float]]:
        """Mean of each measure over the pictures, and the ends of its 95% interval."""
        return {name: asdict(mean_estimate(values, seed)) for name, values in joined(self.scores).items()}

    def distances(self, reference: "Tally", seed: int) -> dict[str, dict[str, float]]:
        """Of each network the kernel distance to the pictures, and the Frechet distance if there are enough."""
        found, kept, references = {}, joined(self.features), joined(reference.features)
        for name, moments in self.moments.items():
            if moments.count >= IMAGES_PER_FEATURE * len(moments.total):
                distance = frechet_distance(moments, reference.moments[name])
                found[DISTANCE_NAMES.get(name, f"frechet_{name}")] = {"mean": distance}
            found[f"kernel_{name}"] = asdict(kernel_distance(kept[name], references[name], seed))
        return found

    @property
    def num_images(self) -> int:
        return sum(map(len, self.hashes.values()))

    def content_hash(self) -> str:
        """sha256 (hex) over the hashes of the pictures, in their order."""
        return sha256(b"".join(each for batch in self.hashes.values() for each in batch)).hexdigest()


def joined(batches: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all batches as one, by name."""
    names = next(iter(batches.values()), {})
    return {name: torch.cat([batch[name] for batch in batches.values()]) for name in names}
