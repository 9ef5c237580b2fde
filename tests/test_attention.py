"""Attention of one head beside float64, its gradients, and when it is by the kernel."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import printed_by_lesser
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenizer import attention, processor
from tokenizer.attention import PLAIN_PLACES, attend, is_for_kernel, plainly
from tokenizer.kernels import LANES, LIBRARY

BUILT = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built here")
UNIT = LANES or 16


@pytest.fixture
def given_parts() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 5 * UNIT, 2 * UNIT) for _ in range(3)]


def exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The reference, in the type that is given."""
    return (query @ key.mT / query.shape[2] ** 0.5).softmax(dim=2) @ value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("places", [1, 6, PLAIN_PLACES + 1])
def test_without_the_kernel_it_is_that_in_float64_up_to_rounding(places, dtype, tolerance):
    torch.manual_seed(0)
    rounded = [torch.randn(2, 8, places, dtype=dtype).mT.requires_grad_() for _ in range(3)]
    assert not is_for_kernel(*rounded)
    exact = [each.detach().double().requires_grad_() for each in rounded]
    expected, found = exactly(*exact), attend(*rounded)
    towards = torch.randn_like(found)
    gradients = torch.autograd.grad(found, rounded, towards), torch.autograd.grad(expected, exact, towards.double())
    for mine, reference in [(found, expected), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(mine.double(), reference, rtol=tolerance, atol=tolerance)


@BUILT
@given(
    batch=st.integers(1, 4),
    places=st.integers(1, 9),
    channels=st.integers(1, 5),
    size=st.sampled_from([0.1, 1.0, 3.0]),
    turned=st.booleans(),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_it_is_that_in_float64_and_so_are_its_gradients(batch, places, channels, size, turned, wanted):
    torch.manual_seed(places)
    shape = (batch, places * LANES, channels * LANES)
    parts = [size * torch.randn(shape) for _ in range(3)]
    if turned:
        parts = [part.mT.contiguous().mT for part in parts]
    for part, want in zip(parts, wanted, strict=True):
        part.requires_grad_(want)
    assert is_for_kernel(*parts)
    found, expected = attend(*parts), exactly(*(part.double() for part in parts))
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    inputs = [part for part in parts if part.requires_grad]
    if inputs:
        towards = torch.randn_like(found)
        gradients = torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards.double())
        largest = max(exact.norm() for exact in gradients[1])
        for mine, exact in zip(*gradients, strict=True):
            assert (mine - exact).norm() <= 1e-5 * exact.norm() + 1e-6 * largest  # some cancel out


@BUILT
def test_no_place_depends_on_the_pictures_beside_it_nor_on_gradients_nor_threads():
    torch.manual_seed(0)
    given_parts = [
        torch.randn(3, 20 * UNIT, 8 * UNIT) for _ in range(3)
    ]  # more than one block, and long enough to meet
    expected = attend(*given_parts)
    assert not torch.equal(expected, plainly(*given_parts))  # else nothing here would test the kernel
    for picture in range(3):
        assert torch.equal(attend(*(part[picture:][:1] for part in given_parts)), expected[picture:][:1])
    towards, gradients, threads = torch.randn_like(expected), [], torch.get_num_threads()
    for part in given_parts:
        part.requires_grad_()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            found = attend(*given_parts)
            gradients.append(torch.autograd.grad(found, given_parts, towards))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found, expected)
        assert all(map(torch.equal, gradients[-1], gradients[0]))


@BUILT
def test_gradients_of_gradients_and_many_at_once_are_those_of_the_reference(given_parts):
    for part in given_parts:
        part.requires_grad_()
    results = []
    for form in (attend, plainly):
        result = form(*given_parts)
        (first,) = torch.autograd.grad(result.square().sum(), given_parts[:1], create_graph=True)
        second = torch.autograd.grad(first.square().sum(), given_parts)
        towards = torch.ones(2, *result.shape) * torch.arange(1, 3)[:, None, None, None]
        many = torch.autograd.grad(form(*given_parts).square(), given_parts, towards, is_grads_batched=True)
        results.append([*second, *many])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@BUILT
def test_what_is_odd_empty_or_of_another_type_is_left_to_the_reference(given_parts):
    assert is_for_kernel(*given_parts)
    assert not is_for_kernel(*(part[:, 1:] for part in given_parts))
    assert not is_for_kernel(*(part[:, :, 1:] for part in given_parts))
    assert not is_for_kernel(*(part[:0] for part in given_parts))
    assert not is_for_kernel(*(part[0] for part in given_parts))
    assert not is_for_kernel(given_parts[0][:, :LANES], *given_parts[1:])
    assert not is_for_kernel(*(part.double() for part in given_parts))
    assert not is_for_kernel(*given_parts[:2], given_parts[2].bfloat16())


@BUILT
@torch.no_grad()
def test_compilers_transforms_and_other_tensors_meet_the_reference(given_parts):
    expected = plainly(*given_parts)
    assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(*given_parts), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attend(*map(mode.from_tensor, given_parts)).shape == expected.shape
    assert torch.equal(torch.func.vmap(attend)(*(part[None] for part in given_parts))[0], expected)


@BUILT
@torch.no_grad()
def test_what_is_not_finite_stays_in_its_picture(given_parts):
    given_parts[1][1, 0, 0] = math.nan
    found = attend(*given_parts).isfinite()
    assert found[0].all()
    assert not found[1].any()
    assert found[2].all()


@BUILT
@torch.no_grad()
def test_large_scores_do_not_overflow(given_parts):
    query, key, value = given_parts
    found = attend(1e4 * query, 1e4 * key, value)
    torch.testing.assert_close(found, exactly(1e4 * query.double(), 1e4 * key.double(), value.double()).float())
    key = torch.zeros(1, 16 * UNIT, UNIT)
    key[:, -1] = 1e4  # the largest score is the last one
    value = torch.randn(1, 16 * UNIT, UNIT)
    assert torch.equal(attend(torch.ones_like(key), key, value), value[:, -1:].expand_as(value))


@BUILT
@pytest.mark.parametrize("faster", [False, True])
def test_autocast_rounds_only_where_bfloat16_is_faster(given_parts, faster, monkeypatch):
    monkeypatch.setattr(processor, "bfloat16_is_faster", lambda: faster)
    in_float32 = attend(*given_parts)
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = attend(*given_parts), plainly(*given_parts)
    assert torch.equal(found, rounded if faster else in_float32)


LESSER = """
import torch
from tokenizer.attention import attend, is_for_kernel
from tokenizer.kernels import LANES
torch.manual_seed(0)
parts = [torch.randn(2, 72, 40, requires_grad=True) for _ in range(3)]
assert LANES == 8 and is_for_kernel(*parts)
exact = [part.double() for part in parts]
results = attend(*parts), (exact[0] @ exact[1].mT / 40**0.5).softmax(dim=2) @ exact[2]
ours, theirs = ((result, *torch.autograd.grad(result.square().sum(), parts)) for result in results)
print(*(((one - other).norm() / other.norm()).item() for one, other in zip(ours, theirs)))
"""


@BUILT
def test_the_kernel_for_lesser_processors_is_as_exact():
    errors = printed_by_lesser(LESSER)
    assert len(errors) == 4
    assert max(errors) < 2e-6


@BUILT
def test_where_the_kernels_were_not_built_it_is_the_reference(given_parts, monkeypatch):
    monkeypatch.setattr(attention, "LIBRARY", None)
    assert torch.equal(attend(*given_parts), plainly(*given_parts))
