"""The comparison of bottlenecks end to end, at two steps on small pictures, and its table."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import quantizers
import tables
import torch
from quantizers import MODELS, SHARED, QuantizersRun, checked, main
from recording import public_settings

from tokenizer import POSTERIORS, QUANTIZERS, ImageTokenizer
from train.config import UserError, parse

ROOT = Path(__file__).parents[1]
EMA = "model.quantizer.codebook_size=8"
FSQ = "model.quantizer.name=fsq model.quantizer.levels=[4,3] model.codebook_dim=2"


def arguments(data: Path, preset: Path, *models: str) -> QuantizersRun:
    settings = [f"data={data}", "named=org/colours", f"shared={preset}", f"models={json.dumps(models)}"]
    return parse(QuantizersRun, [*settings, "seeds=[3]", "speed.threads=1"])


def test_each_bottleneck_is_trained_once_measured_and_put_into_the_table(colours, tiny_preset, tmp_path, monkeypatch):
    main("tiny", arguments(colours, tiny_preset, EMA, FSQ), tmp_path)
    path = tmp_path / "benchmarks/results/quantizers_tiny.json"
    written = json.loads(path.read_text())
    assert str(colours) not in json.dumps(written)
    ema, fsq = (row["runs"][0] for row in written["models"])
    assert (ema["quantizer"], fsq["quantizer"]) == ("ema_vq", "fsq")
    assert (ema["bits_per_image"], fsq["bits_per_image"]) == pytest.approx((64 * 3, 64 * 3.585), rel=1e-3)
    for figures in (ema, fsq):
        assert figures["tokens_per_code"] >= 20
        assert 0 < figures["usage"] <= 1
        assert figures["steps_per_second"] > 0
        assert figures["peak_memory"] > 100 * 2**20  # torch alone takes more
    rows = tables.quantizers_rows(written)
    assert [row["bottleneck"] for row in rows] == [f"`{EMA}`", f"`{FSQ}`"]
    assert "2309.15505" in rows[1]["paper"]
    assert tables.markdown(rows).count("\n") == 3
    for figures, row in zip((ema, fsq), tables.many_codes_rows(written), strict=True):
        assert figures["training_crops"]["tokens_per_code"] >= 20
        assert row["codes in use, training crops"] == f"{figures['training_crops']['usage']:.1%}"
    assert ema["memory_of_scores"] == 4 * (4 * 64) * 8  # float32, a batch of 4 pictures, 8 codes

    def never(*arguments: object) -> None:
        raise AssertionError("it was trained already")

    monkeypatch.setattr(quantizers, "train_ours", never)
    main("tiny", arguments(colours, tiny_preset, EMA, FSQ), tmp_path)
    assert json.loads(path.read_text()) == written
    with pytest.raises(AssertionError, match="trained already"):  # what is added is trained
        main("tiny", arguments(colours, tiny_preset, EMA, FSQ, "model.codebook_dim=3"), tmp_path)


def test_a_model_that_cannot_be_is_refused_before_any_is_trained(colours, tiny_preset, tmp_path):
    wrong = "model.quantizer.name=fsq model.quantizer.levels=[4,3]"
    with pytest.raises(UserError, match="levels=.* set codebook_dim=2"):
        main("tiny", arguments(colours, tiny_preset, EMA, wrong), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_the_defaults_are_every_bottleneck_at_about_nine_bits_for_each_place_of_the_grid(monkeypatch):
    monkeypatch.chdir(ROOT)
    models = [checked(f"{SHARED} {arguments}").model for arguments in MODELS]
    assert {model.quantizer["name"] for model in models} == QUANTIZERS.keys()
    for model in models:
        options = {key: value for key, value in model.quantizer.items() if key != "name"}
        quantizer = QUANTIZERS[model.quantizer["name"]](model.codebook_dim, **options)
        num_places = sum(height * width for height, width in quantizer.grids(8, 8))
        bits = num_places * quantizer.num_codebooks * math.log2(quantizer.vocab_size)
        assert 0.88 * 9 <= bits / 64 <= 9


def test_the_command_of_the_readme_measures_what_is_recorded():
    (given,) = re.findall(r"`python benchmarks/quantizers.py cifar10([^`]*)`", (ROOT / "README.md").read_text())
    settings = public_settings(parse(QuantizersRun, shlex.split(given)))
    recorded = json.loads((ROOT / "benchmarks/results/quantizers_cifar10.json").read_text())["protocol"]["settings"]
    del recorded["seed"]  # of what was held out where there was no other split
    assert {key: settings[key] for key in recorded} == recorded


def test_the_command_in_the_record_makes_the_same_settings(colours, tiny_preset):
    config = arguments(colours, tiny_preset, EMA, FSQ)
    program, script, name, *given = shlex.split(quantizers.command_of("tiny", config))
    assert [program, script, name] == ["python", "benchmarks/quantizers.py", "tiny"]
    again = parse(QuantizersRun, given)
    assert (again.models, again.shared, again.data) == (config.models, config.shared, "org/colours")


def test_the_table_knows_the_paper_of_every_bottleneck_and_when_to_choose_it():
    assert tables.BOTTLENECKS.keys() >= QUANTIZERS.keys()
    assert tables.POSTERIOR_PAPERS.keys() == POSTERIORS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_the_table_tells_the_shape_of_the_tokens(model, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    config = checked(f"{QuantizersRun().shared} {model}").model
    tokens = ImageTokenizer(config).encode(torch.rand(1, 3, 32, 32))
    shape = tables.TOKEN_SHAPES.get(config.quantizer["name"], "(B, h, w)")
    assert shape.count(",") + 1 == tokens.ndim
    for paper, when in tables.BOTTLENECKS.values():
        assert "](https://" in paper
        assert when
