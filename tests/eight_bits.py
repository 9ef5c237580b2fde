"""Which tests ask for a processor with products of 8 bits."""

import pytest
import torch

from tokenizer.int8 import convolves_int8

REASON = "this processor has no products of 8 bits"

in_8_bits = pytest.mark.skipif(not convolves_int8(torch.float32), reason=REASON)
in_8_bits_from_bfloat16 = pytest.mark.skipif(not convolves_int8(torch.bfloat16), reason=REASON)
