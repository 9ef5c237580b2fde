"""Convolutions by tiles beside a plain one in float64, and when they are as any other."""

import math
import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer import winograd
from tokenizer.upsampling import UpsampledConv2d
from tokenizer.winograd import WinogradConv2d

pytestmark = pytest.mark.skipif(winograd.CONVOLVE is None, reason="oneDNN's operators are not here")


def convolution_of(channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias).requires_grad_(False)


def error_of(found: Tensor, expected: Tensor) -> float:
    """Of the whole, relative."""
    return ((found - expected).norm() / expected.norm()).item()


@given(
    kind=st.sampled_from([WinogradConv2d, UpsampledConv2d]),
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    out_channels=st.integers(1, 40),
    tiles=st.tuples(st.integers(1, 20), st.integers(1, 5)),
    at_once=st.integers(1, 30),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    bias=st.booleans(),
    in_planes=st.booleans(),
)
def test_it_is_the_convolution(kind, batch, channels, out_channels, tiles, at_once, size, bias, in_planes):
    torch.manual_seed(channels)
    plain = convolution_of(channels, out_channels, bias)
    convolution = kind(plain)
    step = convolution.filtering.step
    features = size * torch.randn(batch, channels, step * tiles[0], step * tiles[1])
    if not in_planes:
        features = features.contiguous(memory_format=torch.channels_last)
    grown = F.interpolate(features, scale_factor=winograd.PIXELS // step)
    expected = F.conv2d(grown.double(), plain.weight.double(), padding=1)
    if bias:
        expected += plain.bias.double()[:, None, None]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "TILES_AT_ONCE", at_once)
        found = convolution.by_tiles(features)
    assert found.dtype == torch.float32
    assert error_of(found, expected) < 1e-5


@pytest.mark.parametrize("kind", [WinogradConv2d, UpsampledConv2d])
@torch.no_grad()
def test_wide_convolutions_of_large_pictures_go_by_tiles(kind):
    torch.manual_seed(0)
    plain, features = convolution_of(128, 128), torch.randn(1, 128, 32, 32)
    found, exact = kind(plain)(features), kind(plain).double()(features.double())
    as_any = kind(plain.float()).plainly(features)
    assert not torch.equal(found, as_any)
    assert error_of(as_any, exact) < error_of(found, exact) < 1e-5


@pytest.mark.parametrize("kind", [WinogradConv2d, UpsampledConv2d])
@torch.no_grad()
def test_what_is_narrow_small_or_of_other_sides_is_left_to_any_convolution(kind, monkeypatch):
    convolution = kind(convolution_of(6, 5))
    step = convolution.filtering.step
    features = torch.randn(1, 6, 2 * step, 3 * step)
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 5)
    monkeypatch.setattr(winograd, "FEWEST_TILES", 6)
    assert convolution.is_for_tiles(features)
    assert not convolution.is_for_tiles(features[:, :, 1:])
    assert not convolution.is_for_tiles(features[:, :, :, 1:])
    assert not convolution.is_for_tiles(features.bfloat16())
    for name, value in {"FEWEST_CHANNELS": 6, "FEWEST_TILES": 7}.items():
        with monkeypatch.context() as context:
            context.setattr(winograd, name, value)
            assert torch.equal(convolution(features), convolution.plainly(features))


LESSER = """
import torch
from tokenizer.winograd import WinogradConv2d
torch.manual_seed(0)
plain, features = torch.nn.Conv2d(48, 40, 3, padding=1).requires_grad_(False), torch.randn(2, 48, 12, 8)
with torch.no_grad():
    found = WinogradConv2d(plain).by_tiles(features)
    print((found - plain(features)).norm().item() / found.norm().item())
"""


@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2", "SSE41"])
def test_what_onednn_has_for_lesser_processors_is_as_exact(instructions):
    paths = os.pathsep.join(sys.path)
    done = run([sys.executable, "-c", LESSER], PYTHONPATH=paths, ONEDNN_MAX_CPU_ISA=instructions)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@pytest.mark.usefixtures("however_little")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.no_grad()
def test_what_is_not_finite_is_carried_on(value):
    plain, features = convolution_of(4, 4), torch.randn(2, 4, 8, 8)
    features[1, 0, 2, 2] = value
    found, expected = WinogradConv2d(plain)(features), plain(features)
    assert not found[~expected.isfinite()].isfinite().any()
    assert found[0].isfinite().all()
    plain.weight[0, 0, 1, 1] = value
    assert not WinogradConv2d(plain)(features[:1])[0, 0].isfinite().any()
