"""The peers' loop end to end at a few steps, and its network measured through the doors of ours."""

from pathlib import Path

import pytest
import torch
from conftest import picture
from contenders import SavedTokenizer
from diffusers import VQModel
from diffusers_peer import DiffusersTokenizer, is_vq_model
from reference_vqgan import GRADIENT_PENALTY, Discriminator, PeerRun, discriminator_loss, main
from torch import nn

from train.config import UserError, parse

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SMALL = ("steps=2", "batch_size=1", "block_out_channels=[32,32]", "codebook_size=16", "num_workers=0")


@pytest.fixture
def trained(tmp_path, squeeze_home) -> Path:
    for seed in range(2):
        (tmp_path / "data").mkdir(exist_ok=True)
        picture(seed, 132, 130).save(tmp_path / "data" / f"{seed}.png")
    folder = tmp_path / "peer"
    main(parse(PeerRun, [f"data={tmp_path / 'data'}", f"output_dir={folder}", "loss.perceptual=squeeze", *SMALL]))
    return folder


def test_the_loop_leaves_a_folder_that_is_measured_as_ours_are(trained):
    assert is_vq_model(str(trained))
    assert not is_vq_model(str(trained.parent))
    saved = SavedTokenizer(str(trained), torch.device("cpu"))
    pictures = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    with torch.no_grad():
        expected = VQModel.from_pretrained(trained).eval()(pictures.float() / 255).sample.clamp(0, 1)
    torch.testing.assert_close(saved.reconstruct(0, pictures).float() / 255, expected, atol=1 / 255, rtol=0)
    row = saved.row(saved.sums(), 2, 8)
    assert row["perceptual_loss"] == "squeeze"
    assert row["bits_per_pixel"] == 4 / 4  # log2(16) bits for 2 x 2 pixels
    assert saved.tokenizer.grid_size(8) == (4, 4)
    with pytest.raises(ValueError, match="image_size=9 must be a multiple of 2"):
        saved.tokenizer.grid_size(9)
    with pytest.raises(UserError, match="is there already"):
        main(parse(PeerRun, [f"output_dir={trained}"]))


def test_each_fingerprint_is_of_its_own_part(trained):
    model = DiffusersTokenizer(str(trained))
    before = model.fingerprint, model.decoder_fingerprint
    with torch.no_grad():
        model.model.quantize.embedding.weight[0] += 1
    assert model.fingerprint != before[0]
    assert model.decoder_fingerprint == before[1]


def test_the_discriminator_is_punished_for_gradients_that_are_not_of_length_one():
    class Plane(nn.Module):
        def forward(self, images):
            return 3 * images[:, :1]  # a gradient of 3 at each of the 4 pixels of the first channel: of length 6

    images, reconstructions = torch.full((2, 3, 2, 2), 0.1), torch.full((2, 3, 2, 2), 0.2)
    hinge = (1 + 0.6) + (1 - 0.3)
    loss = discriminator_loss(images, reconstructions, Plane())
    torch.testing.assert_close(loss, torch.tensor(hinge + GRADIENT_PENALTY * (6 - 1) ** 2))


def test_the_discriminator_gives_probabilities_of_patches():
    logits = Discriminator()(torch.rand(2, 3, 128, 192))
    assert logits.shape == (2, 1, 2, 3)
    assert logits.min() >= 0 and logits.max() <= 1


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("image_size=64", "image_size=64 must be above 64"),
        ("block_out_channels=[48]", r"block_out_channels=\[48\] must hold multiples of 32"),
        ("block_out_channels=[]", r"block_out_channels=\[\] must hold multiples of 32"),
    ],
)
def test_sizes_that_the_networks_cannot_have_are_refused_before_anything_is_loaded(setting, rule):
    with pytest.raises(UserError, match=rule):
        parse(PeerRun, [setting])
