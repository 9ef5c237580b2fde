"""The comparison of tokenizers and codecs, on tiny real models, made-up judges and small pictures."""

import json
import math
import sys
from hashlib import sha256
from pathlib import Path

import contenders
import numpy as np
import pytest
import tables
import torch
from comparison_sheet import drawn
from conftest import picture, tiny_config
from contenders import SavedTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import Judges, Tally
from PIL import Image
from processes import TWO_RANKS, run
from rate_distortion import at_same_bits
from reconstruction import ReconstructionRun, main

from tokenizer import ImageTokenizer, ModelCard
from tokenizer.distances import FeatureMoments, frechet_distance, kernel_distance
from tokenizer.images import prepare_pil
from tokenizer.metrics import perplexity, psnr, usage
from train.config import UserError, parse, to_yaml
from train.settings import TokenizerRun

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PROGRAM = str(Path(__file__).parents[1] / "benchmarks/reconstruction.py")
CPU = torch.device("cpu")
SIDE, NUM_TEST = 20, 12
NOT_COMPARED = {"encoded_per_second", "decoded_per_second"}  # what the clock decides


def card(*settings: str) -> ModelCard:
    return ModelCard(settings=to_yaml(parse(TokenizerRun, [*settings])))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `data` of two splits and `one_split`, and tokenizers, `coarse` trained on LPIPS by SqueezeNet."""
    folder = tmp_path_factory.mktemp("reconstruction")
    for split, seeds in (("data/train", range(4)), ("data/test", range(50, 50 + NUM_TEST)), ("one_split", range(100))):
        (folder / split).mkdir(parents=True)
        for seed in seeds:
            picture(seed, width=28 + seed % 3, height=24).save(folder / split / f"{seed:03d}.png")
    for name, changes, made_with in (
        ("fine", {}, card()),
        ("coarse", {"quantizer": {"name": "ema_vq", "codebook_size": 8}}, card("loss.perceptual=squeeze")),
        ("grey", {"image_channels": 1}, None),
    ):
        torch.manual_seed(0)
        ImageTokenizer(tiny_config(**changes)).save_pretrained(folder / name, made_with)
    return folder


def arguments(files: Path, output: Path, **changes: object) -> ReconstructionRun:
    values = {"tokenizers": f"[{files / 'fine'}]", "data": files / "data", "image_size": SIDE, "output_dir": output}
    values |= {"perceptual": "null", "inception": False, "batch_size": 5, "speed.threads": 1} | changes
    return parse(ReconstructionRun, [f"{key}={value}" for key, value in values.items()])


def measured(output: Path, name: str = "tiny") -> dict:
    return json.loads((output / f"benchmarks/results/reconstruction_{name}.json").read_text())


def test_pictures() -> torch.Tensor:
    """The test split as it is measured, uint8 (N, C, S, S)."""
    images = [prepare_pil(picture(seed, 28 + seed % 3, 24), 3, 1, SIDE) for seed in range(50, 50 + NUM_TEST)]
    return torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images])


test_pictures.__test__ = False


def test_the_program_writes_record_table_and_pictures(files, tmp_path, squeeze_home, mobilenet_file):
    both = f"[{files / 'fine'},{files / 'coarse'}]"
    main(
        "tiny", arguments(files, tmp_path, tokenizers=both, perceptual="squeeze", mobilenet=mobilenet_file, named="o/p")
    )
    written = measured(tmp_path)
    fine, coarse = written["rows"][:2]
    assert [fine["perceptual_loss"], coarse["perceptual_loss"]] == [None, "squeeze"]
    assert [fine["lpips"]["trained_on"], coarse["lpips"]["trained_on"]] == [False, True]
    assert fine["bits_per_pixel"] == 5 / 4 and coarse["bits_per_pixel"] == 3 / 4
    assert fine["encoded_per_second"] > 0 and fine["decoded_per_second"] > 0
    assert fine["changed_tokens"]["one picture at a time"] == 0
    assert 0 <= fine["changed_tokens"]["bf16"] < 1
    assert (
        fine["kernel_mobilenet_v2"]["low"] < fine["kernel_mobilenet_v2"]["mean"] < fine["kernel_mobilenet_v2"]["high"]
    )
    assert "frechet_mobilenet_v2" not in fine and "rfid" not in fine  # 12 pictures, 1,280 features
    assert {row["name"] for row in written["rows"][2:]} == {"JPEG", "WEBP"}
    protocol = written["protocol"]
    assert (protocol["split"], protocol["images"], protocol["settings"]["data"]) == ("test", NUM_TEST, "o/p")
    assert protocol["lpips"]["network"] == "squeeze" and len(protocol["lpips"]["sha256"]) == 64
    assert protocol["features"]["mobilenet_v2"]["features"] == 1280
    assert written["versions"]["pillow"] and protocol["codecs"]["JPEG"] and written["commit"]
    assert "output_dir" not in written["command"] and " data=o/p " in written["command"]
    assert mobilenet_file not in json.dumps(written) and " mobilenet=mobilenet_v2.pth" in written["command"]
    table = (tmp_path / "benchmarks/results/reconstruction_tiny.md").read_text()
    assert table.count("(squeeze, trained on)") == 1
    with Image.open(tmp_path / "docs/tiny_reconstructions.png") as sheet:
        assert sheet.height == 140 * (1 + 2 * 2 + 2)  # pictures; reconstructions and errors twice; two codecs
    with Image.open(tmp_path / "docs/tiny_rate_distortion.png") as plot:
        assert plot.width > plot.height


def test_the_figures_are_those_of_the_whole_computed_at_once(files, tmp_path, mobilenet_file):
    main("tiny", arguments(files, tmp_path, codecs=False, mobilenet=mobilenet_file))
    row, pictures = measured(tmp_path)["rows"][0], test_pictures()
    tokenizer, judges = ImageTokenizer.from_pretrained(files / "fine"), Judges(None, False, mobilenet_file, CPU)
    tokens = tokenizer.encode(pictures)
    reconstructions = (tokenizer.decode(tokens) * 255).round().to(torch.uint8)
    assert row["psnr"]["mean"] == pytest.approx(psnr(reconstructions / 255, pictures / 255).mean().item(), rel=1e-6)
    counts = torch.bincount(tokens.flatten(), minlength=32)
    assert (row["usage"], row["perplexity"]) == pytest.approx((usage(counts), perplexity(counts)))
    features = [judges.features(each)["mobilenet_v2"] for each in (reconstructions, pictures)]
    assert row["kernel_mobilenet_v2"]["mean"] == pytest.approx(kernel_distance(*features).mean, rel=1e-3)
    hashes = b"".join(sha256(each.contiguous().numpy().tobytes()).digest() for each in pictures)
    assert measured(tmp_path)["protocol"]["sha256"] == sha256(hashes).hexdigest()


def without_clock(written: dict) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in NOT_COMPARED} for row in written["rows"]]


def test_two_ranks_measure_what_one_does(files, tmp_path, mobilenet_file):
    config = arguments(files, tmp_path / "one", mobilenet=mobilenet_file)
    main("tiny", config)
    words = [f"{key}={value}" for key, value in vars(config).items() if isinstance(value, str | int)]
    words += [f"tokenizers=[{files / 'fine'}]", "perceptual=null", "speed.threads=1", f"output_dir={tmp_path / 'two'}"]
    finished = run([sys.executable, *TWO_RANKS, PROGRAM, "tiny", *words])
    assert finished.returncode == 0, finished.stderr
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert (one["protocol"].pop("ranks"), two["protocol"].pop("ranks")) == (1, 2)
    assert one["protocol"] == two["protocol"]
    assert without_clock(one) == without_clock(two)
    assert (tmp_path / "one/docs/tiny_reconstructions.png").read_bytes() == (
        tmp_path / "two/docs/tiny_reconstructions.png"
    ).read_bytes()


def test_a_stream_is_measured_as_what_lies_on_disk(files, tmp_path):
    for output, streaming in ((tmp_path / "stream", True), (tmp_path / "disk", False)):
        main("tiny", arguments(files, output, streaming=streaming, codecs=False, num_images=7))
    assert without_clock(measured(tmp_path / "stream")) == without_clock(measured(tmp_path / "disk"))
    protocol = measured(tmp_path / "stream")["protocol"]
    assert (protocol["images"], protocol["split"]) == (7, "test")


def test_the_record_says_which_pictures_were_held_out(files, tmp_path):
    main("tiny", arguments(files, tmp_path, data=files / "one_split", codecs=False))
    assert measured(tmp_path)["protocol"]["split"] == "held out of train, seed 0"
    assert measured(tmp_path)["protocol"]["images"] == 2


def test_a_split_that_is_named_is_measured_whole_even_where_it_is_the_only_one(files, tmp_path):
    main("tiny", arguments(files, tmp_path, data=files / "one_split", eval_split="train", codecs=False))
    protocol = measured(tmp_path)["protocol"]
    assert (protocol["split"], protocol["images"]) == ("train", len(list((files / "one_split").rglob("*.png"))))


def test_grey_pictures_are_measured_by_the_same_judges(files, tmp_path, squeeze_home, mobilenet_file):
    grey = {"tokenizers": f"[{files / 'grey'}]", "perceptual": "squeeze", "mobilenet": mobilenet_file, "num_images": 5}
    main("tiny", arguments(files, tmp_path, **grey))
    row = measured(tmp_path)["rows"][0]
    assert row["lpips"]["trained_on"] == "unknown"
    assert "(squeeze, perhaps trained on)" in (tmp_path / "benchmarks/results/reconstruction_tiny.md").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokenizers": "[nowhere]"}, "neither a folder here nor a model"),
        ({"tokenizers": "[]"}, "must be one or more"),
        ({"image_size": 21}, "image_size=21 must be a positive multiple of"),
        ({"image_size": 10}, "image_size=10 must be >= 11 for SSIM"),
        ({"image_size": 16, "perceptual": "squeeze"}, "image_size=16 must be >= 17"),
        ({"num_images": 1}, "num_images=1 must be >= 2"),
        ({"data": "./nowhere"}, "no file or folder of that name"),
        ({"eval_split": "nowhere"}, "eval_split=nowhere is not a split"),
        ({"mobilenet": "nowhere"}, "mobilenet=nowhere cannot be loaded"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_line(files, tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        main("tiny", arguments(files, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_grey_beside_colour_is_refused(files, tmp_path):
    with pytest.raises(UserError, match="all for grey or all for colour"):
        main("tiny", arguments(files, tmp_path, tokenizers=f"[{files / 'fine'},{files / 'grey'}]"))


def test_a_tokenizer_that_decodes_to_nan_is_named(files, tmp_path):
    broken = ImageTokenizer.from_pretrained(files / "fine")
    next(broken.autoencoder.decoder.parameters()).data.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="broken decodes to NaN; its weights are spoilt"):
        main("tiny", arguments(files, tmp_path, tokenizers=f"[{tmp_path / 'broken'}]", codecs=False))


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(6)), cuts=st.lists(st.integers(0, 6), min_size=2, max_size=2).map(sorted))
def test_what_ranks_kept_adds_up_whatever_the_order(order, cuts):
    generator = torch.Generator().manual_seed(0)
    scores, features = torch.rand(6, 2, generator=generator), torch.rand(6, 2, 3, generator=generator)

    def tally_of(batches):
        tally = Tally()
        for batch in batches:
            tally.add(2 * batch, {"psnr": scores[batch]}, {"small": features[batch]})
            tally.add_hashes(2 * batch, (features[batch] * 255).byte())
        return tally

    shares = order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]
    parts, whole = Tally.of_all(map(tally_of, shares)), tally_of(range(6))
    assert parts.estimates(0) == whole.estimates(0)
    assert parts.content_hash() == whole.content_hash()
    found, expected = parts.distances(tally_of(range(6)), 0), whole.distances(whole, 0)
    assert {name: each["mean"] for name, each in found.items()} == pytest.approx(
        {name: each["mean"] for name, each in expected.items()}, abs=1e-9
    )


def kept(features: torch.Tensor, name: str) -> Tally:
    tally = Tally()
    for first in range(0, len(features), 4):
        tally.add(first, {}, {name: features[first : first + 4]})
    return tally


@pytest.mark.parametrize(("name", "named"), [("inception_v3", "rfid"), ("mobilenet_v2", "frechet_mobilenet_v2")])
def test_only_inceptions_distance_is_called_rfid_and_too_few_pictures_have_none(name, named):
    features, references = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(0))
    found = kept(features, name).distances(kept(references, name), 0)
    assert found.keys() == {named, f"kernel_{name}"}
    moments = FeatureMoments.of(features), FeatureMoments.of(references)
    assert found[named] == {"mean": pytest.approx(frechet_distance(*moments))}
    few = kept(features[:9], name).distances(kept(references[:9], name), 0)
    assert few.keys() == {f"kernel_{name}"}


def test_features_are_kept_of_the_first_pictures_alone(monkeypatch):
    monkeypatch.setattr("judges.NUM_KEPT", 6)
    features, references = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(0))
    tally, reference = kept(features, "small"), kept(references, "small")
    assert sum(len(batch["small"]) for batch in tally.features.values()) == 6
    found = tally.distances(reference, 0)
    assert found["kernel_small"]["mean"] == pytest.approx(kernel_distance(features[:6], references[:6]).mean)
    assert tally.moments["small"].count == 20


@pytest.mark.parametrize(("side", "measures"), [(176, {"psnr", "ssim", "ms_ssim"}), (175, {"psnr", "ssim"})])
def test_similarity_over_scales_is_measured_where_the_sides_allow_it(side, measures):
    grey = torch.full((1, 1, side, side), 128, dtype=torch.uint8)
    assert Judges(None, False, None, CPU).scores(grey, grey).keys() == measures


def test_a_picture_that_comes_back_whole_has_a_finite_score_above_all_others():
    pictures = test_pictures()
    nearly = pictures.clone()
    nearly[0, 0, 0, 0] ^= 1  # one level off
    judges = Judges(None, False, None, CPU)
    whole, other = judges.scores(pictures, pictures)["psnr"], judges.scores(nearly, pictures)["psnr"]
    assert whole[0].item() == pytest.approx(other[0].item(), abs=1e-4)
    assert whole.isfinite().all()


def test_changed_tokens_are_counted_over_the_first_pictures(files, monkeypatch):
    monkeypatch.setattr("contenders.NUM_REENCODED", 7)
    contender, pictures = SavedTokenizer(str(files / "fine"), CPU), test_pictures()
    for first in (0, 5, 10):
        contender.reconstruct(first, pictures[first : first + 5])
    tokens = contender.tokenizer.encode(pictures[:7])
    with torch.autocast("cpu", torch.bfloat16):
        other = contender.tokenizer.encode(pictures[:7])
    changed = contender.row(contender.sums(), NUM_TEST, SIDE)["changed_tokens"]
    assert changed.keys() == {"bf16", "one picture at a time"}  # no other device here
    assert changed["bf16"] == pytest.approx((tokens != other).double().mean().item(), abs=0.01)


def codec_rows() -> list[dict]:
    points = [("JPEG", 90, 4.0, 40.0), ("JPEG", 5, 1.0, 20.0), ("WEBP", 1, 2.0, 30.0), ("WEBP", 9, 8.0, 50.0)]
    return [
        {"name": name, "quality": quality, "bits_per_pixel": bits, "psnr": {"mean": value, "low": value, "high": value}}
        for name, quality, bits, value in points
    ]


def test_between_two_qualities_a_codec_is_linear_in_the_logarithm_of_its_bits():
    assert at_same_bits(2.0, codec_rows()) == {"JPEG": {"psnr": 30.0}, "WEBP": {"psnr": 30.0}}
    assert at_same_bits(4.0, codec_rows()) == {"JPEG": {"psnr": 40.0}, "WEBP": {"psnr": 40.0}}


def test_beyond_its_qualities_a_codec_has_no_value():
    assert at_same_bits(0.5, codec_rows()) == {"JPEG": None, "WEBP": None}
    assert at_same_bits(1.5, codec_rows())["WEBP"] is None


def test_the_sheet_shows_the_quality_of_each_codec_that_is_nearest_in_bits():
    tokenizers = [{"name": "one", "bits_per_pixel": 3.0}, {"name": "two", "bits_per_pixel": 100.0}]
    assert drawn([*tokenizers, *codec_rows()]) == [0, 1, 2, 4]


def test_the_table_has_a_line_for_each_tokenizer_and_for_the_codecs_at_its_bits_or_their_smallest_files():
    estimate = {"mean": 0.25, "low": 0.2, "high": 0.4}
    row = {
        "name": "mine", "bits_per_pixel": 0.5, "psnr": {"mean": 21.345, "low": 21.0, "high": 21.5},
        "lpips": estimate | {"network": "squeeze", "trained_on": True}, "kernel_mobilenet_v2": estimate,
        "codecs_at_the_same_bits": {"JPEG": None, "WEBP": {"psnr": 25.0, "lpips": 0.1}},
    }  # fmt: skip
    protocol = {"settings": {"data": "org/data", "image_size": 64}, "split": "test", "images": 1234}
    rows = tables.reconstruction_rows({"protocol": protocol, "rows": [row, *codec_rows()]})
    lines = tables.markdown(rows).splitlines()
    pictures = "| 1,234 of org/data test, 64 px |"
    assert lines == [
        "| what | bits per pixel | PSNR (dB) | LPIPS | kernel distance, MobileNetV2 | pictures |",
        "|---|---|---|---|---|---|",
        f"| mine | 0.500 | 21.34 ± 0.25 | 0.2500 ± 0.1000 (squeeze, trained on) | 0.25000 ± 0.10000 {pictures}",
        f"| WEBP at those bits | 0.500 | 25.00 | 0.1000 (squeeze) | - {pictures}",
        f"| JPEG at its fewest bits | 1.000 | 20.00 ± 0.00 | - | - {pictures}",
    ]


def test_codes_too_many_for_a_usage_are_counted_in_the_first_pictures_alone_whoever_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "TOKENS_WITHOUT_USAGE", 5 * 100 + 99)  # five pictures of 100 tokens
    torch.manual_seed(0)
    path = str(tmp_path / "huge")
    ImageTokenizer(tiny_config(codebook_dim=36, quantizer={"name": "lfq"})).save_pretrained(path, card())
    pictures = torch.randint(256, (8, 3, SIDE, SIDE), dtype=torch.uint8)
    one, first, second = (SavedTokenizer(path, CPU) for _ in range(3))
    for reader, start in [(one, 0), (one, 4), (first, 0), (second, 4)]:
        reader.reconstruct(start, pictures[start : start + 4])
    both = first.sums()["counts"] + second.sums()["counts"]
    for sums in (one.sums(), one.sums() | {"counts": both}):
        row = one.row(sums, 8, SIDE)
        assert (row["num_tokens"], row["codes_seen"]) == (500, len(one.tokenizer.encode(pictures[:5]).unique()))
        assert "usage" not in row
