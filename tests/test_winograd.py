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

KINDS = [WinogradConv2d, UpsampledConv2d]

pytestmark = pytest.mark.skipif(winograd.CONVOLVE is None, reason="oneDNN's operators are not here")


def convolution_of(channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=bias).requires_grad_(False)


def exactly(kind: type[WinogradConv2d], convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """The reference, in float64."""
    bias = None if convolution.bias is None else convolution.bias.double()
    grown = features.repeat_interleave(2, 2).repeat_interleave(2, 3) if kind is UpsampledConv2d else features
    return F.conv2d(grown.double(), convolution.weight.double(), bias, padding=1)


@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(0, 3),
    channels=st.integers(1, 40),
    out_channels=st.integers(1, 40),
    sides=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    bias=st.booleans(),
    in_planes=st.booleans(),
)
def test_it_is_the_convolution(kind, batch, channels, out_channels, sides, size, bias, in_planes):
    torch.manual_seed(channels)
    plain = convolution_of(channels, out_channels, bias)
    features = size * torch.randn(batch, channels, *sides)
    if not in_planes:
        features = features.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = kind(plain).by_tiles(features)
    expected = exactly(kind, plain, features)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_wide_convolutions_of_large_pictures_go_by_tiles(kind):
    torch.manual_seed(0)
    plain, features = convolution_of(192, 192), torch.randn(1, 192, 32, 32)
    found, as_any = kind(plain)(features), kind(plain).plainly(features)
    of_tiles, of_any = ((made - exactly(kind, plain, features)).norm() for made in (found, as_any))
    assert 0 < of_any < of_tiles < 1e-5 * found.norm()


@pytest.mark.parametrize(("kind", "fewest"), [(WinogradConv2d, 128), (UpsampledConv2d, 192)])
@torch.no_grad()
def test_what_is_narrow_of_another_type_or_would_leave_its_blocks_half_empty_is_left_to_any_convolution(kind, fewest):
    step = kind.filtering.step
    features = torch.zeros(1, fewest, 8 * step, 16 * step)
    wide = kind(convolution_of(fewest, fewest))
    assert wide.is_for_tiles(features)
    assert wide.is_for_tiles(features[..., 1:])
    assert not wide.is_for_tiles(features[..., : 10 * step])
    assert not wide.is_for_tiles(features[:0])
    assert not wide.is_for_tiles(features[0])
    assert not wide.is_for_tiles(features[:, 1:])
    assert not wide.is_for_tiles(features.double())
    assert not kind(convolution_of(fewest - 1, fewest)).is_for_tiles(features[:, 1:])
    assert not kind(convolution_of(fewest, fewest - 1)).is_for_tiles(features)
    assert not wide.double().is_for_tiles(features)


@torch.no_grad()
def test_on_several_threads_it_is_any_convolution():
    """Which has one section in parallel, by tiles it would have hundreds: they wait where the cores are busy."""
    wide, features = WinogradConv2d(convolution_of(128, 128)), torch.zeros(1, 128, 32, 32)
    assert wide.is_for_tiles(features)
    torch.set_num_threads(2)
    try:
        assert not wide.is_for_tiles(features)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("sides", "blocks"),
    [((256, 256), (8, 8, 8, 8)), ((4, 256), (1, 1, 1, 64)), ((256, 4), (1, 1, 64, 1)), ((48, 80), (1, 5, 16, 4))],
)
def test_a_picture_is_cut_into_the_fewest_blocks(sides, blocks):
    assert WinogradConv2d(convolution_of(1, 1)).blocks_of(torch.empty(1, 1, *sides)) == blocks


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 9), (8, 8), (9, 9), (12, 12), (17, 17), (3, 700), (64, 64)])
@torch.no_grad()
def test_onednn_always_gets_the_places_that_its_kernel_was_packed_for(height, width, monkeypatch):
    """Of another number it turns over the whole kernel at each call, which was seen to take 40 times as long."""
    seen = []

    def convolve(places: Tensor, *others: object) -> Tensor:
        seen.append(places.shape)
        return winograd_convolve(places, *others)

    winograd_convolve = winograd.CONVOLVE
    monkeypatch.setattr(winograd, "CONVOLVE", convolve)
    convolution = WinogradConv2d(convolution_of(3, 2))
    convolution.by_tiles(torch.randn(2, 3, 4 * height, 4 * width))
    down, across, *tiles = convolution.blocks_of(torch.empty(2, 3, 4 * height, 4 * width))
    assert seen == 2 * down * across * [torch.Size([1, 36 * 3, 1, winograd.TILES])]
    assert math.prod(tiles) == winograd.TILES
    assert down * tiles[0] >= height
    assert across * tiles[1] >= width


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.no_grad()
def test_what_is_not_finite_is_carried_on(value):
    plain, features = convolution_of(4, 4), torch.randn(2, 4, 8, 8)
    features[1, 0, 2, 2] = value
    found, expected = WinogradConv2d(plain).by_tiles(features), plain(features)
    assert not found[~expected.isfinite()].isfinite().any()
    assert found[0].isfinite().all()
    plain.weight[0, 0, 1, 1] = value
    assert not WinogradConv2d(plain).by_tiles(features[:1])[0, 0].isfinite().any()


@pytest.mark.parametrize("other", [{"stride": 2}, {"kernel_size": 1}, {"padding": 0}])
def test_a_convolution_of_another_shape_is_refused(other):
    with pytest.raises(ValueError, match="must be 3x3 with stride 1 and padding 1"):
        WinogradConv2d(nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1} | other))
