"""Encoder and decoder: pixels in the config's `pixel_range` <-> latents, the convolutional network of VQGAN.

Source: Esser et al. 2021, arXiv:2012.09841 (taming-transformers). The arithmetic is that of taming's VQGAN and of
diffusers' `VQModel` (norm_type "group"), so that their weights fit: group norm with eps 1e-6, SiLU, stride-2
convolutions padded at the right and the bottom only, nearest-neighbour upsampling, one more residual block per level
in the decoder. Departure: narrow layers use fewer norm groups where `norm_groups` does not divide their channels.

Shapes: B batch, C image channels, H W image sides, D codebook_dim, h w grid sides (H / downsample_factor, ...).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from .attention import attend
from .normalisation import activated, group_norm
from .pointwise import PointwiseConv2d
from .processor import is_hooked
from .winograd import Sides, WinogradConv2d

POSITIONS_AT_ONCE = 2**12  # that enter a resolution of a decoder: from 2**11 to 2**14 four networks were as fast


class ClassShift(nn.Module):
    """Adds to every channel a number that the class of the image decides.

    That is what one-hot planes of the class beside a convolution's input come to, but for its padded border: so the
    class is a known input of encoder and decoder (Sohn et al. 2015, "Learning structured output representation using
    deep conditional generative models").
    """

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.table = nn.Embedding(num_classes, channels)
        nn.init.zeros_(self.table.weight)  # it starts as the network without classes

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return features + self.table(labels).to(features.dtype)[:, :, None, None]


class Encoder(nn.Sequential):
    """Layers one after another, those that shift by the class told the labels (B,)."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        return onwards(list(self), features, labels)


class Decoder(nn.Sequential):
    """Layers one after another, those that shift by the class told the labels (B,).

    In eval mode on a CPU the batch is split at the beginning and before each upsampling, into parts of about
    POSITIONS_AT_ONCE positions: of fewer, oneDNN takes longer for each, and more leave the cache between two layers.
    What is compiled, exported or traced stays whole, so that it fits any batch.
    """

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        whole = self.training or torch.compiler.is_compiling() or torch.jit.is_tracing()
        return onwards(list(self), features, labels, in_parts=not whole and features.device.type == "cpu")


def onwards(
    layers: Sequence[nn.Module], features: Tensor, labels: Tensor | None = None, in_parts: bool = False
) -> Tensor:
    """What the layers make of features, the batch `in_parts`, as `Decoder` says, or whole."""
    for index, layer in enumerate(layers):
        if in_parts and (index == 0 or isinstance(layer, Upsample)):
            at_once = max(1, POSITIONS_AT_ONCE // max(1, features.shape[2:].numel()))
            if len(features) > at_once:
                told = repeat(None) if labels is None else labels.split(at_once)
                parts = zip(features.split(at_once), told, strict=False)  # None has no end
                return torch.cat([onwards(layers[index:], *part, in_parts=True) for part in parts])
        features = layer(features, labels) if isinstance(layer, ClassShift) else layer(features)
    return features


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, added to the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = WinogradConv2d(in_channels, out_channels)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = WinogradConv2d(out_channels, out_channels)
        self.shortcut = PointwiseConv2d(in_channels, out_channels) if in_channels != out_channels else nn.Identity()
        # Each block starts as its shortcut (as in Goyal et al. 2017, arXiv:1706.02677, section 5.1), which lets a
        # network without norms train; the default run gains about 1 dB.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, features: Tensor) -> Tensor:
        hidden = activated(self.norm1, features)
        if not torch.is_autocast_enabled(features.device.type):  # which chooses the type by itself
            hidden = hidden.to(self.conv1.weight.dtype)
        hidden = activated(self.norm2, self.conv1(hidden), spare=not is_hooked(self.conv1))
        return self.conv2(self.dropout(hidden), self.shortcut(features).to(features.dtype))

    def branch_to(self, dtype: torch.dtype) -> None:
        """Compute in this type from the first convolution to the second; what is added to remains as it comes."""
        for layer in (self.conv1, self.norm2, self.conv2):
            layer.to(dtype)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.query = PointwiseConv2d(channels, channels)
        self.key = PointwiseConv2d(channels, channels)
        self.value = PointwiseConv2d(channels, channels)
        self.project = PointwiseConv2d(channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2)  # (B, h*w, channels)
            for layer in (self.query, self.key, self.value)
        )
        attended = attend(query, key, value)
        return features + self.project(attended.transpose(1, 2).reshape(features.shape))


class Downsample(nn.Module):
    """Halves even sides: a stride-2 convolution, padded by one pixel at the right and the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = WinogradConv2d(channels, channels, Sides.HALVED)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(features)


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = WinogradConv2d(channels, channels, Sides.DOUBLED)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv(features)


def level(
    in_channels: int, out_channels: int, count: int, attention: bool, norm_groups: int, dropout: float
) -> nn.Sequential:
    """`count` residual blocks at one resolution, each followed by attention where the level has it."""
    blocks: list[nn.Module] = []
    for channels in [in_channels] + [out_channels] * (count - 1):
        blocks.append(ResidualBlock(channels, out_channels, norm_groups, dropout))
        if attention:
            blocks.append(AttentionBlock(out_channels, norm_groups))
    return nn.Sequential(*blocks)


def middle(channels: int, attention: bool, norm_groups: int, dropout: float) -> nn.Sequential:
    """The blocks at the lowest resolution: residual, attention if asked for, residual."""
    first, last = (ResidualBlock(channels, channels, norm_groups, dropout) for _ in range(2))
    return nn.Sequential(first, *([AttentionBlock(channels, norm_groups)] if attention else []), last)


class OutputHead(nn.Sequential):
    """Norm, SiLU, 3x3 convolution: the end of the encoder and of the decoder."""

    def __init__(self, channels: int, out_channels: int, norm_groups: int):
        convolution = WinogradConv2d(channels, out_channels)
        super().__init__(group_norm(channels, norm_groups), nn.SiLU(), convolution)

    def forward(self, features: Tensor) -> Tensor:
        return self[2](activated(self[0], features))


class ConvolutionalAutoencoder(nn.Module):
    """`encoder` (B, C, H, W) -> (B, num_moments * D, h, w) and `decoder` (B, D, h, w) -> (B, C, H, W).

    With `patch_size=1, base_channels=128, channel_multipliers=[1, 1, 2, 2, 4], num_res_blocks=2, attention_levels=[4],
    middle_attention=True, latent_channels=256, norm_groups=32` this is taming's f16 VQGAN (its `attn_resolutions=[16]`
    at 256 pixels is level 4). The defaults are for a laptop: all the work at a quarter of the resolution, no norms.
    With classes both take the labels (B,), int64 in [0, num_classes), as a second argument.
    """

    def __init__(
        self,
        image_channels: int,
        codebook_dim: int,
        patch_size: int = 4,  # pixels of a side folded into channels before the first convolution; 1 in VQGAN
        base_channels: int = 64,  # width of the first level
        channel_multipliers: Sequence[int] = (1,),  # one per level; each later level halves the side
        num_res_blocks: int = 1,  # per level in the encoder; the decoder has one more
        attention_levels: Sequence[int] = (),  # levels whose blocks attend; 0 is the full resolution
        middle_attention: bool = False,  # between the two blocks at the lowest resolution
        latent_channels: int = 64,  # between the 3x3 convolutions and the 1x1 projections to and from codebook_dim
        norm_groups: int = 0,  # 32 in VQGAN; 0 builds no normalisation
        dropout: float = 0.0,  # in the residual blocks
        *,
        num_moments: int = 1,  # numbers that the encoder gives for each component of a latent; no setting of a config
        num_classes: int = 0,  # that encoder and decoder are told; the config of the model has it
    ):
        super().__init__()
        check_counts(
            codebook_dim=codebook_dim,
            patch_size=patch_size,
            base_channels=base_channels,
            num_res_blocks=num_res_blocks,
            latent_channels=latent_channels,
        )
        check_layout(channel_multipliers, attention_levels, norm_groups, dropout)
        self.downsample_factor = patch_size * 2 ** (len(channel_multipliers) - 1)
        patch_channels = image_channels * patch_size**2
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        options = {"norm_groups": norm_groups, "dropout": dropout}

        encoder: dict[str, nn.Module] = {"patchify": nn.PixelUnshuffle(patch_size)}
        encoder["conv_in"] = WinogradConv2d(patch_channels, base_channels)
        if num_classes:
            encoder["classes"] = ClassShift(num_classes, base_channels)
        channels = base_channels
        for index, width in enumerate(widths):
            if index > 0:
                encoder[f"downsample_{index}"] = Downsample(channels)
            encoder[f"level_{index}"] = level(channels, width, num_res_blocks, index in attention_levels, **options)
            channels = width
        encoder["middle"] = middle(channels, middle_attention, **options)
        encoder["head"] = OutputHead(channels, latent_channels, norm_groups)
        encoder["to_codes"] = PointwiseConv2d(latent_channels, num_moments * codebook_dim)
        self.encoder = Encoder(OrderedDict(encoder))

        decoder: dict[str, nn.Module] = {"from_codes": PointwiseConv2d(codebook_dim, latent_channels)}
        decoder["conv_in"] = WinogradConv2d(latent_channels, channels)
        if num_classes:
            decoder["classes"] = ClassShift(num_classes, channels)
        decoder["middle"] = middle(channels, middle_attention, **options)
        for index, width in reversed(list(enumerate(widths))):
            count = num_res_blocks + 1
            decoder[f"level_{index}"] = level(channels, width, count, index in attention_levels, **options)
            channels = width
            if index > 0:
                decoder[f"upsample_{index}"] = Upsample(channels)
        decoder["head"] = OutputHead(channels, patch_channels, norm_groups)
        decoder["unpatchify"] = nn.PixelShuffle(patch_size)
        self.decoder = Decoder(OrderedDict(decoder))

    def fast(self, dtype: torch.dtype) -> None:
        """Compute in this type: the decoder as a whole, of the encoder the branches of its residual blocks.

        What the encoder's branches are added to stays as it is, and the layers at its ends and between its levels do:
        rounding there moves most of the tokens that bfloat16 moves. From the decoder no token follows.
        """
        for layer in self.encoder.modules():
            if isinstance(layer, ResidualBlock):
                layer.branch_to(dtype)
        self.decoder.to(dtype)


def check_counts(**counts: int) -> None:
    """Raise a ValueError that names the value and the rule."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def check_layout(
    channel_multipliers: Sequence[int], attention_levels: Sequence[int], norm_groups: int, dropout: float
) -> None:
    """Raise a ValueError that names the value, the rule and the way out."""
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise ValueError(f"channel_multipliers={list(channel_multipliers)} must hold one number >= 1 per level")
    if any(not 0 <= index < len(channel_multipliers) for index in attention_levels):
        raise ValueError(
            f"attention_levels={list(attention_levels)} must lie in 0..{len(channel_multipliers) - 1}, "
            f"one index per entry of channel_multipliers"
        )
    if norm_groups < 0:
        raise ValueError(f"norm_groups={norm_groups} must be at least 1, or 0 for no normalisation")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")


AUTOENCODERS = {"convolutional": ConvolutionalAutoencoder}
