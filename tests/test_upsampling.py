"""Upsampling in one convolution beside nearest-neighbour and a convolution of nine products, in floats and 8 bits."""

import copy

import pytest
import torch
from eight_bits import in_8_bits, in_8_bits_from_bfloat16
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.upsampling import Int8UpsampledConv2d, UpsampledConv2d

pytestmark = pytest.mark.usefixtures("however_little")

sides = st.integers(1, 6)


def upsampled_of(channels: int) -> UpsampledConv2d:
    return UpsampledConv2d(nn.Conv2d(channels, channels, 3, padding=1))


def plainly(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """The reference."""
    grown = F.interpolate(features, scale_factor=2.0, mode="nearest")
    return F.conv2d(grown, convolution.weight, convolution.bias, padding=1)


def test_it_is_nearest_neighbour_then_the_convolution_and_so_are_its_gradients():
    convolution = upsampled_of(5).double()
    features = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = [features, *convolution.parameters()]
    found, expected = convolution(features), plainly(convolution, features)
    torch.testing.assert_close(found, expected)
    towards = torch.randn_like(found)
    gradients = [torch.autograd.grad(output, parameters, towards) for output in (found, expected)]
    torch.testing.assert_close(*gradients)


@in_8_bits
@given(height=sides, width=sides, taps=st.lists(st.integers(0, 26), min_size=3, max_size=3))
def test_in_8_bits_integers_are_exact(height, width, taps):
    """One weight of 127 in each kernel, so that sums of weights and their steps of 1 are integers too."""
    convolution = upsampled_of(3).requires_grad_(False)
    convolution.bias.copy_(torch.arange(3.0))
    convolution.weight.zero_().flatten(1).scatter_(1, torch.tensor(taps)[:, None], 127.0)
    features = torch.randint(-100, 155, (2, 3, height, width)).float()
    features[:, 0, 0, 0], features[:, 1, 0, 0] = -100, 154  # 254 steps of 1
    with torch.no_grad():
        assert torch.equal(Int8UpsampledConv2d(convolution)(features), plainly(convolution, features))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_8_bits_from_bfloat16)])
@in_8_bits
def test_in_8_bits_it_is_off_by_about_a_hundredth_whatever_is_beside_it(dtype):
    torch.manual_seed(0)
    convolution = upsampled_of(32).requires_grad_(False).to(dtype)
    features = torch.randn(2, 32, 8, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found, expected = Int8UpsampledConv2d(convolution)(features), plainly(convolution, features)
        assert torch.equal(found[1:], Int8UpsampledConv2d(convolution)(features[1:]))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert 0.002 < (found - expected).float().norm() / expected.float().norm() < 0.02


def test_where_there_are_no_8_bits_it_is_as_it_was():
    convolution = upsampled_of(4)
    in_8_bits_or_not, features = Int8UpsampledConv2d(convolution), torch.randn(1, 4, 5, 3, requires_grad=True)
    assert torch.equal(in_8_bits_or_not(features), convolution(features))
    features = features.detach().clone()
    features[0, 0, 2, 2] = torch.nan
    with torch.no_grad():
        found, expected = in_8_bits_or_not(features), convolution.plainly(features)
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert copy.deepcopy(in_8_bits_or_not).state_dict().keys() == convolution.state_dict().keys()
