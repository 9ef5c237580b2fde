"""The exact search for the nearest code: right, in bounded memory, and of each vector by itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

from tokenizer.quantizers import search
from tokenizer.quantizers.search import first_maxima, nearest_codes

SIZES = ("SCORES_PER_TILE", "CODES_PER_TILE", "CODES_PER_WINDOW")


@contextmanager
def sized(*sizes: int) -> Iterator[None]:
    """Tiles and windows of these sizes inside the block."""
    whole = [getattr(search, name) for name in SIZES]
    for name, size in zip(SIZES, sizes, strict=True):
        setattr(search, name, size)
    try:
        yield
    finally:
        for name, size in zip(SIZES, whole, strict=True):
            setattr(search, name, size)


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """The plain ones, (N, K) float64."""
    return (vectors[:, None].double() - codes[None].double()).square().sum(-1)


@settings(max_examples=60, deadline=None)
@given(
    num_vectors=st.integers(1, 50),
    num_codes=st.integers(2, 70),
    dim=st.integers(1, 9),
    tile=st.integers(70, 400),
    part=st.integers(1, 70),
    window=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_the_search_equals_the_plain_one_in_tiles_of_any_size(num_vectors, num_codes, dim, tile, part, window, seed):
    vectors, codes = random(seed, (num_vectors, dim), (num_codes, dim))
    with sized(tile, part, window):
        found = nearest_codes(vectors, codes)
    assert found.dtype == torch.int64
    plain = distances(vectors, codes)
    best = plain.min(1).values
    torch.testing.assert_close(plain[torch.arange(num_vectors), found], best, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(num_codes=st.integers(2, 70), part=st.integers(1, 70), window=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_tie_goes_to_the_lowest_index_across_windows_and_tiles(num_codes, part, window, seed):
    """Small whole numbers, whose distances are exact, so that nearly every vector has several nearest codes."""
    generator = torch.Generator().manual_seed(seed)
    vectors, codes = (torch.randint(-2, 3, (size, 2), generator=generator).float() for size in (30, num_codes))
    plain = distances(vectors, codes)
    with sized(400, part, window):
        found = nearest_codes(vectors, codes)
    lowest = (plain == plain.min(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(found, lowest)


def test_as_used_it_equals_the_plain_search_over_several_tiles_of_codes_and_of_vectors():
    vectors, codes = random(0, (700, 3), (5000, 3))
    assert torch.equal(nearest_codes(vectors, codes), distances(vectors, codes).argmin(1))


@pytest.mark.parametrize("number", [1, 2, 11, 15, 16, 17, 255, 256, 257, 300])
def test_the_code_of_a_vector_does_not_depend_on_the_number_of_others(number):
    """Codes so near to each other that the last bit of a score decides."""
    vectors, offsets, centre = random(0, (600, 8), (3000, 8), (1, 8))
    codes = centre + 1e-7 * offsets
    assert torch.equal(nearest_codes(vectors[:number], codes), nearest_codes(vectors, codes)[:number])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_no_number_gets_some_code_and_spoils_no_other(bad):
    vectors, codes = random(0, (40, 4), (3000, 4))
    expected = nearest_codes(vectors, codes)
    vectors[7, 2] = bad
    found = nearest_codes(vectors, codes)
    assert 0 <= found[7] < 3000
    assert torch.equal(torch.cat([found[:7], found[8:]]), torch.cat([expected[:7], expected[8:]]))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 40), window=st.integers(1, 25), seed=st.integers(0, 99))
def test_first_maxima_are_those_of_each_window_of_rows(rows, columns, window, seed):
    scores = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    values, places = first_maxima(scores, window)
    for index, part in enumerate(scores.split(window)):
        assert torch.equal(values[index], part.max(0).values)
        assert torch.equal(places[index], (part == values[index]).int().argmax(0) + index * window)
    assert len(values) == len(places) == -(-rows // window)


@pytest.mark.parametrize(("num_vectors", "num_codes"), [(5000, 4096), (3, 70_000), (20_000, 2), (1, 2)])
def test_the_search_never_holds_all_scores(num_vectors, num_codes):
    given = random(0, (num_vectors, 2), (num_codes, 2))
    with LargestTensor() as largest:
        nearest_codes(*given)
    assert largest.numbers <= search.SCORES_PER_TILE


def test_on_other_devices_chunks_hold_all_codes(monkeypatch):
    """As on a GPU, where it cannot run here: the meta device knows the shapes."""
    sizes, plain = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kw: sizes.append((out := plain(*args, **kw)).shape) or out)
    found = nearest_codes(torch.empty(50_000, 2, device="meta"), torch.empty(4096, 2, device="meta"))
    assert (found.shape, found.dtype) == ((50_000,), torch.int64)
    assert {tuple(size) for size in sizes} == {(2**14, 4096), (50_000 - 3 * 2**14, 4096)}
