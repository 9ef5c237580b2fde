"""The mutual information gap against what it must be, and the generated shapes that it is measured on."""

import math

import pytest
import torch
from disentanglement import NUM_BINS, discretised, entropy, mutual_information, mutual_information_gap
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import FACTORS, RADII, SIDE, all_shapes
from sklearn.metrics import mutual_info_score


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), number=st.integers(2, 200))
def test_the_information_is_that_of_a_plain_count(seed, number):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(size, (number,), generator=generator) for size in (7, 4))
    assert mutual_information(left, right) == pytest.approx(mutual_info_score(left, right), abs=1e-9)
    assert entropy(torch.bincount(left)) == pytest.approx(mutual_info_score(left, left), abs=1e-9)


def factors_of(number: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(size, (number,), generator=generator) for size in (3, 5, 8)], dim=1)


def test_a_dimension_for_each_factor_has_a_gap_of_one_in_any_order_scale_and_sign():
    factors = factors_of()
    found = mutual_information_gap(torch.randn(3)[None] - 7.0 * factors.flip(1), factors)
    assert found["mig"] > 0.98  # the factors know a little of each other by chance
    assert found["gaps"] == pytest.approx([1, 1, 1], abs=0.02)
    assert torch.tensor(found["information"]).argmax(0).tolist() == [2, 1, 0]


def test_a_factor_that_two_dimensions_share_has_no_gap():
    factors = factors_of()
    shared = torch.stack([factors[:, 0], factors[:, 0], factors[:, 1], factors[:, 2]], dim=1).double()
    assert mutual_information_gap(shared, factors)["gaps"] == pytest.approx([0, 1, 1], abs=0.02)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q.double()
    assert mutual_information_gap(factors.double() @ turn, factors)["mig"] < 0.5


def test_noise_and_constants_know_nothing():
    latents = torch.randn(4000, 4, generator=torch.Generator().manual_seed(2))
    latents[:, 3] = 1.5
    found = mutual_information_gap(latents, factors_of())
    assert found["mig"] < 0.02
    assert found["information"][3] == pytest.approx([0, 0, 0], abs=1e-9)


def test_bins_are_of_equal_width_from_the_lowest_to_the_highest():
    values = torch.linspace(-3, 5, 1001)
    bins = discretised(values)
    assert (bins.min(), bins.max()) == (0, NUM_BINS - 1)
    for number in range(NUM_BINS):
        inside = values[bins == number]
        assert inside.max() - inside.min() <= 8 / NUM_BINS + 1e-6


# The shapes.


def test_every_combination_is_drawn_once_and_no_two_look_alike():
    shapes = all_shapes()
    number = math.prod(len(values) for values in FACTORS.values())
    assert shapes.pixels.shape == (number, 3, SIDE, SIDE)
    assert len(shapes.factors.unique(dim=0)) == len(shapes.pixels.flatten(1).unique(dim=0)) == number


def test_each_factor_shows_in_its_own_way():
    shapes = all_shapes()
    light = shapes.pixels.double().sum(1)  # (N, S, S)
    places = torch.arange(SIDE) + 0.5
    total = light.sum((1, 2))
    outline, colour, size, x, y = shapes.factors.T
    across, down = ((light.sum(axis) * places).sum(1) / total for axis in (1, 2))
    for step in range(7):  # the centre of gravity moves with x and with y alone
        assert across[x == step].max() < across[x == step + 1].min() + 1e-3
    symmetric = outline < 2
    for step in range(7):
        assert down[symmetric & (y == step)].max() < down[symmetric & (y == step + 1)].min() + 1e-3
    covered, radius = (light > 0).sum((1, 2)), torch.tensor(RADII)[size]
    for values, centres in ((light.amax(1), x), (light.amax(2), y)):  # nothing is lit beyond the radius
        beyond = (places - (10 + 12 * centres / 7)[:, None]).abs() > radius[:, None] + 1
        assert (values[beyond] == 0).all()
    widths = (light[(outline == 2) & (size == 2)] > 0).sum(2)  # (N, S): a triangle grows wider downwards
    for rows in widths:
        lit = rows[rows > 0][:-1]
        assert (lit.diff() >= 0).all()
        assert lit[-1] > 3 * lit[0]
    for kind in range(3):
        areas = [covered[(outline == kind) & (size == number)].double().mean() for number in range(3)]
        assert areas == sorted(areas)
    middle = shapes.pixels[torch.arange(len(x)), :, (10 + 12 * y / 7).long(), (10 + 12 * x / 7).long()]
    for number in range(4):
        assert len(middle[colour == number].unique(dim=0)) == 1
