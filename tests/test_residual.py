"""The residual and the grouped quantizer: sums and splits of others, written out plainly beside what they do."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantizers import DIM, latents_of

from tokenizer.choices import build, complete
from tokenizer.quantizers import QUANTIZERS, EMAVectorQuantizer, GroupedQuantizer, ResidualQuantizer

EACH = {"name": "ema_vq", "codebook_size": 16}


def residual(**changes) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(DIM, **{"each": EACH, "depth": 3} | changes).train()


def placed(quantizer, batches: int = 3):
    for seed in range(batches):
        quantizer.train()(latents_of(seed, 4, DIM, 8, 8))
        quantizer.step()
    return quantizer


def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return (vectors[:, None].double() - codebook[None].double()).square().sum(-1).argmin(1)


def flat(latents: torch.Tensor) -> torch.Tensor:
    return latents.movedim(1, -1).flatten(0, -2)


# Residual.


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_each_stage_takes_the_code_nearest_to_what_the_stages_before_it_left(shared, training):
    quantizer = placed(residual(shared=shared)).train(training)
    latents = latents_of(9)
    codebooks = [stage.codebook for stage in quantizer.stages]
    output = quantizer(latents)
    left, commitment = flat(latents), 0
    for stage, codebook in enumerate(codebooks):  # the recursion of section 3.1
        chosen = nearest(left, codebook)
        assert torch.equal(chosen, output.indices[..., stage].flatten())
        left = left - codebook[chosen]
        commitment += 0.25 * left.square().mean()
    torch.testing.assert_close(flat(output.quantized), flat(latents) - left)
    torch.testing.assert_close(output.losses, {"commitment": commitment})


@settings(max_examples=20, deadline=None)
@given(kept=st.integers(1, 5), seed=st.integers(0, 99))
def test_more_stages_never_do_worse_on_the_batch_that_placed_them(kept, seed):
    torch.manual_seed(seed)
    quantizer, latents = ResidualQuantizer(DIM, EACH, depth=6), latents_of(seed, 4, DIM, 8, 8)
    quantizer.train()(latents)
    quantizer.step()
    indices = quantizer.eval()(latents).indices
    errors = [
        (quantizer.indices_to_codes(indices[..., :stages]) - latents).square().mean() for stages in (kept, kept + 1)
    ]
    assert errors[1] < errors[0]


def test_the_first_stages_decode_to_the_sum_of_their_codes():
    quantizer = placed(residual()).eval()
    indices = quantizer(latents_of(9)).indices
    total = 0
    for stages in range(1, 4):
        total = total + quantizer.stages[stages - 1].indices_to_codes(indices[..., stages - 1])
        assert torch.equal(quantizer.indices_to_codes(indices[..., :stages]), total)


@pytest.mark.parametrize("shared", [False, True])
def test_all_stages_are_placed_in_one_step_each_among_its_own_residuals(shared):
    quantizer = residual(each=EACH | {"placement": 0.5}, shared=shared)
    latents = latents_of(0, 8, DIM, 16, 16)
    output = quantizer(latents)
    assert torch.equal(output.quantized, latents)
    assert output.losses["commitment"] == 0
    assert output.indices.shape == (8, 16, 16, 3)
    assert not quantizer.step(0.25)
    assert not quantizer.placed
    quantizer(latents)
    assert quantizer.step(0.5)  # the codes jumped
    assert quantizer.placed
    before = copy.deepcopy(quantizer.state_dict())
    output = quantizer.eval()(latents)
    left = latents.square().mean()
    for stage in range(3):
        codes = quantizer.indices_to_codes(output.indices[..., : stage + 1])
        assert (latents - codes).square().mean() < (0.9 if shared else 0.7) * left
        left = (latents - codes).square().mean()
        assert len(output.indices[..., stage].unique()) > 8
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


def test_a_shared_codebook_learns_from_the_inputs_of_all_stages():
    quantizer = placed(residual(shared=True, each=EACH | {"revival_threshold": 0.0}))
    (part,) = quantizer.parts
    plain, latents = copy.deepcopy(part), latents_of(5)
    indices = quantizer(latents).indices
    inputs = [latents]
    for stage in range(2):
        inputs.append(inputs[-1] - plain.indices_to_codes(indices[..., stage]))
    plain(torch.cat(inputs, dim=2))
    assert torch.equal(part.pending.sums[0], torch.bincount(indices.flatten(), minlength=16))
    assert len(part.pending.vectors) == 3 * latents[:, 0].numel()
    quantizer.step(), plain.step()
    torch.testing.assert_close(part.codebook, plain.codebook)


def test_the_commitment_of_every_stage_reaches_the_latents():
    quantizer, latents = placed(residual()), latents_of(1).requires_grad_()
    output = quantizer(latents)
    output.losses["commitment"].backward()
    codes = [quantizer.indices_to_codes(output.indices[..., :stages]) for stages in (1, 2, 3)]
    # The sum of beta |z - sg(z^d)|^2 over the depths d, z^d the sum of the first d codes.
    torch.testing.assert_close(
        latents.grad, sum(0.25 * 2 * (latents.detach() - each) / latents.numel() for each in codes)
    )


def test_quantizer_dropout_sums_over_the_first_stages_of_as_many_pictures_as_it_says():
    quantizer, latents = placed(residual(quantizer_dropout=0.5)), latents_of(1, 400, DIM, 2, 2)
    torch.manual_seed(1)
    output = quantizer(latents)
    sums = [quantizer.indices_to_codes(output.indices[..., :stages]) for stages in (1, 2, 3)]
    same = torch.stack([(output.quantized == each).flatten(1).all(1) for each in sums])  # (3, B)
    assert same.any(0).all()
    shares = same.float().mean(1)
    torch.testing.assert_close(shares, torch.tensor([1 / 6, 1 / 6, 4 / 6]), atol=0.06, rtol=0)
    torch.manual_seed(1)
    assert torch.equal(quantizer(latents).quantized, output.quantized)
    torch.manual_seed(2)
    assert not torch.equal(quantizer(latents).quantized, output.quantized)
    assert torch.equal(quantizer.eval()(latents).quantized, sums[-1])


def test_under_quantizer_dropout_the_gradient_still_passes_once_and_each_stage_sees_every_picture():
    quantizer = placed(residual(quantizer_dropout=1.0))
    latents, direction = latents_of(1, 40, DIM, 2, 2).requires_grad_(), latents_of(2, 40, DIM, 2, 2)
    (quantizer(latents).quantized * direction).sum().backward()
    torch.testing.assert_close(latents.grad, direction)
    assert [part.pending.sums[0].sum().item() for part in quantizer.parts] == [160, 160, 160]


# Grouped.


def test_each_group_is_quantized_by_itself():
    quantizer = placed(GroupedQuantizer(DIM, EACH, groups=2)).eval()
    output = quantizer(latents_of(9))
    alone = [part(chunk) for part, chunk in zip(quantizer.parts, latents_of(9).chunk(2, dim=1), strict=True)]
    assert torch.equal(output.indices, torch.stack([each.indices for each in alone], dim=-1))
    assert torch.equal(output.quantized, torch.cat([each.quantized for each in alone], dim=1))


def test_the_commitment_of_groups_is_that_of_the_whole_latents():
    quantizer, latents = placed(GroupedQuantizer(DIM, EACH, groups=4)), latents_of(9)
    output = quantizer(latents)
    torch.testing.assert_close(output.losses, {"commitment": 0.25 * (latents - output.quantized).square().mean()})


def test_groups_may_be_residual_and_their_indices_stand_group_after_group():
    each = {"name": "residual", "depth": 3, "each": EACH}
    quantizer = placed(GroupedQuantizer(DIM, each, groups=2)).eval()
    output = quantizer(latents_of(9))
    assert quantizer.num_codebooks == 6
    assert output.indices.shape == (2, 3, 5, 6)
    assert torch.equal(output.indices[..., 3:], quantizer.parts[1](latents_of(9)[:, 2:]).indices)
    assert torch.equal(quantizer.indices_to_codes(output.indices), output.quantized)


# Ranks.

EACH_REVIVED = EACH | {"placement": 0.5, "revival_threshold": 0.9}
RANKED = {
    "separate": {"name": "residual", "depth": 3, "each": EACH_REVIVED},
    "shared": {"name": "residual", "depth": 3, "shared": True, "each": EACH_REVIVED},
    "grouped": {"name": "grouped", "each": EACH_REVIVED},
    "multiscale": {"name": "multiscale", "scales": [1, 2, 4], "each": EACH_REVIVED},
}


def stepped(chosen: dict, rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
    """The state after four steps, the second of them placing the codes, on this rank's share of each batch."""
    torch.manual_seed(0)
    quantizer = build(QUANTIZERS, complete("quantizer", chosen, QUANTIZERS), DIM).train()
    for step in range(4):
        quantizer(latents_of(step, 8, DIM, 4, 4).chunk(num_ranks)[rank])
        quantizer.step(step / 2)
    return quantizer.state_dict()


def step_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({name: stepped(chosen, rank, 2) for name, chosen in RANKED.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_place_move_and_revive_the_codes_as_one_with_the_whole_batch_does(tmp_path):
    torch.multiprocessing.spawn(step_on_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, chosen in RANKED.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], stepped(chosen, 0, 1), rtol=1e-4, atol=1e-5)


# Usage.


def test_codes_are_numbered_by_the_codebook_that_they_belong_to():
    inner = {"name": "residual", "depth": 2, "each": EACH}
    for quantizer, offsets in [
        (residual(), [0, 16, 32]),
        (residual(shared=True), [0, 0, 0]),
        (GroupedQuantizer(DIM, EACH), [0, 16]),
        (GroupedQuantizer(DIM, inner), [0, 16, 32, 48]),
        (GroupedQuantizer(DIM, inner | {"shared": True}), [0, 0, 16, 16]),
    ]:
        indices = quantizer(latents_of(1)).indices
        numbers = quantizer.code_numbers(indices, (3, 5))
        assert (numbers - indices)[0, 0, 0].tolist() == offsets
        assert quantizer.num_codes == max(offsets) + 16
        assert numbers.shape == indices.shape


# What cannot be.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualQuantizer(DIM, depth=1), r"depth=1 must lie in 2..16; one stage is its part by itself"),
        (lambda: ResidualQuantizer(DIM, depth=17), r"depth=17 must lie in 2..16"),
        (lambda: ResidualQuantizer(DIM, refinement=0.5), "refinement=0.5 must be at least 1, or null"),
        (lambda: ResidualQuantizer(DIM, quantizer_dropout=1.5), r"quantizer_dropout=1.5 must lie in \[0, 1\]"),
        (
            lambda: ResidualQuantizer(DIM, {"name": "residual"}),
            "each.name='residual' is built of other quantizers; .*ema",
        ),
        (lambda: ResidualQuantizer(DIM, {"name": "vvq"}), "each.name='vvq' must be one of .*ema_vq"),
        (lambda: ResidualQuantizer(DIM, {"codebook_size": 1}), "codebook_size=1 must be at least 2"),
        (lambda: GroupedQuantizer(DIM, groups=3), "groups=3 must divide codebook_dim=4"),
        (lambda: GroupedQuantizer(DIM, groups=1), "groups=1 is its part by itself"),
        (lambda: GroupedQuantizer(DIM, {"name": "grouped"}), "each.name='grouped' is built of .* ema_vq.*residual"),
    ],
)
def test_impossible_hyperparameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_part_with_several_indices_for_a_place_is_refused(monkeypatch):
    monkeypatch.setattr(EMAVectorQuantizer, "num_codebooks", 2)
    with pytest.raises(ValueError, match="each.name='ema_vq' gives 2 indices for a place; a part of 'residual' must"):
        ResidualQuantizer(DIM)
