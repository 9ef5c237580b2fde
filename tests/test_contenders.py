"""Codecs by hand, and where it stands written what a tokenizer was trained on: on disk and on a Hub."""

import io

import pytest
import torch
from conftest import tiny_config
from contenders import Codec, SavedTokenizer, perceptual_loss_of
from hub_server import in_own_process, serve_hub
from PIL import Image
from test_model import images_of, placed
from test_publishing import tiny_model
from test_tokens import STRUCTURES

from tokenizer import ModelCard
from train.config import parse, to_yaml
from train.settings import TokenizerRun

SIDE, TOKEN = 20, "hf_right"


def settings_with(*arguments: str) -> str:
    return to_yaml(parse(TokenizerRun, [*arguments]))


def card(settings: str = "") -> ModelCard:
    return ModelCard(license="mit", data="org/data", data_license="mit", settings=settings)


def test_a_folder_says_in_its_settings_or_its_card_by_what_it_was_trained(tmp_path):
    for name, settings in (("lpips", settings_with("loss.perceptual=squeeze")), ("pixels", settings_with())):
        tiny_model().save_pretrained(tmp_path / name, card(settings))
    tiny_model().save_pretrained(tmp_path / "silent", card())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(settings_with("loss.perceptual=vgg"))
    found = [perceptual_loss_of(str(tmp_path / name)) for name in ("lpips", "pixels", "silent", "run")]
    assert found == ["squeeze", None, "unknown", "vgg"]


def published_story() -> list[str | None]:
    """Publish two tokenizers, and ask of each and of one that is not there."""
    for name, settings in (("org/lpips", settings_with("loss.perceptual=alex")), ("org/silent", "")):
        tiny_model().push_to_hub(name, card(settings))
    return [perceptual_loss_of(name) for name in ("org/lpips", "org/silent", "org/unknown")]


def test_the_hub_says_in_the_card_by_what_it_was_trained(tmp_path):
    with serve_hub(TOKEN) as hub:
        assert in_own_process(published_story, tmp_path, hub.url, token=TOKEN) == ["alex", "unknown", "unknown"]


@pytest.mark.parametrize("name", STRUCTURES)
def test_of_structured_tokens_every_code_of_every_codebook_is_counted_and_every_token_is_paid_for(name, tmp_path):
    model = placed(tiny_config(quantizer=STRUCTURES[name]), images_of(0))
    model.save_pretrained(tmp_path)
    pictures = (images_of(1, 2, 3, SIDE, SIDE) * 255).byte()
    saved = SavedTokenizer(str(tmp_path), torch.device("cpu"))
    rebuilt = saved.reconstruct(0, pictures)
    tokens = model.encode(pictures)
    assert torch.equal(rebuilt, (model.decode(tokens) * 255).round().byte())
    row = saved.row(saved.sums(), 2, SIDE)
    sizes = {"residual": 96, "grouped": 64, "grouped residual": 128, "hierarchical": 64}
    assert row["bits_per_pixel"] == pytest.approx(tokens[0].numel() * 5 / SIDE**2)
    assert row["tokens_per_code"] == tokens.numel() / sizes.get(name, 32)
    assert row["changed_tokens"]["one picture at a time"] == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["JPEG", "WEBP"])
def test_a_codec_counts_whole_files_and_better_quality_costs_more(name, channels):
    torch.manual_seed(0)
    pictures = torch.nn.functional.interpolate(torch.rand(3, channels, 5, 5), SIDE).mul(255).byte()
    low, high = Codec(name, 5), Codec(name, 95)
    errors = [(codec.reconstruct(0, pictures).float() - pictures.float()).abs().mean() for codec in (low, high)]
    assert errors[1] < errors[0]
    bits = [codec.row(codec.sums(), 3, SIDE)["bits_per_pixel"] for codec in (low, high)]
    assert bits[0] < bits[1]
    one = Codec("JPEG", 50)
    one.reconstruct(0, pictures[:1])
    file, pixels = io.BytesIO(), pictures[0].movedim(0, -1).numpy()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file, format="JPEG", quality=50, optimize=True)
    assert one.row(one.sums(), 1, SIDE)["bits_per_pixel"] == 8 * len(file.getvalue()) / SIDE**2
