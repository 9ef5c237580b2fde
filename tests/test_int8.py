"""Convolutions in 8 bits beside the same arithmetic in float64, and when they are as any other."""

import copy
import math
import os
import sys

import pytest
import torch
from eight_bits import in_8_bits, in_8_bits_from_bfloat16
from hypothesis import given
from hypothesis import strategies as st
from processes import run
from torch import Tensor, nn

from tokenizer import int8
from tokenizer.int8 import Int8Conv2d

pytestmark = pytest.mark.usefixtures("however_little")


def convolution_of(channels: int, out_channels: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, **{"padding": 1, **options}).requires_grad_(False)


def in_steps(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """The convolution of one picture after both are rounded to their steps, in float64."""
    weight, features = convolution.weight.double(), features.double()
    of_channel = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    low, high = min(features.min().item(), 0.0), max(features.max().item(), 0.0)
    step = (high - low) / 254
    zero = math.ceil(-low / step)
    integers = (features / step + zero).round()
    assert integers.min() >= 0
    assert integers.max() <= 255
    rounded = copy.deepcopy(convolution).double()
    rounded.weight.copy_((weight / of_channel).round() * of_channel)
    return rounded((integers - zero) * step)


@in_8_bits
@given(
    channels=st.integers(1, 40),
    out_channels=st.integers(1, 40),
    sides=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),  # all negative, both, all positive
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    bias=st.booleans(),
    padding=st.integers(0, 2),
    stride=st.integers(1, 2),
    in_planes=st.booleans(),
)
def test_it_is_the_convolution_of_what_is_rounded_to_steps(
    channels, out_channels, sides, shift, size, bias, padding, stride, in_planes
):
    torch.manual_seed(channels)
    plain = convolution_of(channels, out_channels, bias=bias, padding=padding, stride=stride)
    features = size * (torch.rand(1, channels, *sides) + shift)
    if not in_planes:
        features = features.contiguous(memory_format=torch.channels_last)
    expected = in_steps(plain, features)
    with torch.no_grad():
        found = Int8Conv2d(plain)(features)
    assert found.dtype == torch.float32
    # A feature just between two steps may be rounded either way.
    step = (max(features.max().item(), 0.0) - min(features.min().item(), 0.0)) / 254
    tolerance = 2 * step * plain.weight.abs().max().item() + 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=in_8_bits_from_bfloat16)])
@in_8_bits
def test_it_is_off_by_about_a_hundredth_and_keeps_type_and_layout(dtype):
    torch.manual_seed(0)
    plain = convolution_of(64, 32).to(dtype)
    features = nn.functional.silu(torch.randn(2, 64, 24, 16)).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found, expected = Int8Conv2d(plain)(features), plain(features)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert 0.002 < (found - expected).float().norm() / expected.float().norm() < 0.02


@in_8_bits
def test_no_picture_depends_on_those_beside_it():
    convolution = Int8Conv2d(convolution_of(8, 8))
    features = torch.randn(5, 8, 9, 9) * torch.tensor([1e-3, 1.0, 0.0, 1e3, 7.0]).view(5, 1, 1, 1)
    with torch.no_grad():
        alone = [convolution(picture[None]) for picture in features]
        assert torch.equal(convolution(features), torch.cat(alone))
    assert torch.equal(alone[2], convolution.bias.view(1, 8, 1, 1).expand(1, 8, 9, 9))  # of nothing but zeros


@in_8_bits
def test_little_work_and_sums_beyond_32_bits_are_left_to_floats(monkeypatch):
    plain, features = convolution_of(4, 4), torch.randn(3, 4, 6, 6)
    convolution, products = Int8Conv2d(plain), 6 * 6 * plain.weight.numel()
    with torch.no_grad():
        expected, rounded = plain(features), convolution(features)
        for name, left, taken in [("FEWEST_PRODUCTS", products + 1, products), ("MOST_ADDENDS", 4 * 9 - 1, 4 * 9)]:
            with monkeypatch.context() as context:
                context.setattr(int8, name, left)
                assert torch.equal(convolution(features), expected)
                context.setattr(int8, name, taken)
                assert torch.equal(convolution(features), rounded)
    assert not torch.equal(rounded, expected)


LESSER = """
import torch
from tokenizer import int8
int8.FEWEST_PRODUCTS = 0
torch.manual_seed(0)
plain, features = torch.nn.Conv2d(48, 40, 3, padding=1).requires_grad_(False), torch.rand(2, 48, 9, 7)
plain.weight.abs_()
with torch.no_grad():
    print((int8.Int8Conv2d(plain)(features) - plain(features)).norm().item() / plain(features).norm().item())
"""


@in_8_bits
@pytest.mark.parametrize(
    ("instructions", "low", "high"),
    [("AVX512_CORE_VNNI", 1e-5, 2e-3), ("AVX2_VNNI", 1e-5, 2e-3), ("AVX512_CORE", 0, 0), ("AVX2", 0, 0)],
)
def test_what_onednn_has_for_lesser_processors_is_as_exact_or_not_used(instructions, low, high):
    paths = os.pathsep.join(sys.path)
    done = run([sys.executable, "-c", LESSER], PYTHONPATH=paths, ONEDNN_MAX_CPU_ISA=instructions)
    assert done.returncode == 0, done.stderr
    assert low <= float(done.stdout) <= high


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_carried_on(value):
    plain = convolution_of(4, 4)
    features = torch.randn(2, 4, 5, 5)
    features[1, 0, 2, 2] = value
    with torch.no_grad():
        found = Int8Conv2d(plain)(features)
        assert torch.equal(found[1].isfinite(), plain(features)[1].isfinite())
        assert found[0].isfinite().all()
        plain.weight[0, 0, 1, 1] = value
        assert not Int8Conv2d(plain)(features[:1])[0, 0].isfinite().any()
