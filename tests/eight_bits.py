"""Which tests ask for a processor with products of 8 bits."""

import pytest
import torch

from tokenizer.int8 import is_for_int8

REASON = "this processor has no products of 8 bits"

with torch.no_grad():
    in_8_bits = pytest.mark.skipif(not is_for_int8(torch.zeros(1)), reason=REASON)
    in_8_bits_from_bfloat16 = pytest.mark.skipif(not is_for_int8(torch.zeros(1).bfloat16()), reason=REASON)
