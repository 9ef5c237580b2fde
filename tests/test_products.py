"""Products by oneDNN beside PyTorch's own, and when they are not oneDNN's."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from tokenizer import products
from tokenizer.products import FEWEST_ROWS, linear, product

pytestmark = pytest.mark.usefixtures("however_few")
sides = st.integers(1, 40)


@pytest.fixture(scope="module")
def however_few():
    """With gradients, too, products go to oneDNN whether that pays or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "FEWEST_PRODUCTS", 0)
        yield


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the left matrices that oneDNN, or what stands for it, is given."""
    seen, plain = [], products.ONEDNN_LINEAR or (lambda left, right, *_: left @ right.t())
    monkeypatch.setattr(products, "ONEDNN_LINEAR", lambda left, *rest: seen.append(left.shape) or plain(left, *rest))
    return seen


@given(rows=sides, depth=sides, columns=sides, left_turned=st.booleans(), right_turned=st.booleans())
def test_it_is_the_product_however_the_matrices_lie_in_memory(rows, depth, columns, left_turned, right_turned):
    generator = torch.Generator().manual_seed(rows)
    left, right = (torch.randn(shape, generator=generator) for shape in ((rows, depth), (depth, columns)))
    expected = (left.double() @ right.double()).float()
    left = left.T.contiguous().T if left_turned else left
    right = right.T.contiguous().T if right_turned else right
    found = product(left, right)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_larger_matrices_are_taken_as_they_lie():
    wide = torch.randn(20, 30)
    torch.testing.assert_close(product(wide[::2, 5:15], wide[3:13, ::3]), wide[::2, 5:15] @ wide[3:13, ::3])


def test_float32_goes_to_onednn_but_where_there_are_few_rows(calls):
    right = torch.randn(3, 5)
    for rows in (1, FEWEST_ROWS - 1, FEWEST_ROWS, 50):
        product(torch.randn(rows, 3), right)
    assert calls == [(FEWEST_ROWS, 3), (50, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_autocast_are_left_to_pytorch(calls, dtype):
    left, right = torch.randn(8, 3), torch.randn(3, 5)
    assert torch.equal(product(left.to(dtype), right.to(dtype)), left.to(dtype) @ right.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert product(left, right).dtype == torch.bfloat16
    assert calls == []


def test_gradients_and_those_of_gradients_are_those_in_float64(calls):
    left, right = torch.randn(8, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    towards = torch.randn(8, 6)
    found, expected = [], []
    for times, dtype, into in [(product, torch.float32, found), (torch.matmul, torch.float64, expected)]:
        factors = [factor.detach().to(dtype).requires_grad_() for factor in (left, right)]
        loss = (times(*factors).sin() * towards.to(dtype)).sum()
        first = torch.autograd.grad(loss, factors, create_graph=True)
        into += [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), factors)]
    assert len(calls) > 3  # forward, both gradients, and theirs
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4)


@given(shape=st.lists(st.integers(1, 5), max_size=4), columns=sides)
def test_a_linear_layer_takes_inputs_of_any_shape_and_only_the_gradients_that_are_wanted(shape, columns):
    inputs, weight = (torch.randint(-9, 10, size).float() for size in ((*shape, 3), (columns, 3)))  # sums are exact
    assert torch.equal(linear(inputs, weight), torch.nn.functional.linear(inputs, weight))
    for wanted, other in [(inputs, weight), (weight, inputs)]:
        wanted.requires_grad_()
        (found,) = torch.autograd.grad(linear(inputs, weight).sum(), wanted)
        expected = (
            (torch.ones(*shape, columns) @ other)
            if wanted is inputs
            else other.reshape(-1, 3).sum(0).expand(columns, 3)
        )
        assert torch.equal(found, expected)
        wanted.requires_grad_(False)


def test_with_gradients_few_products_are_left_to_pytorch_and_only_what_they_need_is_kept(calls, monkeypatch):
    inputs, weight, kept = torch.randn(8, 3), torch.randn(5, 3, requires_grad=True), []
    monkeypatch.setattr(products, "FEWEST_PRODUCTS", 8 * 5 * 3 + 1)
    linear(inputs, weight)
    assert calls == []
    monkeypatch.setattr(products, "FEWEST_PRODUCTS", 8 * 5 * 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda it: it):
        linear(inputs, weight)
        linear(inputs.requires_grad_(), weight.detach())
    assert kept == [(8, 3), (5, 3)]
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_other_kinds_of_tensors_and_traces_are_left_to_pytorch(calls):
    inputs, weight = torch.randn(8, 3), torch.randn(5, 3)
    with suppress(RuntimeError):
        linear(inputs, weight.to("meta"))
    torch.testing.assert_close(
        torch.jit.trace(linear, (inputs, weight), check_trace=False)(inputs, weight), inputs @ weight.T
    )
    torch.testing.assert_close(linear(inputs, weight.to_sparse()), inputs @ weight.T)
    assert calls == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by forward_ad
def test_transforms_of_functions_and_tangents_are_left_to_pytorch(calls):
    inputs, weight, towards = torch.randn(4, 8, 3), torch.randn(5, 3), torch.randn(5, 3)

    def loss(weight, inputs):
        return linear(inputs, weight).square().sum()

    per_batch = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, inputs)
    expected = torch.stack([2 * (each @ weight.T).T @ each for each in inputs])
    torch.testing.assert_close(per_batch, expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(linear(inputs, forward_ad.make_dual(weight, towards))).tangent
    torch.testing.assert_close(found, inputs @ towards.T)
    assert calls == []


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # by `flags`, which sets what is not there
def test_what_onednn_is_not_asked_for_is_pytorchs_own(calls):
    with torch.backends.mkldnn.flags(enabled=False):
        product(torch.randn(8, 3), torch.randn(3, 5))
    assert torch.equal(product(torch.randn(8, 0), torch.randn(0, 5)), torch.zeros(8, 5))
    with pytest.raises(RuntimeError, match="8x3 and 4x5"):
        product(torch.randn(8, 3), torch.randn(4, 5))
    assert calls == []


def test_without_onednn_it_is_pytorchs_own(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN_LINEAR", None)
    left, right = torch.randn(8, 3), torch.randn(3, 5)
    assert torch.equal(product(left, right), left @ right)
