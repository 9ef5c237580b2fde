"""Group norm and SiLU by the kernel beside PyTorch's operators in float64."""

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from processes import printed_by_lesser
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer import normalisation
from tokenizer.kernels import LANES
from tokenizer.normalisation import activated, is_for_kernel

pytestmark = pytest.mark.skipif(not LANES, reason="the kernels were not built here")


def norm_of(channels: int, groups: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def exactly(norm: nn.GroupNorm, features: Tensor) -> Tensor:
    given = features.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
    return F.silu(F.group_norm(*given))


@given(
    batch=st.integers(1, 3),
    vectors=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 8, LANES]),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 30)),
    mean=st.sampled_from([0.0, 1e3]),
    size=st.sampled_from([1e-2, 1.0, 30.0]),
    in_planes=st.booleans(),
)
def test_it_is_group_norm_and_silu_and_so_are_its_gradients(batch, vectors, groups, sides, mean, size, in_planes):
    torch.manual_seed(vectors)
    channels = vectors * LANES
    norm, features = norm_of(channels, groups), mean + size * torch.randn(batch, channels, *sides)
    if not in_planes:
        features = features.contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    assume(features.numel() > batch * groups)
    assert is_for_kernel(norm, features)
    found, expected = activated(norm, features), exactly(norm, features)
    # A float32 around `mean` is `mean` * 2**-24 off, which matters as far as numbers lie near to each other.
    spread = features.detach().unflatten(1, (groups, -1)).flatten(2).std(2, correction=0).min().item()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * max(1.0, mean / max(spread, 1e-3)))
    inputs, towards = [features, *norm.parameters()], torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards.double())
    for scale, by_kernel, exact in zip((1 / max(spread, 1e-3), 1.0, 1.0), *gradients, strict=True):
        assert by_kernel.dtype == torch.float32
        error = 1e-5 * max(1.0, mean / max(spread, 1e-3)) * max(scale, exact.abs().max().item())
        torch.testing.assert_close(by_kernel.double(), exact.double(), rtol=1e-4, atol=error)


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_any_of_them_may_want_gradients(wanted):
    norm, features = norm_of(LANES, 2), torch.randn(2, LANES, 5, 5).requires_grad_(wanted[0])
    norm.weight, norm.bias = (nn.Parameter(torch.randn(2 * LANES)[::2], want) for want in wanted[1:])
    found, expected = activated(norm, features), exactly(norm, features)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    chosen = [tensor for tensor in (features, norm.weight, norm.bias) if tensor.requires_grad]
    if chosen:
        gradients = (torch.autograd.grad(each.square().sum(), chosen) for each in (found, expected))
        for by_kernel, exact in zip(*gradients, strict=True):
            torch.testing.assert_close(by_kernel, exact, rtol=1e-4, atol=1e-4)


def test_what_is_too_much_for_the_cache_is_written_past_it_and_the_same():
    norm, features = norm_of(LANES, 2), torch.randn(1, LANES, 2**15 // LANES, 130, requires_grad=True)
    assert features.numel() > 2**22
    found, expected = activated(norm, features), exactly(norm, features)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    towards = torch.randn_like(found)
    gradient, exact = (torch.autograd.grad(each, features, towards.to(each.dtype))[0] for each in (found, expected))
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 5, 255])
def test_an_odd_place_does_not_drown_the_others(place):
    norm, features = norm_of(LANES, LANES // 4), 1e-3 * torch.randn(1, LANES, 16, 16)
    features.flatten(2)[:, :, place] = 5.3
    torch.testing.assert_close(activated(norm, features).double(), exactly(norm, features), rtol=1e-6, atol=2e-6)


def test_silu_is_right_at_its_ends_and_carries_on_what_is_not_finite():
    norm = nn.GroupNorm(LANES, LANES, eps=0.0)
    values = torch.tensor([-1e4, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e30])
    for value in values:
        norm.bias.data.fill_(value)
        found = activated(norm.requires_grad_(False), torch.tensor([-1.0, 1.0]).expand(1, LANES, 1, 2))
        expected = F.silu(value.double() + torch.tensor([-1.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(found[0, 0, 0].double(), expected, rtol=1e-6, atol=1e-33)
    norm = nn.GroupNorm(LANES, LANES)
    for value in (math.nan, math.inf):
        features = torch.zeros(2, LANES, 3, 3)
        features[1, 0, 1, 1] = value
        found = activated(norm, features)
        assert found[1, 0].isnan().all()
        assert found[1, 1:].isfinite().all()


def test_no_picture_depends_on_those_beside_it_nor_on_gradients_nor_threads():
    norm, features = norm_of(2 * LANES, 4), torch.randn(3, 2 * LANES, 20, 20)
    inputs, towards = [features.requires_grad_(), *norm.parameters()], torch.randn_like(features)
    with torch.no_grad():
        expected, before = activated(norm, features), torch.get_num_threads()
    assert torch.equal(activated(norm, features), expected)
    first = torch.autograd.grad(activated(norm, features), inputs, towards)
    alone = activated(norm, features[1:2])
    assert torch.equal(alone, expected[1:2])
    assert torch.equal(torch.autograd.grad(alone, features, towards[1:2])[0][1:2], first[0][1:2])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found = activated(norm, features)
            assert torch.equal(found, expected)
            assert all(map(torch.equal, torch.autograd.grad(found, inputs, towards), first))
        finally:
            torch.set_num_threads(before)


def test_gradients_of_gradients_and_many_at_once_are_those_of_pytorch():
    norm, features = norm_of(LANES, 2), torch.randn(2, LANES, 6, 5, requires_grad=True)
    inputs, seconds, many = [features, *norm.parameters()], [], []
    for norm_and_silu in (activated, lambda norm, features: F.silu(norm(features))):
        result = norm_and_silu(norm, features)
        (first,) = torch.autograd.grad(result.square().sum(), features, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), inputs))
        result = norm_and_silu(norm, features)
        many.append(torch.autograd.grad(result, inputs, torch.ones(2, *result.shape), is_grads_batched=True))
    for found, expected in zip(seconds[0] + many[0], seconds[1] + many[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_only_what_is_spare_is_written_over():
    norm = norm_of(LANES, 2).requires_grad_(False)
    features = torch.randn(1, LANES, 5, 5).contiguous(memory_format=torch.channels_last)
    before = features.clone()
    expected = activated(norm, features)
    assert torch.equal(features, before)
    found = activated(norm, features, spare=True)
    assert torch.equal(found, expected)
    assert found.data_ptr() == features.data_ptr()
    features.copy_(before).requires_grad_()
    assert torch.equal(activated(norm, features, spare=True), expected)
    assert torch.equal(features, before)


def test_float32_is_so_under_autocast_too():
    norm, features = norm_of(LANES, 2), torch.randn(1, LANES, 5, 5)
    expected = activated(norm, features)
    with torch.autocast("cpu", torch.bfloat16):
        found = activated(norm, features)
        assert torch.equal(found, expected)
        assert F.silu(norm(features)).dtype == torch.float32
        assert not is_for_kernel(norm, features.bfloat16())
    first, second = (torch.autograd.grad(each.square().sum(), norm.weight)[0] for each in (found, expected))
    assert torch.equal(first, second)


def test_who_hooks_a_norm_is_called_and_what_is_no_plain_norm_is_left_to_pytorch():
    class Doubled(nn.GroupNorm):
        def forward(self, features: Tensor) -> Tensor:
            return 2 * super().forward(features)

    norm, features, seen = norm_of(LANES, 2), torch.randn(1, LANES, 5, 5), []
    hook = norm.register_forward_hook(lambda *given: seen.append(given[2]))
    assert torch.equal(activated(norm, features), F.silu(seen[0]))
    hook.remove()
    unbiased = nn.GroupNorm(2, LANES)
    unbiased.bias = None
    for other in (Doubled(2, LANES), nn.GroupNorm(2, LANES, affine=False), unbiased):
        assert torch.equal(activated(other, features), F.silu(other(features)))
    whole = nn.GroupNorm(2, LANES, eps=0)
    torch.testing.assert_close(activated(whole, features), F.silu(whole(features)))


def test_other_types_and_widths_are_left_to_pytorch():
    norm, features = norm_of(LANES, 2), torch.randn(1, LANES, 5, 5)
    assert is_for_kernel(norm, features)
    assert not is_for_kernel(norm_of(LANES + 4, 2), torch.randn(1, LANES + 4, 5, 5))
    assert not is_for_kernel(norm, features[0])
    assert not is_for_kernel(norm, features[:0])
    assert not is_for_kernel(norm_of(LANES, LANES), features[:, :, :1, :1])
    assert not is_for_kernel(norm, features.double())
    assert not is_for_kernel(norm_of(LANES, 2).bfloat16(), features)
    expected = F.silu(norm(features))
    assert not torch.equal(activated(norm, features), expected)  # else nothing here would test the kernel,
    assert torch.equal(activated(norm, features), activated(norm.eval(), features))  # which knows no training
    assert torch.equal(torch.compile(activated, backend="eager", fullgraph=True)(norm, features), expected)


LESSER = """
import torch
from tokenizer.kernels import LANES
from tokenizer.normalisation import activated, is_for_kernel
torch.manual_seed(0)
norm, features = torch.nn.GroupNorm(4, 40), 3 * torch.randn(2, 40, 20, 30, requires_grad=True)
assert LANES == 8 and is_for_kernel(norm, features)
exact = torch.nn.functional.group_norm(features.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
inputs, results = [features, *norm.parameters()], (activated(norm, features), torch.nn.functional.silu(exact))
ours, theirs = ((result, *torch.autograd.grad(result.square().sum(), inputs)) for result in results)
print(*(((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs)))
"""


def test_the_kernels_for_lesser_processors_are_as_exact():
    errors = printed_by_lesser(LESSER)
    assert len(errors) == 4
    assert max(errors) < 2e-6


def test_where_the_kernels_were_not_built_it_is_as_pytorch_has_it(monkeypatch):
    monkeypatch.setattr(normalisation, "LANES", 0)
    norm, features = norm_of(LANES, 2), torch.randn(1, LANES, 5, 5)
    assert torch.equal(activated(norm, features), F.silu(norm(features)))
