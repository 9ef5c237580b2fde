"""A discriminator that judges each patch of a picture by itself (PatchGAN).

Source: Isola et al. 2017, arXiv:1611.07004, section 6.1.2; pix2pix's weights N(0, 0.02).
Shapes: B batch, C image channels, H W sides, h w places where a patch is judged.
"""

import itertools

from torch import Tensor, nn

from tokenizer.autoencoder import group_norm

GROUP_CHANNELS = 16  # of a group norm; a group of one channel would say nothing on a map of one pixel
WIDEST = 8  # times base_channels


class PatchDiscriminator(nn.Module):
    """4x4 convolutions, `num_layers` of stride 2 and two of stride 1; 3 of them judge patches of 70 x 70 pixels.

    Departure: group norm in place of batch norm. It sees one picture at a time, so that the logits of a picture are the
    same whatever stands beside it: real and false ones can share a batch, and ranks and accumulated batches equal one
    batch. (Spectral norm would count forward passes, and so depend on how a batch is cut.)
    """

    def __init__(self, image_channels: int, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [base_channels * min(2**index, WIDEST) for index in range(num_layers + 1)]
        layers = [nn.Conv2d(image_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if index < num_layers else 1
            layers.append(nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=False))  # the norm has a shift
            layers += [group_norm(wide, max(1, wide // GROUP_CHANNELS)), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) on the [0, 1] scale to logits (B, 1, h, w), high where a patch seems real."""
        return self.layers(2 * images - 1)
