"""Gradients of what kernels compute where those of their references must do, beside float64."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tokenizer.attention import PLAIN_PLACES, attend
from tokenizer.kernels import LANES
from tokenizer.normalisation import activated
from tokenizer.pointwise import PointwiseConv2d
from tokenizer.winograd import Sides, WinogradConv2d

CHANNELS = 2 * (LANES or 16)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{f"winograd, {sides.name}": partial(WinogradConv2d, CHANNELS, CHANNELS, sides) for sides in Sides},
    "pointwise": partial(PointwiseConv2d, CHANNELS, CHANNELS),
    "norm": partial(nn.GroupNorm, 4, CHANNELS),
}


def used_twice(layer: nn.Module, features: Tensor) -> Tensor:
    """So that what goes in the second time depends on the layer, and the layer counts twice."""
    apply = partial(activated, layer) if isinstance(layer, nn.GroupNorm) else layer
    return apply(apply(features).sin())


def orders(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """First gradients alone, the same on the way to second ones, and the second ones."""
    alone = torch.autograd.grad(function(*inputs).square().mean(), inputs)
    first = torch.autograd.grad(function(*inputs).square().mean(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
    return [*alone, *first, *second]


def assert_close(found: list[Tensor], exact: list[Tensor]) -> None:
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_used_twice_has_gradients_of_every_order(name):
    torch.manual_seed(0)
    layer, features = LAYERS[name](), torch.randn(2, CHANNELS, 24, 16, requires_grad=True)
    exact, exact_features = deepcopy(layer).double(), features.detach().double().requires_grad_()
    found = orders(lambda features, *_: used_twice(layer, features), features, *layer.parameters())
    expected = orders(lambda features, *_: used_twice(exact, features), exact_features, *exact.parameters())
    assert_close(found, expected)


@pytest.mark.parametrize("places", [2 * CHANNELS, PLAIN_PLACES + CHANNELS])
def test_attention_of_places_to_themselves_has_gradients_of_every_order(places):
    torch.manual_seed(0)
    features = torch.randn(1, places, CHANNELS, requires_grad=True)
    exact = features.detach().double().requires_grad_()

    def by_softmax(features: Tensor) -> Tensor:
        return (features @ features.mT / CHANNELS**0.5).softmax(dim=2) @ features

    assert_close(orders(lambda features: attend(features, features, features), features), orders(by_softmax, exact))
