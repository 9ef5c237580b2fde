"""Convolutions by tiles beside plain ones in float64, their gradients, and when they are as any other."""

import copy
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import printed_by_lesser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tokenizer import processor, winograd
from tokenizer.kernels import LANES, LIBRARY
from tokenizer.winograd import FEWEST_TILES, Sides, WinogradConv2d

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built here")


@pytest.fixture(params=Sides, ids=lambda sides: sides.name)
def convolution(request) -> WinogradConv2d:
    torch.manual_seed(0)
    return WinogradConv2d(LANES, 2 * LANES, request.param)


@pytest.fixture
def features(convolution) -> Tensor:
    """Of which come pictures of about the same size."""
    torch.manual_seed(1)
    size = 2 if convolution.sides == Sides.HALVED else 1
    return torch.randn(2, LANES, 16 * size, 13 * size)


def exactly(convolution: WinogradConv2d, features: Tensor) -> Tensor:
    """The reference: float64 and nine products of each pixel."""
    features = features.double()
    if convolution.sides == Sides.DOUBLED:
        features = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    bias = None if convolution.bias is None else convolution.bias.double()
    if convolution.sides == Sides.HALVED:
        return F.conv2d(F.pad(features, (0, 2, 0, 2)), convolution.weight.double(), bias, stride=2)
    return F.conv2d(features, convolution.weight.double(), bias, padding=1)


def goes_by_tiles(convolution: WinogradConv2d, features: Tensor) -> bool:
    return winograd.is_for_tiles(features, convolution.weight, convolution.bias, convolution.sides)


def plainly(convolution: WinogradConv2d, features: Tensor) -> Tensor:
    return winograd.convolution(features, convolution.weight, convolution.bias, convolution.sides)


@given(
    sides=st.sampled_from(Sides),
    batch=st.integers(1, 5),
    channels=st.integers(LANES, 3 * LANES + 5),
    out_channels=st.integers(1, 5 * LANES + 5),
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 40)),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    bias=st.booleans(),
    in_planes=st.booleans(),
)
def test_it_is_the_convolution_and_so_are_its_gradients(
    sides, batch, channels, out_channels, lengths, size, bias, in_planes
):
    torch.manual_seed(channels)
    convolution = WinogradConv2d(channels, out_channels, sides)
    if not bias:
        convolution.bias = None
    features = size * torch.randn(batch, channels, *lengths)
    if not in_planes:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    found, expected = convolution(features), exactly(convolution, features)
    height, width = expected.shape[2:]
    tiles = math.ceil(height / 4) * math.ceil(width / 4)
    of_tiles = batch * tiles >= FEWEST_TILES and tiles * 16 <= 2 * height * width
    assert goes_by_tiles(convolution, features) == of_tiles
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 3e-6 * expected.norm()
    towards = torch.randn_like(found)
    inputs = [features, convolution.weight]  # a bias has sums of any convolution
    gradients = torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards.double())
    for by_tiles, exact in zip(*gradients, strict=True):
        assert by_tiles.dtype == torch.float32
        assert (by_tiles - exact).norm() <= 3e-6 * exact.norm()


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize(
    "laid_out",
    [
        lambda weight: weight,
        lambda weight: weight.contiguous(memory_format=torch.channels_last),
        lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
        lambda weight: weight[:, :1].expand(weight.shape),
    ],
    ids=["plain", "channels last", "turned", "expanded"],
)
def test_any_of_them_may_want_gradients_whatever_the_layout(convolution, features, wanted, laid_out):
    del convolution.weight
    given = [features, laid_out(torch.randn(2 * LANES, LANES, 3, 3)), torch.randn(4 * LANES)[::2]]
    inputs = [tensor.detach().requires_grad_(want) for tensor, want in zip(given, wanted, strict=True)]
    convolution.weight, convolution.bias = (nn.Parameter(tensor, tensor.requires_grad) for tensor in inputs[1:])
    inputs[1:] = convolution.weight, convolution.bias
    assert goes_by_tiles(convolution, features)
    found, expected = convolution(inputs[0]), exactly(convolution, inputs[0])
    assert (found - expected).norm() <= 3e-6 * expected.norm()
    chosen = [tensor for tensor in inputs if tensor.requires_grad]
    if chosen:
        gradients = (torch.autograd.grad(each.square().sum(), chosen) for each in (found, expected))
        for by_tiles, exact in zip(*gradients, strict=True):
            assert (by_tiles - exact).norm() <= 1e-5 * exact.norm()


def test_many_gradients_at_once_are_those_of_any_convolution(convolution, features):
    features.requires_grad_()
    towards = torch.randn(3, *convolution(features).shape)
    found, expected = (
        torch.autograd.grad(convolve(convolution, features), features, towards, is_grads_batched=True)[0]
        for convolve in (WinogradConv2d.forward, plainly)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_too_much_for_the_cache_is_written_past_it_and_the_same():
    convolution, features = WinogradConv2d(LANES, LANES), torch.randn(1, LANES, 640, 840)
    assert features.numel() > 2**22
    assert (convolution(features) - exactly(convolution, features)).norm() <= 3e-6 * features.norm()


@torch.no_grad()
def test_the_points_round_half_as_much_as_the_usual_ones():
    """By 0, 1, -1, 2, -2 and infinity it would be 2.3e-6."""
    torch.manual_seed(0)
    convolution, features = WinogradConv2d(128, 64), torch.randn(1, 128, 32, 32)
    expected = exactly(convolution, features)
    assert (convolution(features) - expected).norm() <= 1.3e-6 * expected.norm()


def test_gradients_of_gradients_are_those_of_any_convolution(convolution, features):
    """As a penalty on gradients needs them."""
    features.requires_grad_()
    inputs, seconds = [features, *convolution.parameters()], []
    for convolve in (WinogradConv2d.forward, plainly):
        result = convolve(convolution, features)
        (first,) = torch.autograd.grad(result.square().sum(), features, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), inputs))
    for found, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_it_rounds_otherwise_than_any_convolution(convolution, features):
    """Else nothing here would test the kernels."""
    assert goes_by_tiles(convolution, features)
    assert not torch.equal(convolution(features), plainly(convolution, features))


def test_no_picture_depends_on_those_beside_it_nor_on_gradients_nor_threads(convolution, features):
    with torch.no_grad():
        expected = convolution(features)
    assert torch.equal(convolution(features), expected)
    assert torch.equal(convolution(features.flip(0)).flip(0), expected)
    assert torch.equal(convolution(features[1:]), expected[1:])
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            assert torch.equal(convolution(features), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_of_weights_are_the_same_each_time_and_nearly_so_by_other_threads(convolution, features, threads):
    before = torch.get_num_threads()
    towards = torch.randn_like(convolution(features))
    (expected,) = torch.autograd.grad(exactly(convolution, features), convolution.weight, towards.double())
    torch.set_num_threads(threads)
    try:
        found, again = (torch.autograd.grad(convolution(features), convolution.weight, towards)[0] for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, again)
    assert (found - expected).norm() <= 3e-6 * expected.norm()


@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_added_is_added_in_its_type(convolution, features, gradients, monkeypatch):
    monkeypatch.setattr(processor, "bfloat16_is_faster", lambda: False)
    with torch.set_grad_enabled(gradients):
        result = convolution(features)
        added = torch.randn_like(result)
        before = added.clone()
        assert torch.equal(convolution(features, added), result + added)
        assert torch.equal(added, before)
        assert torch.equal(convolution(features, added[:1, :, :1]), result + added[:1, :, :1])
        assert torch.equal(convolution(features, added.double()), result.double() + added.double())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = convolution(features, added.bfloat16())
        assert torch.equal(rounded, result.bfloat16() + added.bfloat16())


def test_what_is_narrow_small_unbatched_or_of_another_type_is_left_to_any_convolution(convolution, features):
    assert goes_by_tiles(convolution, features)
    assert goes_by_tiles(convolution, features[..., :9])
    assert not goes_by_tiles(convolution, features[:, :, :1, :9])
    assert not goes_by_tiles(convolution, features[:1, :, :4, :4])
    assert not goes_by_tiles(convolution, features[:0])
    assert not goes_by_tiles(convolution, features[0])
    torch.testing.assert_close(convolution(features[0]), plainly(convolution, features)[0])
    assert not goes_by_tiles(convolution, features[:, 1:])
    assert not goes_by_tiles(convolution, features.double())
    assert not goes_by_tiles(convolution, features.bfloat16())
    assert not goes_by_tiles(convolution, torch._neg_view(features))
    assert not goes_by_tiles(WinogradConv2d(LANES - 1, LANES), features[:, 1:])
    assert goes_by_tiles(WinogradConv2d(3, 128), torch.empty(1, 3, 256, 256))  # whose result is much new memory
    assert not goes_by_tiles(WinogradConv2d(3, 128), torch.empty(1, 3, 256, 252))
    assert not goes_by_tiles(convolution.double(), features)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@torch.no_grad()
def test_what_is_not_finite_is_carried_on(convolution, features, value):
    features[1, 0, 2, 2] = value
    found, expected = convolution(features), plainly(convolution, features)
    assert not found[~expected.isfinite()].isfinite().any()
    assert found[0].isfinite().all()
    features = features[:1]
    convolution.weight[0, 0, 1, 1] = value
    assert not convolution(features)[0, 0].isfinite().any()


LESSER = """
import torch
from tokenizer.kernels import LANES
from tokenizer.winograd import Sides, WinogradConv2d, convolution, is_for_tiles
torch.manual_seed(0)
for sides in Sides:
    layer, features = WinogradConv2d(40, 72, sides), torch.randn(2, 40, 24, 18, requires_grad=True)
    assert LANES == 8 and is_for_tiles(features, layer.weight, layer.bias, sides)
    exact = convolution(features.double(), layer.weight.double(), layer.bias.double(), sides)
    inputs = [features, layer.weight]
    ours, theirs = ((each, *torch.autograd.grad(each.square().sum(), inputs)) for each in (layer(features), exact))
    print(*(((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs)))
"""


def test_the_kernels_for_lesser_processors_are_as_exact():
    errors = printed_by_lesser(LESSER)
    assert len(errors) == 9
    assert max(errors) < 3e-6


@torch.no_grad()
def test_weights_that_change_are_taken_as_they_are(convolution, features):
    others = WinogradConv2d(convolution.in_channels, convolution.out_channels, convolution.sides)
    expected, before = others(features), convolution(features)
    convolution.load_state_dict(others.state_dict())
    assert torch.equal(convolution(features), expected)
    convolution.weight = nn.Parameter(others.weight * 2)
    convolution.bias.mul_(2)
    torch.testing.assert_close(convolution(features), 2 * expected)
    convolution.weight.data = others.weight
    convolution.bias.data = others.bias
    assert torch.equal(convolution(features), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.copy_(-weight),
        lambda weight: weight.data.flatten(1)[0, 0].add_(0.5),
        lambda weight: weight.data.copy_(weight.flip(3)),
        lambda weight: weight.data.copy_(weight.roll(1, 1)),
        lambda weight: weight.detach().numpy().__imul__(2),
        lambda weight: torch.optim.AdamW([weight], lr=0.1, fused=True).step(),
    ],
    ids=["copied", "one number", "turned over", "exchanged", "in numpy", "a fused optimizer"],
)
@pytest.mark.parametrize("large", [False, True])
def test_changes_that_pytorch_does_not_count_are_seen_too(convolution, features, change, large, monkeypatch):
    if large:
        monkeypatch.setattr(winograd, "LARGE_WEIGHT", 0)
    with torch.no_grad():
        convolution.weight.copy_(torch.randint(-8, 8, convolution.weight.shape))  # whose sums are exact in any order
        before = convolution(features)
        convolution.weight.grad = torch.ones_like(convolution.weight)
        change(convolution.weight)
        assert torch.equal(convolution(features), copy.deepcopy(convolution)(features))
        assert not torch.equal(convolution(features), before)


@torch.no_grad()
def test_a_single_number_of_a_large_weight_is_seen_where_pytorch_counts_its_change(convolution, features, monkeypatch):
    monkeypatch.setattr(winograd, "LARGE_WEIGHT", 0)
    before = convolution(features)
    convolution.weight[1, 1, 1, 1] += 1
    assert not torch.equal(convolution(features), before)


@torch.no_grad()
def test_a_row_and_a_column_of_a_large_weight_are_always_seen(convolution, features, monkeypatch):
    monkeypatch.setattr(winograd, "LARGE_WEIGHT", 0)
    for channel in range(LANES):
        for part in (convolution.weight.data[channel], convolution.weight.data[:, channel]):
            before = convolution(features)
            part.zero_()
            assert not torch.equal(convolution(features), before)


def test_weights_of_inference_mode_are_taken_as_they_are_too(convolution):
    with torch.inference_mode():
        features = torch.randn(1, LANES, 16, 16)
        others = WinogradConv2d(convolution.in_channels, convolution.out_channels, convolution.sides)
        convolution = copy.deepcopy(convolution)
        assert not torch.equal(convolution(features), others(features))
        convolution.load_state_dict(others.state_dict())
        assert torch.equal(convolution(features), others(features))


@pytest.mark.parametrize("computed", [False, True])
@torch.no_grad()
def test_a_weight_that_does_not_change_is_packed_once(convolution, features, computed, monkeypatch):
    if computed:
        nn.utils.parametrizations.weight_norm(convolution)
    expected = convolution(features)
    torch.testing.assert_close(expected, plainly(convolution, features))
    monkeypatch.setattr(winograd, "pack", None)
    assert torch.equal(convolution(features), expected)


@torch.no_grad()
def test_what_is_packed_goes_where_the_weights_go(convolution, features):
    convolution(features)
    assert convolution.packed is not None
    assert convolution.double().packed is None
    assert torch.equal(convolution(features.double()), plainly(convolution, features.double()))


@torch.no_grad()
def test_it_is_copied_pickled_and_saved_as_any_convolution(convolution, features):
    expected = convolution(features)  # with its weights packed by now
    for other in (copy.deepcopy(convolution), pickle.loads(pickle.dumps(convolution))):
        assert torch.equal(other(features), expected)
    assert convolution.state_dict().keys() == nn.Conv2d(1, 1, 1).state_dict().keys()
    assert len(pickle.dumps(convolution)) < 2 * 4 * convolution.weight.numel() + 5000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_defaults_of_the_process_are_not_its_own(convolution, features, dtype):
    other = copy.deepcopy(convolution)
    expected = convolution(features)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert torch.equal(other(features), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by forward_ad
@pytest.mark.parametrize("name", ["weight", "bias"])
@torch.no_grad()
def test_tangents_of_parameters_meet_any_convolution(convolution, features, name):
    parameter = getattr(convolution, name)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(parameter, torch.ones_like(parameter))}
        found = torch.func.functional_call(convolution, dual, (features,))
        assert forward_ad.unpack_dual(found).tangent is not None


@torch.no_grad()
def test_compilers_transforms_and_other_tensors_meet_any_convolution(convolution, features):
    expected = plainly(convolution, features)
    assert torch.equal(torch.compile(convolution, backend="eager", fullgraph=True)(features), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        assert torch.equal(torch.jit.trace(convolution, features)(features), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert convolution(mode.from_tensor(features)).shape == expected.shape
    assert torch.equal(torch.func.vmap(convolution)(features[None])[0], expected)
    assert torch.equal(make_fx(convolution)(features)(features), expected)
    with FlopCounterMode(display=False) as counter:
        convolution(features)
    assert counter.get_total_flops() > expected.numel()


@pytest.mark.parametrize("faster", [False, True])
def test_autocast_rounds_only_where_bfloat16_is_faster(convolution, features, faster, monkeypatch):
    monkeypatch.setattr(processor, "bfloat16_is_faster", lambda: faster)
    features.requires_grad_()
    in_float32 = convolution(features), convolution(features.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = convolution(features), convolution(features.bfloat16())
        rounded = plainly(convolution, features)
    expected = (rounded, rounded) if faster else in_float32
    for each, other in zip(found, expected, strict=True):
        assert torch.equal(each, other)
    (gradient,) = torch.autograd.grad(found[1].float().sum(), features)
    assert gradient.dtype == torch.float32


def test_where_the_kernels_were_not_built_it_is_any_convolution(convolution, features, monkeypatch):
    expected = plainly(convolution, features)
    monkeypatch.setattr(winograd, "LIBRARY", None)
    assert torch.equal(convolution(features), expected)
