"""Decoding by the kernel in C beside `Decoder`, and when it is left to that."""

import copy

import pytest
import torch
from enlarged_priors import make_prior, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prior import fused
from prior.decoding import Decoder
from prior.fused import FusedDecoder, decoder_of
from prior.transformer import Transformer
from tokenizer import kernels
from tokenizer.processor import CAPABILITIES

PLACES = torch.cartesian_prod(torch.arange(5), torch.arange(9))  # (45, 2): groups of the cache, and one begun
BUILDS = {name: kernels.library(name) for name in ("avx2", "avx512") if CAPABILITIES.get(name.replace("512", "512_f"))}
BUILDS = {name: library for name, library in BUILDS.items() if library is not None}

pytestmark = pytest.mark.skipif(fused.LIBRARY is None, reason="the kernels were not built")


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch) -> str:
    monkeypatch.setattr(kernels, "LIBRARY", BUILDS[request.param])
    return request.param


def network(
    heads: int, head_width: int, layers: int, vocab_size: int, std: float = 0.5
) -> tuple[Transformer, nn.Linear]:
    """A transformer and its head, with weights so large that a mistake is not lost in the residual stream."""
    torch.manual_seed(heads)
    transformer = Transformer(heads * head_width, layers, heads, dropout=0.0).eval().requires_grad_(False)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=std if parameter.ndim == 1 else std / parameter.shape[1] ** 0.5)
    return transformer, nn.Linear(heads * head_width, vocab_size, bias=False).requires_grad_(False)


def decoded(kind: type, transformer: Transformer, head: nn.Linear, hidden: Tensor, first: int = 0) -> Tensor:
    """Logits (B, T, V) of inputs (B, T, W), those before the first by a pass over all of them."""
    decoder = kind(transformer, head, PLACES)
    caches = decoder.caches(len(hidden))
    if first:
        transformer(hidden[:, :first], PLACES[:first], caches)
    return torch.stack([decoder.logits(hidden[:, i], i, caches) for i in range(first, hidden.shape[1])], dim=1)


@pytest.mark.parametrize("name", BUILDS)
@given(
    sizes=st.sampled_from([(2, 8), (4, 4), (2, 24), (2, 40), (4, 32), (1, 48), (1, 256), (3, 16)]),
    layers=st.integers(1, 3),
    vocab_size=st.integers(1, 150),
    batch=st.integers(1, 21),
    first=st.sampled_from([0, 1, 15, 16, 17, 33]),
    length=st.integers(1, 12),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_it_decodes_as_the_reference_does(name, sizes, layers, vocab_size, batch, first, length, size):
    transformer, head = network(*sizes, layers, vocab_size)
    hidden = size * torch.randn(batch, first + length, head.in_features)
    expected = decoded(Decoder, transformer, head, hidden, first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LIBRARY", BUILDS[name])
        found = decoded(FusedDecoder, transformer, head, hidden, first)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("first", [0, 20])
@pytest.mark.parametrize("batch", [1, 6])
def test_in_bfloat16_it_is_nearer_to_float32_than_the_reference(build, batch, first):
    transformer, head = (part.bfloat16() for part in network(4, 24, 2, 70))
    hidden = torch.randn(batch, len(PLACES), 96).bfloat16()
    found, rounded = (decoded(kind, transformer, head, hidden, first) for kind in (FusedDecoder, Decoder))
    exact = decoded(Decoder, transformer.float(), head.float(), hidden.float(), first)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.7 * (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_whatever_the_others_and_the_threads(build, dtype):
    transformer, head = (part.to(dtype) for part in network(4, 24, 2, 70))
    hidden = torch.randn(37, 20, 96).to(dtype)
    whole = decoded(FusedDecoder, transformer, head, hidden)
    for rows in (slice(0, 1), slice(3, 5), slice(5, 8), slice(20, 37)):
        assert torch.equal(decoded(FusedDecoder, transformer, head, hidden[rows]), whole[rows])
    torch.set_num_threads(3)
    try:
        assert torch.equal(decoded(FusedDecoder, transformer, head, hidden), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", range(9))  # of the parameters of a block, and the last norm
def test_damaged_weights_give_logits_that_are_not_finite(build, index, damage, dtype):
    transformer, head = (part.to(dtype) for part in network(2, 16, 1, 5))
    list(transformer.parameters())[index].view(-1)[0] = damage
    logits = decoded(FusedDecoder, transformer, head, torch.randn(2, 3, 32).to(dtype))
    assert not logits.isfinite().all(dim=2).any()


def test_scores_far_apart_leave_the_largest_alone(build):
    transformer, head = network(2, 16, 1, 5)
    for norm in (transformer.blocks[0].attention.query_norm, transformer.blocks[0].attention.key_norm):
        norm.weight.fill_(100.0)
    hidden = torch.randn(2, 30, 32)
    found, expected = (decoded(kind, transformer, head, hidden) for kind in (FusedDecoder, Decoder))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # an error of 1e-7 in a score of 1e4


def test_generate_draws_the_same_grids_with_and_without_the_kernels(build, monkeypatch):
    prior = make_prior(vocab_size=7, grid_size=[3, 4])
    settings = {"labels": [0, 1, 0, 1, 1], "guidance_scale": 1.5}
    by_kernel = prior.generate(generator=seeded(), **settings)
    monkeypatch.setattr(fused, "LIBRARY", None)
    assert isinstance(decoder_of(prior.transformer, prior.head, PLACES), Decoder)
    assert torch.equal(prior.generate(generator=seeded(), **settings), by_kernel)


def test_what_the_kernel_does_not_know_is_left_to_the_reference():
    transformer, head = network(2, 16, 1, 5)

    def kind(*parts: nn.Module) -> type:
        return type(decoder_of(*parts, PLACES.to(parts[0].norm.weight.device)))

    assert kind(transformer, head) is FusedDecoder
    assert kind(copy.deepcopy(transformer).double(), copy.deepcopy(head).double()) is Decoder
    assert kind(copy.deepcopy(transformer).half(), copy.deepcopy(head).half()) is Decoder
    assert kind(copy.deepcopy(transformer).to("meta"), copy.deepcopy(head).to("meta")) is Decoder
    assert kind(*network(3, 8, 1, 5)) is Decoder
    assert kind(*network(1, 272, 1, 5)) is Decoder
    with torch.autocast("cpu", torch.bfloat16):
        assert kind(transformer, head) is Decoder


def test_halves_are_for_the_build_that_multiplies_them(build):
    transformer, head = (part.bfloat16() for part in network(2, 16, 1, 5))
    halves = FusedDecoder(transformer, head, PLACES).shape.halves
    assert halves == (build == "avx512" and CAPABILITIES["avx512_bf16"])


def test_more_positions_than_there_are_places_are_refused(build):
    transformer, head = network(2, 16, 1, 5)
    decoder = FusedDecoder(transformer, head, PLACES[:2])
    with pytest.raises(ValueError, match="3 positions are more than the cache was made for, 2"):
        decoder.logits(torch.zeros(1, 32), 2, decoder.caches(1))
