"""Models as shapes and types alone: nothing is drawn at random, and nothing is imported that takes seconds."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from test_architecture import ROOT, SLOW

from tokenizer import ImageTokenizer
from tokenizer.unfilled import unfilled

BUILD_AND_REPORT = """
import json, sys
from prior import PRIORS, PriorConfig
from tokenizer import POSTERIORS, QUANTIZERS, ImageTokenizer, ImageVAE, TokenizerConfig, VAEConfig
from tokenizer.unfilled import unfilled

normed = {"name": "convolutional", "norm_groups": 4, "attention_levels": [0], "middle_attention": True}
makers = {"normed": lambda: ImageTokenizer(TokenizerConfig(autoencoder=normed, num_classes=3))}
for name in QUANTIZERS:
    makers[name] = lambda name=name: ImageTokenizer(TokenizerConfig(codebook_dim=4, quantizer={"name": name}))
for name in POSTERIORS:
    makers[name] = lambda name=name: ImageVAE(VAEConfig(posterior={"name": name}))
for name in PRIORS:
    makers[name] = lambda name=name: PRIORS[name](PriorConfig(vocab_size=8, grid_size=[2, 2]))
slow = {}
for name, make in makers.items():
    unfilled(make)
    slow[name] = [each for each in SLOW if each in sys.modules]
print(json.dumps(slow))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What of the slow had been imported after each member of each table was made, in a process of its own."""
    code = BUILD_AND_REPORT.replace("SLOW", repr(SLOW))
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_a_model_of_any_table_is_laid_out_without_the_compiler(imported):
    assert len(imported) > 15
    assert {name: slow for name, slow in imported.items() if slow} == {}


def test_a_model_without_weights_has_the_shapes_and_types_of_one_with_weights_and_draws_nothing():
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    empty = unfilled(lambda: ImageTokenizer(tiny_config())).state_dict()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {tensor.device.type for tensor in empty.values()} == {"meta"}
    full = ImageTokenizer(tiny_config()).state_dict()
    assert shapes_and_types(empty) == shapes_and_types(full)


def shapes_and_types(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_after_it_weights_are_drawn_again():
    unfilled(lambda: torch.nn.Linear(4, 4))
    assert torch.nn.Linear(4, 4).weight.std() > 0
    assert torch.randn(8).std() > 0
