"""The contract of every quantizer in the table, the exact search, and what is special to the EMA codebook."""

import copy

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch.utils.checkpoint import checkpoint

from tokenizer import QUANTIZERS, ImageTokenizer
from tokenizer.quantizers import search
from tokenizer.quantizers.ema_vq import EMAVectorQuantizer, smoothed
from tokenizer.quantizers.search import nearest_codes

DIM = 4
BEFORE_ROUNDING = {
    "fsq": lambda quantizer, latents: quantizer.bound(latents) / 2,  # 4 levels in [-2, 1], their codes in [-1, 0.5]
    "bsq": lambda quantizer, latents: latents / latents.norm(dim=1, keepdim=True),
}


@pytest.fixture(params=sorted(QUANTIZERS))
def quantizer(request):
    torch.manual_seed(0)
    return QUANTIZERS[request.param](DIM)


def latents_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, DIM, 3, 5), generator=torch.Generator().manual_seed(seed))


def trained(quantizer, batches: int = 3):
    """The quantizer after a few training steps on random latents."""
    for seed in range(batches):
        quantizer.train()(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
    return quantizer


# The contract, over every member of the table.


def test_indices_decode_to_the_same_codes(quantizer):
    output = trained(quantizer).eval()(latents_of(9))
    assert torch.equal(quantizer.indices_to_codes(output.indices), output.quantized)


def test_shapes_types_and_range_are_those_of_the_contract(quantizer):
    output = quantizer(latents_of(1).to(torch.bfloat16))
    assert output.quantized.shape == (2, DIM, 3, 5)
    assert output.quantized.dtype == torch.float32
    assert output.indices.shape == (2, 3, 5)
    assert output.indices.dtype == torch.int64
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.vocab_size
    assert all(loss.ndim == 0 and loss.dtype == torch.float32 for loss in output.losses.values())


def test_the_gradient_is_that_of_what_is_rounded(quantizer, request):
    """The latents themselves, straight through, unless rounding is preceded by something that has a gradient."""
    latents, rounded = latents_of(1).requires_grad_(), latents_of(1).requires_grad_()
    direction = latents_of(2)
    (quantizer.train()(latents).quantized * direction).sum().backward()
    smooth = BEFORE_ROUNDING.get(request.node.callspec.params["quantizer"], lambda quantizer, latents: latents)
    (smooth(quantizer, rounded) * direction).sum().backward()
    torch.testing.assert_close(latents.grad, rounded.grad)


def test_indices_do_not_depend_on_autocast(quantizer):
    latents = latents_of(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(latents).indices
    assert torch.equal(inside, quantizer(latents).indices)


def test_eval_mode_moves_nothing(quantizer):
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(latents_of(1))
    quantizer.step()
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_a_discarded_step_leaves_no_trace(quantizer):
    quantizer.train()
    other = copy.deepcopy(trained(quantizer))
    quantizer(torch.full((2, DIM, 3, 5), torch.nan))
    quantizer.discard()
    for each in (quantizer, other):
        each(latents_of(7))
        each.step()
    assert all(torch.equal(other.state_dict()[name], value) for name, value in quantizer.state_dict().items())


def test_latents_that_are_not_numbers_have_indices_in_range_and_no_finite_loss_or_code(quantizer):
    output = trained(quantizer).train()(torch.full((2, DIM, 3, 5), torch.nan))
    assert output.indices.min() >= 0
    assert output.indices.max() < quantizer.vocab_size
    assert not output.quantized.isfinite().any()
    assert not any(loss.isfinite() for loss in output.losses.values())


def test_a_saved_tokenizer_gives_the_same_tokens_codes_and_pictures(quantizer, request, tmp_path):
    name = request.node.callspec.params["quantizer"]
    saved = ImageTokenizer(tiny_config(codebook_dim=DIM, quantizer={"name": name})).eval()
    saved.save_pretrained(tmp_path)
    loaded, images = ImageTokenizer.from_pretrained(tmp_path), torch.rand(2, 3, 8, 8)
    tokens = saved.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), saved.decode(tokens))
    assert torch.equal(loaded(images).reconstructions.clamp(0, 1), saved.decode(tokens))


def test_every_hyperparameter_has_a_default_and_bad_ones_are_refused(quantizer):
    type(quantizer)(DIM)
    with pytest.raises(ValueError, match="codebook_dim=0 must be at least 1"):
        type(quantizer)(0)


# The search.


@settings(max_examples=40, deadline=None)
@given(
    num_vectors=st.integers(1, 50),
    num_codes=st.integers(2, 70),
    dim=st.integers(1, 9),
    chunk=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_the_search_equals_the_plain_one_in_chunks_of_any_size(num_vectors, num_codes, dim, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors, codes = (torch.randn(n, dim, generator=generator) for n in (num_vectors, num_codes))
    distances = (vectors[:, None].double() - codes[None].double()).square().sum(-1)
    whole = search.DISTANCES_PER_CHUNK
    search.DISTANCES_PER_CHUNK = {"cpu": chunk}
    try:
        found = nearest_codes(vectors, codes)
    finally:
        search.DISTANCES_PER_CHUNK = whole
    best = distances.min(1).values
    torch.testing.assert_close(distances[torch.arange(num_vectors), found], best, rtol=1e-5, atol=1e-6)


def test_a_tie_goes_to_the_lowest_index():
    codes = torch.tensor([[5.0], [1.0], [1.0], [1.0]])
    assert nearest_codes(torch.tensor([[1.2]]), codes).tolist() == [1]


def test_the_search_never_holds_all_distances(monkeypatch):
    sizes = []
    plain = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kw: sizes.append((out := plain(*args, **kw)).numel()) or out)
    nearest_codes(torch.randn(5000, 2), torch.randn(4096, 2))
    assert max(sizes) <= search.DISTANCES_PER_CHUNK["cpu"]
    assert sum(sizes) == 5000 * 4096


# The EMA codebook.


def ema(**hyperparameters) -> EMAVectorQuantizer:
    torch.manual_seed(0)
    return EMAVectorQuantizer(DIM, **({"codebook_size": 16} | hyperparameters)).train()


@pytest.mark.parametrize("normalize", [False, True])
def test_each_code_is_the_sum_over_the_smoothed_count_after_every_kind_of_step(normalize):
    quantizer = ema(normalize=normalize, revival_threshold=0.5)
    for seed in range(6):  # placement, then moves and revivals
        quantizer(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
        expected = quantizer.ema_sum / smoothed(quantizer.ema_count)[:, None]
        if normalize:
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(quantizer.codebook, expected)
        assert quantizer.ema_count.min() > 0


def test_the_update_is_that_of_the_paper():
    quantizer = trained(ema(decay=0.9, revival_threshold=0.0))
    latents = latents_of(5, 2, DIM, 4, 4)
    count, total = quantizer.ema_count.clone(), quantizer.ema_sum.clone()
    indices = quantizer(latents).indices
    quantizer.step()
    for code in range(16):  # equations 6 to 8 of the appendix, a code at a time
        members = latents.movedim(1, -1)[indices == code]
        torch.testing.assert_close(quantizer.ema_count[code], 0.9 * count[code] + 0.1 * len(members))
        torch.testing.assert_close(quantizer.ema_sum[code], 0.9 * total[code] + 0.1 * members.sum(0))


def test_the_decay_rises_to_its_value():
    quantizer = trained(ema(decay=0.99, revival_threshold=0.0))
    for num_steps, decay in [(1, 1 - 1 / 10.1), (500, 1 - 1 / 60), (2000, 0.99)]:
        quantizer.num_steps.fill_(num_steps)
        before = quantizer.ema_count.clone()
        indices = quantizer(latents_of(5, 2, DIM, 4, 4)).indices
        quantizer.step()
        expected = decay * before + (1 - decay) * torch.bincount(indices.flatten(), minlength=16)
        torch.testing.assert_close(quantizer.ema_count, expected)


def test_one_step_at_decay_zero_is_one_step_of_lloyds_algorithm():
    data = torch.cat([latents_of(seed, 200, DIM) + 3 * seed for seed in range(4)])
    quantizer = trained(ema(decay=0.0, codebook_size=8, revival_threshold=0.0))
    start = data[::100].clone()
    quantizer.ema_count.fill_(1.0)
    quantizer.ema_sum.copy_(start * smoothed(quantizer.ema_count)[:, None])
    quantizer(data.T[None, :, :, None])
    quantizer.step()
    lloyd = KMeans(8, init=start.numpy(), n_init=1, max_iter=1).fit(data.numpy())
    torch.testing.assert_close(quantizer.codebook, torch.from_numpy(lloyd.cluster_centers_), rtol=1e-4, atol=1e-4)


def test_the_first_step_places_the_codes_among_the_data():
    quantizer = ema(codebook_size=64)
    centres = 10 * latents_of(0, 8, DIM)
    latents = (centres.repeat(64, 1) + 0.01 * latents_of(1, 512, DIM)).T.reshape(1, DIM, 16, 32)
    quantizer(latents)
    quantizer.step()
    distances = torch.cdist(quantizer.codebook, centres)
    assert distances.min(1).values.max() < 0.1  # every code near a cluster
    assert distances.min(0).values.max() < 0.1  # every cluster has a code


def test_until_the_codes_are_placed_training_passes_the_latents_on():
    quantizer = ema(placement=0.5)
    latents = latents_of(0, 4, DIM, 8, 8)
    for progress in (0.0, 0.25):
        output = quantizer.train()(latents)
        assert torch.equal(output.quantized, latents)
        assert output.losses["commitment"] == 0
        assert not quantizer.step(progress)
        assert not torch.equal(quantizer.eval()(latents).quantized, latents)
    quantizer.train()(latents)
    assert quantizer.step(0.5)  # the codes jumped
    output = quantizer(latents)
    assert torch.equal(output.quantized, quantizer.indices_to_codes(output.indices))
    assert not quantizer.step(0.75)


def test_a_code_that_nothing_chooses_is_moved_onto_the_data():
    quantizer = trained(ema(decay=0.5))
    quantizer.ema_sum[3] = 1e3 * quantizer.ema_count[3]  # far away from all data
    for seed in range(12):
        quantizer(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
    assert quantizer.codebook.norm(dim=1).max() < 10


def test_gradients_of_the_commitment_reach_the_latents_alone_and_scale_with_its_weight():
    latents = latents_of(1)
    gradients = []
    for weight in (0.25, 0.5):
        quantizer = trained(ema(commitment_weight=weight))
        given_latents = latents.clone().requires_grad_()
        output = quantizer(given_latents)
        output.losses["commitment"].backward()
        expected = 2 * weight * (latents - output.quantized.detach()) / latents.numel()
        torch.testing.assert_close(given_latents.grad, expected)
        gradients.append(given_latents.grad)
        assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


def test_normalized_codes_and_outputs_lie_on_the_unit_sphere():
    quantizer = trained(ema(normalize=True))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(quantizer.eval()(latents_of(1)).quantized.norm(dim=1), torch.ones(2, 3, 5))


def test_accumulated_batches_move_the_codes_as_one_batch():
    one, two = trained(ema(revival_threshold=0.0)), trained(ema(revival_threshold=0.0))
    latents = latents_of(5, 4, DIM, 4, 4)
    one(latents)
    for half in latents.split(2):
        two(half)
    one.step(), two.step()
    torch.testing.assert_close(one.codebook, two.codebook)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_does_not_count_a_batch_twice(use_reentrant):
    plain, checkpointed = trained(ema()), trained(ema())
    latents = latents_of(5, 4, DIM, 4, 4).requires_grad_()
    plain(latents).quantized.sum().backward()
    checkpoint(lambda x: checkpointed(x).quantized, latents, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(plain.pending.count, checkpointed.pending.count)
    assert torch.equal(plain.pending.sum, checkpointed.pending.sum)


def test_pending_statistics_are_no_buffers():
    quantizer = ema()
    names = set(dict(quantizer.named_buffers()))
    quantizer(latents_of(1))
    assert set(dict(quantizer.named_buffers())) == names == {"num_steps", "ema_count", "ema_sum"}


@pytest.mark.parametrize(
    ("given_value", "message"),
    [
        ({"codebook_size": 1}, "codebook_size=1 must be at least 2"),
        ({"decay": 1.0}, r"decay=1.0 must lie in \[0, 1\)"),
        ({"commitment_weight": -1.0}, "must not be negative"),
        ({"placement": -0.1}, "share of the run"),
        ({"revival_threshold": 1.5}, "share of the mean count"),
    ],
)
def test_impossible_hyperparameters_are_named(given_value, message):
    with pytest.raises(ValueError, match=message):
        EMAVectorQuantizer(DIM, **given_value)
