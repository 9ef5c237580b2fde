"""Models on a GPU that is not there: its tensors have no values, so that to wait for one is an error, and so is mixing.

Nothing is computed; whether results are right is for the CPU to say.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from prior import AutoregressivePrior, PriorConfig
from tokenizer import QUANTIZERS, ImageTokenizer, TokenizerConfig
from tokenizer.quantizers.gumbel_vq import GumbelVectorQuantizer
from tokenizer.quantizers.placement import PlacedQuantizer

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch knows no GPU")

LAYOUT = {"name": "convolutional", "norm_groups": 8, "middle_attention": True, "channel_multipliers": [1, 2]}


@pytest.fixture(autouse=True)
def no_values():
    with FakeTensorMode():
        yield


@pytest.fixture(params=sorted(QUANTIZERS))
def tokenizer(request):
    config = TokenizerConfig(quantizer={"name": request.param}, autoencoder=LAYOUT)
    with torch.device("cuda"):
        return ImageTokenizer(config)


def test_coding_waits_for_nothing_and_stays_where_it_is(tokenizer):
    images = torch.rand(2, 3, 32, 32, device="cuda")
    tokenizer.eval()
    with torch.no_grad():
        found = tokenizer.quantizer(tokenizer.encode_latents(images))
        pictures = tokenizer.decode_latents(found.quantized)
    assert {each.device.type for each in (found.quantized, found.indices, pictures)} == {"cuda"}


def test_once_the_codes_are_placed_the_forward_pass_of_training_waits_for_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(GumbelVectorQuantizer, "noise_seed", lambda quantizer: None)  # a GPU is needed to draw
    for part in tokenizer.modules():
        if isinstance(part, PlacedQuantizer):
            part.was_placed = True
    output = tokenizer.train()(torch.rand(2, 3, 32, 32, device="cuda"))
    assert {each.device.type for each in (output.reconstructions, output.tokens, *output.losses.values())} == {"cuda"}


def test_a_prior_waits_for_nothing_but_the_last_look_at_its_tokens():
    with torch.device("cuda"):
        prior = AutoregressivePrior(PriorConfig(grid_size=[3, 4], vocab_size=16, width=32, num_layers=2, num_heads=2))
    with pytest.raises(DataDependentOutputException) as waited:
        prior.generate(num_samples=2, temperature=0.9, top_k=3, top_p=0.5)
    (line,) = [entry for entry in waited.traceback if entry.name == "complete"][-1:]
    assert "self.config.vocab_size).any()" in str(line.statement)
