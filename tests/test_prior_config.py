from dataclasses import asdict

import pytest
import torch

from prior import SIZES, AutoregressivePrior, PriorConfig

PUBLISHED = {
    "base": 111,
    "large": 343,
    "xlarge": 775,
    "xxlarge": 1411,
}  # million, LlamaGen's table 1 (1.4B for the last)
GIVEN = {"vocab_size": 16, "grid_size": [4, 4]}


@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_have_the_published_numbers_of_parameters(size):
    config = PriorConfig(vocab_size=16384, grid_size=[16, 16], num_classes=1000, **SIZES[size])
    with torch.device("meta"):
        prior = AutoregressivePrior(config)
    millions = sum(parameter.numel() for parameter in prior.parameters()) / 1e6
    assert round(millions) == PUBLISHED.get(size, 14)


def test_the_defaults_are_the_laptop_size():
    assert PriorConfig(**GIVEN) == PriorConfig(**GIVEN, **SIZES["laptop"])


def test_a_tuple_becomes_a_list_as_json_gives_it_back():
    assert PriorConfig(vocab_size=16, grid_size=(4, 4)) == PriorConfig(vocab_size=16, grid_size=[4, 4])


def test_a_config_of_the_first_version_has_one_grid_one_codebook_no_names_and_the_identity_that_it_had():
    values = asdict(PriorConfig(**GIVEN))
    first = {key: value for key, value in values.items() if key not in PriorConfig.later_keys}
    assert len(first) == len(values) - 3
    assert PriorConfig.from_dict(first, 1, "here") == PriorConfig(**GIVEN)
    assert PriorConfig(**GIVEN).identity() == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vocab_size": 1}, "vocab_size=1 must be at least 2"),
        ({"vocab_size": 2**20 + 1}, "vocab_size=1048577 must be at most 1048576: .*; use a tokenizer of fewer codes"),
        ({"vocab_size": 16.5}, "vocab_size=16.5 must be of type int"),
        ({"grid_size": [4]}, r"grid_size=\[4\] must be \[h, w\]"),
        ({"grid_size": [4, 0]}, r"grid_size=\[4, 0\] must be \[h, w\]"),
        ({"grid_size": 4}, "grid_size=4 must be of type list"),
        ({"num_codebooks": 0}, "num_codebooks=0 must be at least 1"),
        ({"coarser_grids": [[1, 0]]}, r"coarser_grids=\[\[1, 0\]\] must be a list of \[h, w\]"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 0"),
        ({"num_classes": 3, "class_names": ["cat", "dog"]}, "2 names for num_classes=3; name all or none"),
        ({"class_names": ["cat"]}, "1 names for num_classes=0"),
        ({"num_classes": 2, "class_names": ["cat", "cat"]}, "class_names has 'cat' more than once"),
        ({"num_classes": 1, "class_names": [3]}, "must be of type list"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"width": -8}, "width=-8 must be at least 1"),
        ({"width": 24, "num_heads": 4}, r"width=24 is not a multiple of 4 \* num_heads=16.*change width or num_heads"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"class_dropout": -0.1}, r"class_dropout=-0.1 must lie in \[0, 1\)"),
        ({"class_dropout": float("nan")}, r"class_dropout=nan must lie in \[0, 1\)"),
        ({"tokenizer": "/home/me/runs/vqvae"}, "tokenizer='/home/me/runs/vqvae' must be a repo id"),
        ({"tokenizer_fingerprint": "abc"}, "tokenizer_fingerprint='abc' must be 64 hexadecimal digits"),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_the_rule(wrong, message):
    with pytest.raises(ValueError, match=message):
        PriorConfig(**GIVEN | wrong)
