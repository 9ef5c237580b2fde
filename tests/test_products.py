"""Products by oneDNN beside PyTorch's own, and when they are not oneDNN's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import products
from tokenizer.products import FEWEST_ROWS, product

sides = st.integers(1, 40)


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


def test_where_a_gradient_is_wanted_it_is_pytorchs_own(calls):
    left, right = torch.randn(8, 3, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    product(left, right).sum().backward()
    torch.testing.assert_close(left.grad, right.sum(1).expand(8, 3))
    torch.testing.assert_close(right.grad, left.sum(0)[:, None].expand(3, 5))
    assert calls == []
    with torch.no_grad():
        product(left, right)
    assert len(calls) == 1


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
