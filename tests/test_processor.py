"""What is concluded from the capabilities that PyTorch tells of processors."""

import pytest
import torch

from tokenizer import processor
from tokenizer.processor import multiplies_bfloat16, multiplies_int8

OLD = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False, "avx512_vnni": False, "avx_vnni": False}
BOTH = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("told", "bfloat16", "int8"),
    [
        (OLD, False, []),  # Skylake and before
        (OLD | {"avx512_vnni": True}, False, BOTH),  # Cascade Lake, Ice Lake
        (OLD | {"avx_vnni": True}, False, [torch.float32]),  # Alder Lake
        (OLD | {"avx512_vnni": True, "avx512_bf16": True}, True, BOTH),  # Zen 4, Cooper Lake
        (OLD | {"avx512_vnni": True, "avx_vnni": True, "amx_bf16": True}, True, BOTH),  # Sapphire Rapids
        ({"architecture": "arm64", "bf16": True}, True, []),
        ({}, True, []),  # an older PyTorch
    ],
)
def test_bfloat16_and_8_bits_are_fast_where_there_are_instructions_for_them(told, bfloat16, int8, monkeypatch):
    monkeypatch.setattr(processor, "CAPABILITIES", told)
    assert multiplies_bfloat16() == bfloat16
    assert [dtype for dtype in (*BOTH, torch.float64, torch.float16) if multiplies_int8(dtype)] == int8


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
