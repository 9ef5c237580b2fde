"""That the kernels are here where they can be, and the memory that they are given."""

import mmap
import platform
import shutil
import threading

import pytest
import torch

from tokenizer import kernels
from tokenizer.kernels import LANES, LARGE, LIBRARY, Workspace, empty, library

X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.skipif(not (X86 and shutil.which("cc")), reason="there is no compiler, or they are for other processors")
def test_where_there_is_a_compiler_they_were_built():
    """Else everything would still work, and take three times as long."""
    assert LIBRARY is not None
    assert {"AVX2": 8, "AVX512": 16}[torch.backends.cpu.get_cpu_capability()] == LANES
    assert library("avx2").lanes() == 8


def test_where_they_were_not_built_there_is_no_library():
    assert library("default") is None


@pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built here")
def test_one_that_cannot_be_loaded_or_is_of_another_version_is_told_of_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "INTERFACE", -1)
    with pytest.warns(UserWarning, match="it was built from another version; install the package again"):
        assert library("avx2") is None
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / f"avx2{kernels.EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    with pytest.warns(UserWarning, match="is left out, so that all takes longer: .*file too short"):
        assert library("avx2") is None


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize("count", [0, 1, LARGE // 4 - 1, LARGE // 4, LARGE])
def test_memory_is_that_of_any_tensor(count, huge_pages, monkeypatch):
    if not huge_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            tensor = empty(count, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((count, 1), torch.float32, "cpu")
    assert tensor.fill_(1).sum() == count


def test_each_thread_has_its_own_workspace_which_stays():
    workspace, held = Workspace(), []
    first = workspace.of(10)
    assert workspace.of(5).data_ptr() == first.data_ptr()
    assert len(workspace.of(20)) >= 20
    thread = threading.Thread(target=lambda: held.append(workspace.of(20)))
    thread.start()
    thread.join()
    assert held[0].data_ptr() != workspace.of(20).data_ptr()
