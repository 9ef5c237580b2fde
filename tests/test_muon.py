"""Muon against torch's own on matrices, and its groups beside AdamW's."""

import pytest
import torch
from torch import nn

from tokenizer import QUANTIZERS
from train.muon import MuonAdamW, iterated, orthogonalized
from train.optimization import Trainee


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
