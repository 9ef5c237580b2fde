"""A small classifier, by which generated pictures are judged: minutes of training on two cores.

Shapes: B batch, N images, C channels, S side in pixels.
"""

import torch
from labelled_images import LabelledImages
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_SIZE = 128
LEARNING_RATE = 0.01  # highest, one cycle
WEIGHT_DECAY = 0.01
LARGEST_SHIFT = 2  # pixels, of a training picture in each direction; never mirrored, which would spoil digits
DESCRIPTION = (
    f"three convolutions (4x4 stride 2, 4x4 stride 2, 3x3; 32, 64, 64 channels) with batch normalisation and ReLU, "
    f"mean over 2 x 2 quarters, one linear layer; AdamW, one cycle to {LEARNING_RATE}, batches of {BATCH_SIZE}, "
    f"weight decay {WEIGHT_DECAY}, random shifts of up to {LARGEST_SHIFT} pixels"
)


class Classifier(nn.Sequential):
    """uint8 pictures (B, C, S, S) to logits (B, num_classes)."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__(
            nn.BatchNorm2d(channels),  # whatever range and colours the data has
            *convolution(channels, 32, kernel_size=4, stride=2),
            *convolution(32, 64, kernel_size=4, stride=2),
            *convolution(64, 64, kernel_size=3, stride=1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, num_classes),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.float() / 255)


def convolution(channels_in: int, channels_out: int, kernel_size: int, stride: int) -> list[nn.Module]:
    """A convolution with what follows it; the side stays, or is halved by stride 2."""
    convolve = nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding=1, bias=False)
    return [convolve, nn.BatchNorm2d(channels_out), nn.ReLU()]


def train_classifier(
    images: LabelledImages, num_classes: int, steps: int, seed: int, device: torch.device
) -> Classifier:
    """A classifier after that many batches drawn at random, in eval mode; the seed decides all that is random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = Classifier(images.pixels.shape[1], num_classes).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(steps):
            batch = images[torch.randint(len(images), (BATCH_SIZE,))]
            logits = classifier(shifted(batch.pixels).to(device))
            optimizer.zero_grad()
            F.cross_entropy(logits, batch.labels.to(device)).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def shifted(pixels: Tensor) -> Tensor:
    """Pictures (B, C, S, S), each moved by up to LARGEST_SHIFT pixels a direction, black coming in."""
    size, side = len(pixels), pixels.shape[2]
    padded = F.pad(pixels, [LARGEST_SHIFT] * 4)
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # (B, C, shifts, shifts, S, S), views
    down, right = torch.randint(2 * LARGEST_SHIFT + 1, (2, size))
    return windows[torch.arange(size), :, down, right]


@torch.no_grad()
def predict(classifier: Classifier, pixels: Tensor) -> Tensor:
    """The most likely class (N,) int64 of each picture (N, C, S, S)."""
    device = next(classifier.parameters()).device
    return torch.cat([classifier(part.to(device)).argmax(dim=1).cpu() for part in pixels.split(500)])


def accuracy(classifier: Classifier, images: LabelledImages) -> float:
    """Share in [0, 1] of the pictures that get their own class."""
    return (predict(classifier, images.pixels) == images.labels).double().mean().item()
