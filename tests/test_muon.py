"""Muon against torch's own on matrices, its groups beside AdamW's, and the kernel beside what it stands for."""

import copy
import math

import pytest
import torch
from processes import printed_by_lesser
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenizer import QUANTIZERS
from tokenizer.kernels import LIBRARY
from tokenizer.kernels.memory import WORKSPACE
from train import muon
from train.muon import MuonAdamW, is_for_kernel, iterated, orthogonalized
from train.optimization import Trainee

BUILT = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built here")
SHAPES = [
    *((1, 1), (1, 20), (20, 1), (5, 7), (7, 5), (16, 16), (17, 33), (33, 17), (64, 576), (65, 130), (130, 65)),
    *((6, 4, 3), (48, 16, 3, 3), (33, 3, 3, 3), (40, 3, 3, 3), (70, 10, 1, 1), (4, 3, 2, 2, 2)),
]


def optimizer_of(*weights: Tensor, decay: float = 0.5) -> MuonAdamW:
    return MuonAdamW([{"params": list(weights), "orthogonal": True}], lr=0.1, weight_decay=decay)


def random_weights(shapes: list[tuple[int, ...]], order: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    """Weights with gradients, all laid out in an order where they have four dimensions."""
    torch.manual_seed(0)
    weights = []
    for shape in shapes:
        layout = order if len(shape) == 4 else torch.contiguous_format
        weight, gradient = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
        weights.append(nn.Parameter(weight))
        weights[-1].grad = gradient
    return weights


def exactly(weight: Tensor, gradient: Tensor, momentum: Tensor) -> None:
    """A step of `optimizer_of` in float64 by the iterations one by one."""
    momentum += 0.05 * (gradient - momentum)
    ahead = (gradient + 0.95 * (momentum - gradient)).flatten(1)
    tall = len(ahead) > ahead.shape[1]
    wide = ahead.T if tall else ahead
    direction = iterated(wide / (wide.norm() + 1e-7))
    direction = direction.T if tall else direction
    weight *= 1 - 0.1 * 0.5
    weight -= 0.1 * 0.2 * max(ahead.shape) ** 0.5 * direction.reshape(weight.shape)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12)])
def test_singular_vectors_stay_and_singular_values_come_near_1(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalized(matrix) @ right.T
    values = inner.diagonal()
    assert ((values > 0.6) & (values < 1.3)).all()
    torch.testing.assert_close(inner, values.diag(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_by_the_gram_matrix_the_iterations_come_to_the_same(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.rand(shape[1]) ** 6  # small singular values are what it could lose
    wide = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    expected = iterated(wide / wide.norm())
    found = orthogonalized(matrix)
    found = found if shape[0] <= shape[1] else found.T
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(iterated((wide / wide.norm()).bfloat16()).double(), expected, rtol=0, atol=0.1)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_steps_of_matrices_are_those_of_torch(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.1}
    ours_by = MuonAdamW([{"params": [ours], "orthogonal": True}], **settings)
    theirs_by = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    for seed in range(4):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours_by.step()
        theirs_by.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.002)  # torch iterates in bfloat16
    assert (ours - start).abs().mean() > 0.01


def test_a_kernel_moves_as_the_matrix_of_its_output_channels():
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2)
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    kernel.grad, matrix.grad = gradient, gradient.flatten(1)
    MuonAdamW([{"params": [kernel, matrix], "orthogonal": True}], lr=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_the_other_groups_are_adamws_to_the_bit_and_a_weight_without_gradient_rests():
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs, resting = (nn.Parameter(start.clone()) for _ in range(3))
    ours_by = MuonAdamW([{"params": [ours]}, {"params": [nn.Parameter(torch.ones(2, 2))], "orthogonal": True}], lr=0.1)
    theirs_by = torch.optim.AdamW([theirs, resting], lr=0.1)
    for seed in range(3):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours_by.step()
        theirs_by.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(resting, start)
    assert len(ours_by.param_groups) == 2


def test_a_trainee_gives_muon_its_matrices_and_kernels_but_no_embedding_norm_or_bias():
    network = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "linear": nn.Linear(4, 3),
            "conv": nn.Conv2d(3, 2, 3),
            "norm": nn.GroupNorm(1, 2),
        }
    )
    groups = Trainee(network, 0.1, (0.9, 0.99), weight_decay=0.5, orthogonal=True).groups()
    names = {id(weight): name for name, weight in network.named_parameters()}
    found = [
        ({names[id(weight)] for weight in group["params"]}, group["orthogonal"], group["weight_decay"])
        for group in groups
    ]
    assert found == [
        ({"linear.weight", "conv.weight"}, True, 0.5),
        ({"embedding.weight"}, False, 0.5),
        ({"linear.bias", "conv.bias", "norm.weight", "norm.bias"}, False, 0.0),
    ]


@pytest.mark.parametrize("name", ["vq", "simvq", "gumbel_vq"])
def test_a_trainee_lets_adamw_alone_move_a_quantizer_and_nothing_shrink_it(name):
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), QUANTIZERS[name](4))
    kernels, kept = Trainee(network, 0.1, (0.9, 0.99), weight_decay=0.5, orthogonal=True).groups()
    assert (kernels["weight_decay"], kernels["orthogonal"], len(kernels["params"])) == (0.5, True, 1)
    assert (kept["weight_decay"], kept["orthogonal"]) == (0.0, False)
    assert {id(each) for each in kept["params"]} == {id(each) for each in network[1].parameters()}


@BUILT
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_takes_the_steps_of_the_iterations_in_float64(shape, order, rank):
    (weight,) = random_weights([shape], order)
    optimizer, exact, momentum = optimizer_of(weight), weight.detach().double(), torch.zeros(shape).double()
    start = exact.clone()
    for _ in range(3):
        gradient = torch.randn(shape)
        if rank is not None:
            sides = muon.sides(weight)
            gradient = (torch.randn(sides[0], rank) @ torch.randn(rank, sides[1])).view(shape)
        weight.grad.copy_(gradient)
        assert is_for_kernel(weight, weight.grad, optimizer.state[weight].get("momentum", weight))
        optimizer.step()
        exactly(exact, gradient.double(), momentum)
        torch.testing.assert_close(optimizer.state[weight]["momentum"].double(), momentum, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight.grad, gradient)
    assert optimizer.state[weight]["momentum"].stride() == weight.stride()
    assert (weight.detach() - exact).norm() < 2e-4 * (exact - start).norm()


@BUILT
def test_a_weight_moves_the_same_to_the_bit_whatever_the_threads_the_others_and_what_lay_in_the_room():
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            weights = random_weights(SHAPES)
            optimizer = optimizer_of(*weights)
            for _ in range(2):
                optimizer.step()
                WORKSPACE.of(1).fill_(math.nan)
        finally:
            torch.set_num_threads(before)
        found.append(weights)
    alone = random_weights(SHAPES)
    for weight in alone:
        optimizer = optimizer_of(weight)
        optimizer.step()
        optimizer.step()
    for one, *others in zip(alone, *found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@BUILT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_beside_a_weight_is_touched(shape):
    count = math.prod(shape)
    weight, gradient, momentum = (torch.ones(count + 80) for _ in range(3))
    inner = [tensor[40 : 40 + count].view(shape) for tensor in (weight, gradient, momentum)]
    assert is_for_kernel(*inner)
    muon.move_by_kernel([(*inner, 0.1, 0.5)])
    for tensor, moves in ((weight, True), (gradient, False), (momentum, False)):
        assert (tensor[:40] == 1).all()
        assert (tensor[40 + count :] == 1).all()
        assert (tensor[40 : 40 + count] != 1).all() == moves


@BUILT
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (64, 576)])
def test_by_the_kernel_a_zero_gradient_leaves_decay_alone_and_what_is_not_finite_spreads(shape):
    resting, broken, sound = random_weights([shape] * 3)
    before = resting.detach().clone()
    resting.grad.zero_()
    broken.grad[1, 2] = math.nan
    optimizer_of(resting, broken, sound).step()
    assert torch.equal(resting, before * (1 - 0.1 * 0.5))
    assert broken.isnan().all()
    assert sound.isfinite().all()


@BUILT
def test_autograd_learns_of_what_the_kernel_changes():
    (weight,) = random_weights([(3, 4)])
    optimizer = optimizer_of(weight)
    loss = weight.square().sum()
    optimizer.step()
    versions = weight._version, optimizer.state[weight]["momentum"]._version
    optimizer.step()
    assert weight._version > versions[0]
    assert optimizer.state[weight]["momentum"]._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_another_order(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)


@BUILT
@pytest.mark.parametrize(
    "change", ["gradient", "momentum", "weight", "transposed", "float64", "bfloat16", "counted", "unbuilt"]
)
def test_what_the_kernel_does_not_take_moves_by_pytorch_and_the_same(change, monkeypatch):
    weight, plain = (random_weights([(6, 5, 3, 3)])[0] for _ in range(2))
    optimizer, reference = optimizer_of(weight), optimizer_of(plain)
    optimizer.step()
    reference.step()
    momentum = optimizer.state[weight]["momentum"]
    if change == "gradient":
        weight.grad = in_another_order(weight.grad)
    elif change == "momentum":
        optimizer.state[weight]["momentum"] = momentum = in_another_order(momentum)
    elif change == "weight":
        weight.data = in_another_order(weight.data)
    elif change == "transposed":
        for tensor in (weight, weight.grad, momentum):
            tensor.data = tensor.data.transpose(0, 1).contiguous().transpose(0, 1)
    elif change in ("float64", "bfloat16"):
        weight = nn.Parameter(weight.detach().to(getattr(torch, change)))
        weight.grad, momentum = plain.grad.to(weight.dtype), momentum.to(weight.dtype)
        optimizer = optimizer_of(weight)
        optimizer.state[weight] = {"step": torch.ones(()), "momentum": momentum}
    elif change == "unbuilt":
        monkeypatch.setattr(muon, "LIBRARY", None)
    if change == "counted":
        with FlopCounterMode(display=False) as counter:
            assert not is_for_kernel(weight, weight.grad, momentum)
            optimizer.step()
        assert counter.get_total_flops() > 0
    else:
        assert not is_for_kernel(weight, weight.grad, momentum)
        optimizer.step()
    reference.step()
    tolerance = {"rtol": 0.02, "atol": 0.02} if change == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(weight.float(), plain, **tolerance)


@BUILT
def test_the_kernel_takes_weights_with_numbers_and_what_has_their_shape():
    weight = torch.empty(3, 4)
    assert is_for_kernel(weight, weight, weight)
    assert not is_for_kernel(weight, weight, torch.empty(3, 3))
    assert not is_for_kernel(weight, torch.empty(4, 3), weight)
    assert not is_for_kernel(*(torch.empty(0, 3) for _ in range(3)))
    assert not is_for_kernel(*(torch.empty(3, 0) for _ in range(3)))


@BUILT
def test_a_state_of_before_is_taken_on_by_the_kernel_and_the_other_way(monkeypatch):
    for first, second in ((LIBRARY, None), (None, LIBRARY), (LIBRARY, LIBRARY)):
        weights, resumed = random_weights(SHAPES), random_weights(SHAPES)
        undisturbed, before, after = optimizer_of(*weights), optimizer_of(*resumed), optimizer_of(*resumed)
        undisturbed.step()
        undisturbed.step()
        with monkeypatch.context() as patch:
            patch.setattr(muon, "LIBRARY", first)
            before.step()
            state = copy.deepcopy(before.state_dict())
            assert {frozenset(each) for each in state["state"].values()} == {frozenset({"step", "momentum"})}
            patch.setattr(muon, "LIBRARY", second)
            after.load_state_dict(state)
            after.step()
        for weight, other in zip(weights, resumed, strict=True):
            assert after.state[other]["step"] == 2
            assert torch.equal(weight, other) or (first, second) != (LIBRARY, LIBRARY)
            torch.testing.assert_close(other, weight, rtol=1e-4, atol=1e-4)


LESSER = """
import torch
from tokenizer.kernels import LANES
from train import muon
torch.manual_seed(0)
for shape in ((64, 576), (33, 7), (9, 5, 3, 3)):
    start, momentum, gradient = (torch.randn(shape) for _ in range(3))
    found, expected = start.clone(), start.clone()
    assert LANES == 8 and muon.is_for_kernel(found, gradient, momentum)
    muon.move_by_kernel([(found, gradient, momentum.clone(), 0.1, 0.5)])
    muon.move(expected, gradient, momentum, 0.1, 0.5)
    print(((found - expected).norm() / (expected - start).norm()).item())
"""


@BUILT
def test_the_kernel_for_lesser_processors_is_as_exact():
    differences = printed_by_lesser(LESSER)
    assert len(differences) == 3
    assert all(0 < difference < 1e-4 for difference in differences)


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("after", [torch.contiguous_format, torch.channels_last])
def test_a_fused_step_goes_on_from_the_state_of_any_other_and_is_counted(before, after):
    def optimizer_of(layout: torch.memory_format, fused: bool | None) -> tuple[nn.Parameter, MuonAdamW]:
        weight = nn.Parameter(start.clone().contiguous(memory_format=layout))
        return weight, MuonAdamW([{"params": [weight]}], lr=0.1, fused=fused)

    def take_step(weight: nn.Parameter, optimizer: MuonAdamW) -> None:
        weight.grad = gradient.clone().contiguous(memory_format=layout_of[optimizer])
        optimizer.step()

    torch.manual_seed(0)
    start, gradient, layout_of = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), {}
    plain, first = optimizer_of(before, None)
    fused, second = optimizer_of(after, True)
    layout_of |= {first: before, second: after}
    take_step(plain, first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fused.data.copy_(plain.data)
    assert second.param_groups[0]["fused"]
    changes = fused._version
    take_step(plain, first)
    take_step(fused, second)
    torch.testing.assert_close(fused, plain)
    assert fused._version > changes
