"""What holds of every convolution that has a second kernel: it follows the weight, and is asked only for numbers."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from tokenizer import int8, winograd
from tokenizer.int8 import Int8Conv2d, convolves_int8
from tokenizer.packed import PackedConv2d
from tokenizer.upsampling import Int8UpsampledConv2d, UpsampledConv2d
from tokenizer.winograd import WinogradConv2d

pytestmark = pytest.mark.usefixtures("however_little")


@pytest.fixture(params=[Int8Conv2d, Int8UpsampledConv2d, WinogradConv2d, UpsampledConv2d])
def kind(request) -> type[PackedConv2d]:
    """One that can be had on this processor."""
    by_tiles = issubclass(request.param, WinogradConv2d)
    here = winograd.CONVOLVE is not None if by_tiles else convolves_int8(torch.float32)
    if not here:
        pytest.skip("no operator for it on this processor")
    return request.param


def plain_convolution() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)


@pytest.fixture
def convolution(kind) -> PackedConv2d:
    return kind(plain_convolution())


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 4, 8, 12)


@torch.no_grad()
def test_it_rounds_otherwise_than_any_convolution_and_not_by_much(convolution, features):
    found, expected = convolution(features), convolution.plainly(features)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_no_picture_depends_on_those_beside_it(convolution):
    features = torch.randn(4, 4, 8, 8) * torch.tensor([1e-3, 1.0, 0.0, 1e3]).view(4, 1, 1, 1)
    assert torch.equal(convolution(features), torch.cat([convolution(picture[None]) for picture in features]))


@torch.no_grad()
def test_weights_that_change_are_taken_as_they_are(kind, convolution, features):
    others = plain_convolution()
    expected, before = kind(others)(features), convolution(features)
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
        lambda weight: weight.data.copy_(weight[:, [1, 0, 2, 3]]),
        lambda weight: weight.numpy().__imul__(2),
        lambda weight: torch.optim.AdamW([weight], lr=0.1, fused=True).step(),
    ],
    ids=["copied", "one number", "turned over", "exchanged", "in numpy", "a fused optimizer"],
)
def test_changes_that_pytorch_does_not_count_are_seen_too(kind, convolution, features, change):
    with torch.no_grad():
        convolution.weight.copy_(torch.randint(-8, 8, convolution.weight.shape))  # whose sums are exact in any order
        before = convolution(features)
        convolution.weight.grad = torch.ones_like(convolution.weight)
        change(convolution.weight)
        found = convolution(features)
        assert torch.equal(found, kind(convolution)(features))
    assert not torch.equal(found, before)


def test_weights_of_inference_mode_are_taken_as_they_are_too(kind):
    with torch.inference_mode():
        others, features, convolution = plain_convolution(), torch.randn(1, 4, 8, 8), kind(plain_convolution())
        torch.testing.assert_close(convolution(features), convolution.plainly(features), rtol=0, atol=0.05)
        assert convolution.packed is not None
        convolution.load_state_dict(others.state_dict())
        assert torch.equal(convolution(features), kind(others)(features))


@pytest.mark.parametrize("computed", [False, True])
@torch.no_grad()
def test_a_weight_that_does_not_change_is_packed_once(convolution, features, computed, monkeypatch):
    if computed:
        nn.utils.parametrizations.weight_norm(convolution)
    expected = convolution(features)
    torch.testing.assert_close(expected, convolution.plainly(features), rtol=0, atol=0.05)
    monkeypatch.setattr(type(convolution), "pack", None)
    assert torch.equal(convolution(features), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by forward_ad
@pytest.mark.parametrize("name", ["weight", "bias"])
@torch.no_grad()
def test_tangents_of_parameters_meet_any_convolution(convolution, features, name):
    parameter = getattr(convolution, name)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(parameter, torch.ones_like(parameter))}
        found = torch.func.functional_call(convolution, dual, (features,))
        assert forward_ad.unpack_dual(found).tangent is not None


@pytest.mark.parametrize("training", [False, True])
def test_it_trains_or_not_as_the_convolution_that_it_was(kind, training):
    assert kind(plain_convolution().train(training)).training == training


@pytest.mark.parametrize("other", [{"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}])
def test_a_convolution_of_another_kind_is_refused(kind, other):
    with pytest.raises(ValueError, match="must be without dilation and groups, with zeros around it"):
        kind(nn.Conv2d(4, 4, 3, padding=1, **other))


@torch.no_grad()
def test_what_is_packed_goes_where_the_weights_go(convolution, features):
    convolution(features)
    assert convolution.packed is not None
    assert convolution.double().packed is None
    assert torch.equal(convolution(features.double()), convolution.plainly(features.double()))


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


@torch.no_grad()
def test_it_is_copied_pickled_and_saved_as_the_convolution_that_it_was(kind, features):
    plain = plain_convolution()
    convolution = kind(plain)
    expected = convolution(features)  # with its weights packed by now
    for other in (copy.deepcopy(convolution), pickle.loads(pickle.dumps(convolution))):
        assert torch.equal(other(features), expected)
    assert convolution.weight is plain.weight
    assert convolution.state_dict().keys() == plain.state_dict().keys()


def test_gradients_autocast_compilers_and_other_types_meet_any_convolution(convolution, features):
    convolution.requires_grad_(True)
    features.requires_grad_(True)
    expected = convolution.plainly(features)
    assert torch.equal(convolution(features), expected)
    convolution(features).sum().backward()
    assert features.grad.norm() > 0
    with torch.no_grad():
        assert torch.equal(torch.compile(convolution, backend="eager", fullgraph=True)(features), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing is deprecated
            assert torch.equal(torch.jit.trace(convolution, features)(features), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert convolution(mode.from_tensor(features.detach())).shape == expected.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(convolution(features), convolution.plainly(features))
        assert torch.equal(torch.func.vmap(convolution)(features[None])[0], expected)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # by `flags`, which sets what is not there
@torch.no_grad()
def test_without_onednn_or_its_operators_it_is_any_convolution(convolution, features, monkeypatch):
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(convolution(features), convolution.plainly(features))
    module = int8 if isinstance(convolution, Int8Conv2d) else winograd
    for name in ("PACK", "CONVOLVE"):
        with monkeypatch.context() as context:
            context.setattr(module, name, None)
            assert torch.equal(convolution(features), convolution.plainly(features))
