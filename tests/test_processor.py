"""What is concluded from the capabilities that PyTorch tells of processors."""

import pytest
import torch

from tokenizer import processor
from tokenizer.processor import bfloat16_is_faster, multiplies_bfloat16

OLD = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("told", "with_kernels", "without"),
    [
        (OLD, False, False),  # Skylake, Ice Lake
        (OLD | {"avx512_bf16": True}, False, True),  # Zen 4, Cooper Lake
        (OLD | {"avx512_bf16": True, "amx_bf16": True}, True, True),  # Sapphire Rapids
        ({"architecture": "arm64", "bf16": True}, False, True),
        ({}, False, True),  # an older PyTorch
    ],
)
def test_bfloat16_is_faster_where_there_are_instructions_for_it_and_no_kernels(
    told, with_kernels, without, monkeypatch
):
    monkeypatch.setattr(processor, "CAPABILITIES", told)
    assert multiplies_bfloat16() == without
    for library, expected in ((object(), with_kernels), (None, without)):
        monkeypatch.setattr(processor, "LIBRARY", library)
        assert bfloat16_is_faster() == expected


def test_this_pytorch_tells_what_is_asked_for():
    """Of a processor of the x86 family, where a name that changed would go unnoticed."""
    known = processor.CAPABILITIES
    assert known.get("architecture") != "x86_64" or OLD.keys() <= known.keys()


@pytest.mark.parametrize(("machine", "known"), [("x86_64", True), ("AMD64", True), ("aarch64", False)])
def test_operators_of_the_compiler_are_taken_where_somebody_has_measured_them(machine, known, monkeypatch):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    here = known and torch.backends.mkldnn.is_available()
    assert (processor.onednn_operator("mkldnn", "_linear_pointwise") is not None) == here
    assert processor.onednn_operator("mkldnn", "no_such_operator") is None
