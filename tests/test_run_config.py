"""How settings travel: defaults < preset < command line, and what is refused on the way."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from train.config import UserError, differences, help_text, parse, public_yaml, settings_of, to_yaml, without_folders
from train.settings import PriorRun, StoreRun, TokenizerRun, VAERun

PRESETS = sorted((Path(__file__).parents[1] / "train" / "presets").glob("*/*.yaml"))


def preset(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_defaults(tmp_path):
    file = preset(tmp_path, "steps: 70\nseed: 3\nmodel: {quantizer: {codebook_size: 64, decay: 0.9}}\n")
    config = parse(TokenizerRun, [file, "seed=4", "model.quantizer.codebook_size=128"])
    assert (config.steps, config.seed, config.batch_size) == (70, 4, TokenizerRun().batch_size)
    assert (config.model.quantizer["codebook_size"], config.model.quantizer["decay"]) == (128, 0.9)


def test_another_choice_drops_the_hyperparameters_of_the_one_it_replaces(tmp_path, monkeypatch):
    from tokenizer.quantizers import QUANTIZERS

    class Other(QUANTIZERS["ema_vq"]):
        def __init__(self, codebook_dim: int, codebook_size: int = 7):
            super().__init__(codebook_dim, codebook_size)

    monkeypatch.setitem(QUANTIZERS, "other", Other)
    file = preset(tmp_path, "model: {quantizer: {name: ema_vq, decay: 0.9, codebook_size: 64}}\n")
    assert parse(TokenizerRun, [file, "model.quantizer.name=other"]).model.quantizer == {
        "name": "other",
        "codebook_size": 7,
    }
    assert parse(TokenizerRun, [file, "model.quantizer.name=ema_vq"]).model.quantizer["decay"] == 0.9


def test_a_quantizer_inside_another_is_chosen_and_set_like_the_outer_one(tmp_path, monkeypatch):
    from tokenizer.quantizers import QUANTIZERS

    class Other(QUANTIZERS["ema_vq"]):
        def __init__(self, codebook_dim: int, codebook_size: int = 7):
            super().__init__(codebook_dim, codebook_size)

    monkeypatch.setitem(QUANTIZERS, "other", Other)
    inner = parse(TokenizerRun, []).model.quantizer
    file = preset(tmp_path, "model: {quantizer: {name: residual, depth: 3, each: {codebook_size: 64}}}\n")
    for arguments, expected in [
        ([], {"depth": 3, "each": inner | {"codebook_size": 64}}),
        (["model.quantizer.each.decay=0.5"], {"depth": 3, "each": inner | {"codebook_size": 64, "decay": 0.5}}),
        (["model.quantizer.each.name=ema_vq"], {"depth": 3, "each": inner | {"codebook_size": 64}}),
        (["model.quantizer.each.name=other"], {"depth": 3, "each": {"name": "other", "codebook_size": 7}}),
        (["model.quantizer.name=grouped"], {"groups": 2, "each": inner}),
    ]:
        config = parse(TokenizerRun, [file, *arguments])
        assert expected.items() <= config.model.quantizer.items()
        assert parse(TokenizerRun, [preset(tmp_path, to_yaml(config))]) == config
        preset(tmp_path, "model: {quantizer: {name: residual, depth: 3, each: {codebook_size: 64}}}\n")


def test_run_yaml_gives_the_same_settings_again(tmp_path):
    config = parse(TokenizerRun, ["steps=30", "data_options.flip=false", "model.resize=64", "loss.reconstruction=l1"])
    assert parse(TokenizerRun, [preset(tmp_path, to_yaml(config))]) == config
    assert yaml.safe_load(to_yaml(config)) == asdict(config)


def test_settings_for_others_hold_the_last_name_alone_of_what_lies_outside_the_current_folder():
    given = ["data=/home/me/cats", "output_dir=runs/cats", "model.resize=64"]
    public = yaml.safe_load(public_yaml(parse(TokenizerRun, given)))
    assert public == asdict(parse(TokenizerRun, ["data=cats", *given[1:]]))
    given = {"a": ["~/b/c", "../d", "e/f", 1, "./../g/h", "e/../../i/", ""]}
    assert without_folders(given) == {"a": ["c", "d", "e/f", 1, "h", "i", ""]}


def test_help_prints_every_key_with_its_default_and_its_comment():
    text = help_text(TokenizerRun)
    assert "usage: accelerate launch train/vqvae.py" in text
    for key, default, _ in settings_of(TokenizerRun):
        assert f"  {key}={'null' if default is None else default}" in text
    assert "steps between checkpoints; default steps // 10" in text
    with pytest.raises(SystemExit) as end:
        parse(TokenizerRun, ["--help"])
    assert end.value.code == 0


@pytest.mark.parametrize("run", [TokenizerRun, VAERun, StoreRun, PriorRun])
def test_every_setting_says_what_it_is(run):
    silent = [key for key, _, comment in settings_of(run) if not comment]
    assert not silent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["free_settings=[steps]"], "unknown key 'free_settings' in the settings"),
        (["learningrate=1"], "unknown key 'learningrate' in the settings; did you mean 'learning_rate'?"),
        (["optimizer.beta3=1"], "did you mean 'optimizer.beta2'?"),
        (["optimizer=adam"], "optimizer='adam' must be given as optimizer.KEY=..."),
        (["steps"], "argument 'steps' is neither a preset"),
        (["missing.yaml"], "preset missing.yaml cannot be read"),
        (["steps=[1"], "argument 'steps=[1' has no YAML after its key"),
        (["steps=${x"], "argument 'steps=${x' has no YAML after its key"),
        (["steps=2.5"], "steps: Value '2.5' of type 'float' could not be converted to Integer"),
        (["mixed_precision=fp8"], "expected one of"),
        (["average.decay=1"], "average.decay=1.0 must lie in [0, 1)"),
        (["learning_rate=0"], "learning_rate=0.0 must be finite and above 0"),
        (["batch_size=0"], "batch_size=0 must be >= 1"),
        (["model.quantizer.decai=1"], "unknown key 'decai' in quantizer 'ema_vq'; did you mean 'decay'?"),
        (["model.quantizer.name=residual", "model.quantizer.each.decai=1"], "in quantizer.each 'ema_vq'; did you mean"),
        (["model.codebook_dim=wide"], "model.codebook_dim: Value 'wide'"),
        (["push_to_hub=you/name"], "must come with card.license=... and card.data_license=..."),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(UserError) as error:
        parse(TokenizerRun, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unquoted_no_is_a_word(tmp_path):
    assert parse(TokenizerRun, ["mixed_precision=no"]).mixed_precision == "no"
    assert parse(TokenizerRun, [preset(tmp_path, "mixed_precision: no")]).mixed_precision == "no"
    assert parse(TokenizerRun, ["data_options.flip=no"]).data_options.flip is False


@pytest.mark.parametrize("text", ["- a\n- b\n", "steps: [1\n"])
def test_a_preset_that_is_none_is_named(text, tmp_path):
    with pytest.raises(UserError, match="mine.yaml"):
        parse(TokenizerRun, [preset(tmp_path, text)])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_each_preset_is_valid_and_opens_with_command_hardware_minutes_and_score(path):
    programs = {"vqvae": TokenizerRun, "vae": VAERun, "encode_dataset": StoreRun, "token_prior": PriorRun}
    parse(programs[path.stem], [str(path)])
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"accelerate launch train/{path.stem}.py train/presets/{path.parent.name}/{path.name}" in header
    assert "core" in header
    assert re.search(r"\d+(\.\d+)? min", header)
    score = {
        "vqvae": r"\d\d\.\d+ dB",
        "vae": r"\d\.\d+ bits per dimension",
        "encode_dataset": r"[\d,]+ rows",
        "token_prior": r"\d\.\d+ bits per token",
    }
    assert re.search(score[path.stem], header)


def test_differences_are_found_at_any_depth():
    ours, theirs = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    assert differences(ours, theirs) == {"b.c": (2, 4), "e": (None, 5)}


def test_the_photographs_preset_is_the_default_run():
    (path,) = (path for path in PRESETS if path.parent.name == "photographs")
    assert parse(TokenizerRun, [str(path)]) == TokenizerRun()
