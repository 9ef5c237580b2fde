"""The discriminator's patches, and that a picture is judged by itself."""

import pytest
import torch

from train.discriminator import PatchDiscriminator
from train.settings import AdversarialSettings


@pytest.mark.parametrize(("num_layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_each_logit_judges_a_patch_of_the_published_side(num_layers, side):
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    network = PatchDiscriminator(3, base_channels=2, num_layers=num_layers)
    for layer in network.layers:
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda features: features  # its means see the whole picture
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = images.grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [side, side]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_image_is_the_smallest_that_leaves_a_logit(num_layers):
    network = PatchDiscriminator(3, base_channels=2, num_layers=num_layers)
    smallest = AdversarialSettings(num_layers=num_layers).smallest_image
    assert network(torch.rand(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 3, smallest - 1, smallest - 1))


def test_the_logits_of_a_picture_are_the_same_whatever_stands_beside_it():
    network = PatchDiscriminator(3, base_channels=4, num_layers=2).train()
    images = torch.rand(3, 3, 24, 24)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
    assert not list(network.buffers())  # nothing that a forward pass could change
