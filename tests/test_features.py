"""Networks as judges, with made-up weights that are found as real ones would be. LPIPS: test_losses.py."""

import hashlib

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import inception_v3, mobilenet_v2

from train.config import UserError
from train.features import InceptionFeatures, MobileNetFeatures, weights_hash

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def pictures(count: int = 3, side: int = 40, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mobilenet(mobilenet_file) -> MobileNetFeatures:
    return MobileNetFeatures(mobilenet_file)


@pytest.fixture(scope="module")
def inception_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False).state_dict()


@pytest.fixture
def inception_home(empty_home, inception_state, monkeypatch):
    """A torch home with made-up weights of Inception that pass for the standard ones."""
    path = empty_home / INCEPTION_FILE
    torch.save(inception_state, path)
    monkeypatch.setattr("train.features.INCEPTION_HASH", hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def test_mobilenet_gives_each_picture_its_own_features(mobilenet):
    found = mobilenet(pictures())
    assert (found.shape, found.dtype) == ((3, 1280), torch.float32)
    torch.testing.assert_close(found[1:2], mobilenet(pictures()[1:2]))
    assert not torch.allclose(found[0], found[1])


def test_mobilenet_looks_as_tensorflow_does(mobilenet):
    seen = {}
    first = mobilenet.network.features[0][0]  # of stride 2: at 224 pixels TensorFlow pads right and bottom alone
    with first.register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs[0], output=output)):
        mobilenet(pictures(side=224))
    torch.testing.assert_close(seen["inputs"], F.pad(2 * pictures(side=224) - 1, (0, 1, 0, 1)))
    corner = F.conv2d(2 * pictures(side=224)[:, :, :3, :3] - 1, first.weight)
    torch.testing.assert_close(seen["output"][:, :, :1, :1], corner)
    assert seen["output"].shape[2:] == (112, 112)


def test_mobilenet_sees_grey_as_equal_colours_and_gives_weights_no_gradient(mobilenet):
    grey = pictures(channels=1)
    torch.testing.assert_close(mobilenet(grey), mobilenet(grey.repeat(1, 3, 1, 1)))
    assert not any(weight.requires_grad for weight in mobilenet.parameters())
    assert not any(module.training for module in mobilenet.modules())


def test_the_hash_does_not_depend_on_how_weights_lie_in_memory(mobilenet):
    before = weights_hash(mobilenet)
    assert weights_hash(mobilenet.to(memory_format=torch.contiguous_format)) == before
    mobilenet.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("content", [None, b"not weights", b"", {"a": 1}, [1], mobilenet_v2().state_dict()])
def test_what_are_no_weights_of_this_mobilenet_is_one_clear_line(tmp_path, content):
    path = tmp_path / "mobilenet.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"mobilenet={path} cannot be loaded .* 1,001 outputs"):
        MobileNetFeatures(str(path))


def test_inception_gives_each_picture_its_own_features_and_sees_8_bits(inception_home):
    network = InceptionFeatures()
    found = network(pictures(2))
    assert (found.shape, found.dtype) == ((2, 2048), torch.float32)
    torch.testing.assert_close(found[1:], network(pictures(2)[1:]))
    rounded = (pictures(2) * 255).round() / 255
    torch.testing.assert_close(found, network(rounded), rtol=0, atol=0)
    grey = pictures(1, channels=1)
    torch.testing.assert_close(network(grey), network(grey.repeat(1, 3, 1, 1)))
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("content", [None, b"other weights"])
def test_inception_of_other_weights_or_none_is_an_error_with_the_file_and_its_place(empty_home, content):
    if content is not None:
        (empty_home / INCEPTION_FILE).write_bytes(content)
    reason = "URL|urlopen|refused" if content is None else "does not begin with 6726825d"
    with pytest.raises(
        UserError, match=rf"({reason}).*; put https://github.com/.*/{INCEPTION_FILE} into {empty_home}/"
    ):
        InceptionFeatures()
