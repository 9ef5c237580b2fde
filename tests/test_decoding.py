"""Decoding position by position beside whole passes. Shapes as in prior/decoding.py."""

import pytest
import torch
from torch import nn

from prior.decoding import Decoder
from prior.transformer import CACHE_GROWTH, KVCache, Transformer

PLACES = torch.cartesian_prod(torch.arange(5), torch.arange(9))  # (45, 2): more than the cache first reserves


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    transformer = Transformer(16, num_layers=3, num_heads=2, dropout=0.0).eval()
    for parameter in transformer.parameters():  # large weights, so that a mistake is not lost in the residual stream
        nn.init.normal_(parameter, std=0.5)
    return transformer


@pytest.mark.parametrize("first", [0, 1, 2, 31, 32, 33, 44])
@torch.no_grad()
def test_a_decoder_continues_a_pass_as_a_whole_pass_would(transformer, first):
    hidden, head = torch.randn(2, len(PLACES), 16), nn.Linear(16, 7, bias=False)
    caches, decoder = [KVCache(len(PLACES)) for _ in transformer.blocks], Decoder(transformer, head, PLACES)
    if first:
        transformer(hidden[:, :first], PLACES[:first], caches)
    found = [decoder.logits(hidden[:, i], i, caches) for i in range(first, len(PLACES))]
    expected = head(transformer(hidden, PLACES))[:, first:]
    torch.testing.assert_close(torch.stack(found, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.bfloat16)])
@pytest.mark.parametrize("first", [0, 2])
def test_in_bfloat16_the_cache_is_so_too_but_on_a_cpu(transformer, device, dtype, first):
    half, head = transformer.to(device, torch.bfloat16), nn.Linear(16, 7, bias=False).to(device, torch.bfloat16)
    hidden, places = torch.randn(2, 3, 16, device=device, dtype=torch.bfloat16), PLACES.to(device)
    caches, decoder = [KVCache(len(places)) for _ in half.blocks], Decoder(half, head, places)
    if first:
        half(hidden[:, :first], places[:first], caches)
    decoder.logits(hidden[:, first], first, caches)
    assert {cache.keys.dtype for cache in caches} == {cache.values.dtype for cache in caches} == {dtype}


def test_a_query_sees_what_the_cache_holds_and_nothing_of_what_is_reserved():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 3, CACHE_GROWTH + 2, 4)
    cache = KVCache(keys.shape[2])
    queries = torch.randn(6, 1, 4)
    for end in range(1, keys.shape[2] + 1):
        cache.append(keys[:, :, end - 1 : end], values[:, :, end - 1 : end])
        scores = queries @ keys[:, :, :end].flatten(0, 1).mT
        torch.testing.assert_close(cache.attend(queries), scores.softmax(dim=2) @ values[:, :, :end].flatten(0, 1))


def test_a_cache_stays_in_the_memory_that_it_begins_with():
    capacity = CACHE_GROWTH + 2
    cache, step, places = KVCache(capacity), torch.randn(2, 3, 1, 4), []
    for _ in range(capacity):
        cache.append(step, step)
        places.append((cache.keys.data_ptr(), cache.values.data_ptr()))
    assert len(set(places)) == 1
    assert cache.keys.untyped_storage().nbytes() == 2 * 3 * capacity * 4 * step.element_size()


def test_more_positions_than_a_cache_was_made_for_are_refused():
    cache, step = KVCache(2), torch.randn(2, 3, 1, 4)
    for _ in range(2):
        cache.append(step, step)
    with pytest.raises(ValueError, match="3 positions are more than the cache was made for, 2"):
        cache.append(step, step)
