"""diffusers' `VQModel` with random weights, as the reference that ours is compared with."""

import pytest
import torch
from torch import nn

VQModel = pytest.importorskip("diffusers").VQModel


def vq_model(widths: list[int], attention_levels: list[int], **options) -> nn.Module:
    """A VQModel with attention at these levels, 0 being the full resolution."""
    attends = [index in attention_levels for index in range(len(widths))]
    return VQModel(
        block_out_channels=widths,
        down_block_types=["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attends],
        up_block_types=["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in reversed(attends)],
        **options,
    )


def random_vq_model(widths: list[int], attention_levels: list[int], **options) -> nn.Module:
    """The same with weights that are all random: norms and biases too, which start at 1 and 0."""
    torch.manual_seed(0)
    model = vq_model(widths, attention_levels, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.quantize.embedding.weight.normal_()
    return model
