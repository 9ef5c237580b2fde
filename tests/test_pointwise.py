"""1x1 convolutions by products beside plain ones in float64, their gradients, and when they are as any other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import printed_by_lesser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tokenizer import pointwise, processor
from tokenizer.kernels import LANES, LIBRARY
from tokenizer.pointwise import PointwiseConv2d, is_for_kernels

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built here")


@pytest.fixture
def convolution() -> PointwiseConv2d:
    torch.manual_seed(0)
    return PointwiseConv2d(2 * LANES, 4 * LANES + 1)


@pytest.fixture
def features() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 2 * LANES, 9, 7)


def exactly(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    """The reference, in float64."""
    bias = None if convolution.bias is None else convolution.bias.double()
    return F.conv2d(features.double(), convolution.weight.double(), bias)


def plainly(convolution: nn.Conv2d, features: Tensor) -> Tensor:
    return F.conv2d(features, convolution.weight, convolution.bias)


def goes_by_products(convolution: nn.Conv2d, features: Tensor) -> bool:
    return is_for_kernels(features, convolution.weight, convolution.bias)


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 6) | st.sampled_from([LANES, 3 * LANES, 3 * LANES + 5, 9 * LANES]),
    out_channels=st.integers(1, 6) | st.sampled_from([LANES, 5 * LANES, 5 * LANES + 4, 9 * LANES]),
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 15)),
    bias=st.booleans(),
    wanted=st.tuples(st.booleans(), st.booleans()),
    layouts=st.tuples(st.booleans(), st.booleans()),
)
def test_it_is_the_convolution_and_so_are_its_gradients(batch, channels, out_channels, lengths, bias, wanted, layouts):
    torch.manual_seed(channels)
    convolution = PointwiseConv2d(channels, out_channels)
    if not bias:
        convolution.bias = None
    if layouts[0]:  # whose steps are others
        convolution.weight = nn.Parameter(torch.randn(channels, out_channels, 1, 1).transpose(0, 1))
    features = torch.randn(batch, channels, *lengths)
    if layouts[1]:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_(wanted[0])
    convolution.weight.requires_grad_(wanted[1])
    assert goes_by_products(convolution, features)
    found, expected = convolution(features), exactly(convolution, features)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).norm() <= 2e-6 * expected.norm() + 1e-7
    inputs = [tensor for tensor in (features, convolution.weight, convolution.bias) if tensor is not None]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    if inputs:
        towards = torch.randn_like(found)
        gradients = torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards.double())
        for by_products, exact in zip(*gradients, strict=True):
            assert by_products.dtype == torch.float32
            assert (by_products - exact).norm() <= 2e-6 * exact.norm() + 1e-7


def test_no_place_depends_on_those_beside_it_nor_on_gradients_nor_threads(convolution, features):
    with torch.no_grad():
        expected = convolution(features)
    assert not torch.equal(expected, plainly(convolution, features))  # else nothing here would test the kernel
    assert torch.equal(convolution(features.requires_grad_()), expected)
    for picture in range(3):
        assert torch.equal(convolution(features[picture:][:1]), expected[picture:][:1])
    assert torch.equal(convolution(features[:, :, 3:, 2:]), expected[:, :, 3:, 2:])
    whole = PointwiseConv2d(2 * LANES, 4 * LANES)  # whose gradients are by the kernels
    towards, threads = torch.randn(3, 4 * LANES, 9, 7), torch.get_num_threads()
    gradients = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            assert torch.equal(convolution(features), expected)
            gradients.append(torch.autograd.grad(whole(features), [features, whole.weight], towards))
        finally:
            torch.set_num_threads(threads)
    for others in gradients[1:]:
        assert all(map(torch.equal, others, gradients[0]))


def test_what_comes_of_it_may_be_changed_in_place(convolution, features):
    for layer in (convolution, PointwiseConv2d(2 * LANES, LANES)):
        layers = nn.Sequential(layer, nn.ReLU(inplace=True))
        (found,) = torch.autograd.grad(layers(features).sum(), layer.weight)
        (expected,) = torch.autograd.grad(plainly(layer, features).relu().sum(), layer.weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_gradients_of_gradients_and_many_at_once_are_those_of_any_convolution(convolution, features):
    features.requires_grad_()
    inputs, seconds, many = [features, *convolution.parameters()], [], []
    for convolve in (PointwiseConv2d.forward, plainly):
        result = convolve(convolution, features)
        (first,) = torch.autograd.grad(result.square().sum(), features, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), inputs))
        towards = torch.ones(2, *result.shape)
        result = convolve(convolution, features)
        many.append(torch.autograd.grad(result, inputs, towards, is_grads_batched=True))
    for found, expected in zip(seconds[0] + many[0], seconds[1] + many[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_what_is_empty_unbatched_or_of_another_type_is_left_to_any_convolution(convolution, features):
    assert goes_by_products(convolution, features)
    assert not goes_by_products(convolution, features[:0])
    assert not goes_by_products(convolution, features[0])
    assert not goes_by_products(convolution, features[:, 1:])
    assert not goes_by_products(convolution, features.double())
    assert not goes_by_products(convolution, features.bfloat16())
    assert not goes_by_products(convolution, torch._neg_view(features))
    assert not goes_by_products(convolution.double(), features)
    assert convolution(features[:0].double()).shape == (0, 4 * LANES + 1, 9, 7)


@torch.no_grad()
def test_compilers_transforms_and_other_tensors_meet_any_convolution(convolution, features):
    expected = plainly(convolution, features)
    assert torch.equal(torch.compile(convolution, backend="eager", fullgraph=True)(features), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert convolution(mode.from_tensor(features)).shape == expected.shape
    assert torch.equal(torch.func.vmap(convolution)(features[None])[0], expected)


@torch.no_grad()
def test_what_is_not_finite_stays_at_its_place(convolution, features):
    features[1, 0, 2, 2] = math.nan
    lost = convolution(features).isfinite().logical_not().any(1)
    assert lost.nonzero().tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("faster", [False, True])
def test_autocast_rounds_only_where_bfloat16_is_faster(convolution, features, faster, monkeypatch):
    monkeypatch.setattr(processor, "bfloat16_is_faster", lambda: faster)
    in_float32 = convolution(features)
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = convolution(features), plainly(convolution, features)
    assert torch.equal(found, rounded if faster else in_float32)


LESSER = """
import torch
from tokenizer.kernels import LANES
from tokenizer.pointwise import PointwiseConv2d
torch.manual_seed(0)
layer, features = PointwiseConv2d(40, 76), torch.randn(2, 40, 13, 9, requires_grad=True)
assert LANES == 8
weight, bias = layer.weight.double(), layer.bias.double()
found, exact = layer(features), torch.nn.functional.conv2d(features.double(), weight, bias)
inputs = [features, layer.weight]
ours = found, *torch.autograd.grad(found.square().sum(), inputs)
theirs = exact, *torch.autograd.grad(exact.square().sum(), inputs)
print(*(((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs)))
"""


def test_the_kernels_for_lesser_processors_are_as_exact():
    errors = printed_by_lesser(LESSER)
    assert len(errors) == 3
    assert max(errors) < 2e-6


def test_where_the_kernels_were_not_built_it_is_any_convolution(convolution, features, monkeypatch):
    expected = plainly(convolution, features)
    monkeypatch.setattr(pointwise, "LIBRARY", None)
    assert torch.equal(convolution(features), expected)
