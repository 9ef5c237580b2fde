"""A batch in parts: which pictures a network sees together, and in what type and layout."""

import pytest
import torch

from tokenizer.rounding import by_parts, laid_out

PICTURES = torch.arange(5.0 * 2 * 3 * 4).view(5, 2, 3, 4)


@pytest.mark.parametrize(("training", "sizes"), [(False, [1] * 5), (True, [5])])
def test_one_at_a_time_but_in_training_all_of_them(training, sizes):
    seen = []

    def scaled(pictures, factors):
        seen.append(len(pictures))
        return pictures * factors.view(-1, 1, 1, 1)

    factors = torch.arange(5.0)
    assert torch.equal(by_parts(scaled, [PICTURES, factors], training), PICTURES * factors.view(-1, 1, 1, 1))
    assert seen == sizes


def test_features_take_the_type_of_the_weights_and_one_layout():
    network = torch.nn.Conv2d(2, 2, 1, dtype=torch.bfloat16)
    for given in (PICTURES, PICTURES.contiguous(memory_format=torch.channels_last)):
        features = laid_out(given, network)
        assert features.dtype == torch.bfloat16
        assert features.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(features, PICTURES.bfloat16())
