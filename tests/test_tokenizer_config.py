"""TokenizerConfig: complete, canonical, and strict."""

import inspect
import json
from dataclasses import asdict

import pytest
from conftest import tiny_config

from tokenizer import QUANTIZERS, ImageTokenizer, TokenizerConfig
from tokenizer.autoencoder import AUTOENCODERS
from tokenizer.choices import complete, hyperparameters


@pytest.mark.parametrize(("part", "table"), [("autoencoder", AUTOENCODERS), ("quantizer", QUANTIZERS)])
def test_a_part_is_completed_from_the_signature_of_its_class(part, table):
    for name, choice in table.items():
        completed = getattr(TokenizerConfig(**{part: {"name": name}}), part)
        given = inspect.signature(choice).parameters.values()
        settable = [each for each in given if each.default is not each.empty and each.kind is not each.KEYWORD_ONLY]
        defaults = {each.name: each.default for each in settable}
        assert list(completed) == ["name", *defaults]
        parts = {key: complete(part, each, table) for key, each in defaults.items() if isinstance(each, dict)}
        assert completed == {"name": name} | json.loads(json.dumps(defaults)) | parts


def test_every_hyperparameter_of_every_choice_has_a_type():
    for table in (AUTOENCODERS, QUANTIZERS):
        for choice in table.values():
            assert all(each.annotation is not each.empty for each in hyperparameters(choice).values())


def test_what_is_given_stays_and_the_rest_is_filled_in():
    config = TokenizerConfig(quantizer={"name": "ema_vq", "codebook_size": 77})
    assert config.quantizer["codebook_size"] == 77
    assert config.quantizer["decay"] == TokenizerConfig().quantizer["decay"]


def test_a_quantizer_inside_another_is_completed_too_by_default_that_of_the_signature():
    config = TokenizerConfig(quantizer={"name": "residual", "each": {"codebook_size": 77}})
    assert config.quantizer["each"] == TokenizerConfig().quantizer | {"codebook_size": 77}
    assert config.quantizer["depth"] == 4
    inner = {"name": "residual", "each": {"name": "ema_vq", "decay": 0.5}}
    grouped = TokenizerConfig(quantizer={"name": "grouped", "each": inner})
    assert grouped.quantizer["each"]["each"] == TokenizerConfig().quantizer | {"decay": 0.5}
    assert TokenizerConfig(**json.loads(json.dumps(asdict(grouped)))) == grouped


def test_a_saved_config_is_complete_and_its_later_keys_are_filled_in_inside_a_quantizer_too(monkeypatch):
    values = asdict(TokenizerConfig(quantizer={"name": "residual"}))
    del values["quantizer"]["each"]["decay"]
    with pytest.raises(ValueError, match="here lacks quantizer.each.decay; a saved config is complete"):
        TokenizerConfig.from_dict(values, TokenizerConfig.format_version, "here")
    version = TokenizerConfig.format_version
    monkeypatch.setattr(TokenizerConfig, "format_version", version + 1)
    monkeypatch.setattr(TokenizerConfig, "later_keys", {"quantizer.ema_vq.decay": (version + 1, 0.5)})
    older = TokenizerConfig.from_dict(values, version, "here")
    assert older.quantizer["each"]["decay"] == 0.5
    assert older.identity() == TokenizerConfig(**values | {"quantizer": older.quantizer}).identity()
    assert "decay" not in older.identity()["quantizer"]["each"]


def test_a_model_is_built_with_exactly_what_its_config_says():
    quantizer = {"name": "ema_vq", "codebook_size": 16, "decay": 0.5, "commitment_weight": 0.75, "normalize": True}
    built = ImageTokenizer(tiny_config(codebook_dim=3, quantizer=quantizer)).quantizer
    assert (built.vocab_size, built.decay, built.commitment_weight, built.normalize) == (16, 0.5, 0.75, True)
    assert built.codebook.shape == (16, 3)


def test_the_config_is_plain_json_and_json_gives_the_same_config_back():
    config = tiny_config(resize=32)
    assert TokenizerConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert TokenizerConfig.from_dict(asdict(config), TokenizerConfig.format_version, "here") == config


def test_whole_numbers_become_floats_and_tuples_lists_where_the_type_says_so():
    given = {"name": "ema_vq", "decay": 0, "commitment_weight": 1}
    config = tiny_config(
        autoencoder={"name": "convolutional", "channel_multipliers": (1, 2), "dropout": 0}, quantizer=given
    )
    values = [config.quantizer["decay"], config.quantizer["commitment_weight"], config.autoencoder["dropout"]]
    assert [repr(value) for value in values] == ["0.0", "1.0", "0.0"]  # one JSON text, one fingerprint
    assert config.autoencoder["channel_multipliers"] == [1, 2]


def test_the_config_does_not_share_what_it_was_given():
    multipliers = [1, 2]
    config = tiny_config(autoencoder={"name": "convolutional", "channel_multipliers": multipliers})
    multipliers.append(4)
    assert config.autoencoder["channel_multipliers"] == [1, 2]
    assert TokenizerConfig().autoencoder is not TokenizerConfig().autoencoder


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"quantizer": {"name": "ema_vq", "codebok_size": 8}},
            "'codebok_size' in quantizer 'ema_vq'; did you mean 'codebook_size'",
        ),
        (
            {"quantizer": {"name": "ema_vq", "zzz": 8}},
            "unknown key 'zzz' .*; the keys are codebook_size, commitment_weight",
        ),
        ({"quantizer": {"name": "ema_vq", "codebook_dim": 8}}, "unknown key 'codebook_dim' in quantizer 'ema_vq'"),
        (
            {"autoencoder": {"name": "convolutional", "base_chanels": 8}},
            "'base_chanels' in autoencoder 'convolutional'; did you mean 'base_channels'",
        ),
        (
            {"autoencoder": {"name": "convolutional", "image_channels": 1}},
            "unknown key 'image_channels' in autoencoder",
        ),
        (
            {"quantizer": {"name": "residual", "each": {"name": "ema_vq", "decai": 8}}},
            "'decai' in quantizer.each 'ema_vq'; did you mean 'decay'",
        ),
        ({"quantizer": {"name": "residual", "each": {"name": "vvq"}}}, "quantizer.each.name='vvq' must be one of"),
        ({"quantizer": {"name": "residual", "each": "ema_vq"}}, "quantizer.each='ema_vq' must be of type dict"),
        ({"quantizer": {"name": "fsqq"}}, "quantizer.name='fsqq' must be one of .*ema_vq"),
        ({"quantizer": {"name": ["ema_vq"]}}, r"quantizer.name=\['ema_vq'\] must be one of .*ema_vq"),
        ({"quantizer": {"codebook_size": 8}}, "quantizer.name=None must be one of .*ema_vq"),
        ({"autoencoder": {"name": "vit"}}, "autoencoder.name='vit' must be one of .*convolutional"),
        ({"quantizer": "ema_vq"}, "quantizer='ema_vq' must be of type dict"),
        ({"quantizer": {"name": "ema_vq", "codebook_size": 8.0}}, "quantizer.codebook_size=8.0 must be of type int"),
        ({"quantizer": {"name": "ema_vq", "codebook_size": True}}, "quantizer.codebook_size=True must be of type int"),
        ({"quantizer": {"name": "ema_vq", "decay": "0.9"}}, "quantizer.decay='0.9' must be of type float"),
        ({"quantizer": {"name": "ema_vq", "normalize": 1}}, "quantizer.normalize=1 must be of type bool"),
        (
            {"autoencoder": {"name": "convolutional", "channel_multipliers": [1, 2.5]}},
            r"autoencoder.channel_multipliers=\[1, 2.5\] must be of type Sequence\[int\]",
        ),
        ({"codebook_dim": "8"}, "codebook_dim='8' must be of type int"),
        ({"codebook_dim": 0}, "codebook_dim=0 must be at least 1"),
        ({"image_channels": 4}, r"image_channels=4 must be 3 \(RGB\) or 1 \(grey\)"),
        ({"resize": 32.0}, r"resize=32.0 must be of type int \| None"),
        ({"pixel_range": [0, 255, 1]}, r"pixel_range=\[0.0, 255.0, 1.0\] must be what black and white are"),
        ({"pixel_range": "unit"}, r"pixel_range='unit' must be of type list\[float\]"),
        ({"resize": 0}, "resize=0 must be at least 1 pixel, or null"),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_the_rule(wrong, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**wrong)


def test_an_unknown_key_of_a_saved_config_names_the_nearest():
    values = asdict(tiny_config()) | {"codebook_dims": 8}
    with pytest.raises(ValueError, match="unknown key 'codebook_dims' in here; did you mean 'codebook_dim'"):
        TokenizerConfig.from_dict(values, TokenizerConfig.format_version, "here")


def test_a_resize_that_the_factor_does_not_divide_is_refused_before_it_is_needed():
    with pytest.raises(
        ValueError, match="resize=9 must be a side in pixels, a positive multiple of downsample_factor=2"
    ):
        ImageTokenizer(tiny_config(resize=9))
