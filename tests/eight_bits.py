"""Which tests ask for a processor with products of 8 bits."""

import pytest
import torch

from tokenizer.int8 import is_for_int8

with torch.no_grad():
    HERE = is_for_int8(torch.zeros(1))
in_8_bits = pytest.mark.skipif(not HERE, reason="this processor has no products of 8 bits")
