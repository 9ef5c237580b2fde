"""That the kernels are here where they can be, and the memory that they are given."""

import mmap
import pickle
import platform
import shutil
import threading

import pytest
import torch
from torch import Tensor

from tokenizer import kernels
from tokenizer.kernels import LANES, LIBRARY, library, memory
from tokenizer.kernels.memory import LARGE, Reserve, Workspace, empty

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


def test_what_a_large_result_leaves_behind_is_taken_for_the_next_one_of_its_size():
    first = empty(2, 3, LARGE // 8, 1, memory_format=torch.channels_last)
    assert first.is_contiguous(memory_format=torch.channels_last)
    place = first.data_ptr()
    part = first.permute(0, 2, 3, 1).flatten()[5:].numpy()  # which is memory of the same
    part[:] = 1
    del first
    beside = empty(6, LARGE // 8).fill_(2)
    assert beside.data_ptr() != place
    assert (part == 1).all()
    del part
    assert empty(6, LARGE // 8 + 1).data_ptr() != place
    assert empty(6, LARGE // 8).data_ptr() == place


def test_no_more_is_held_than_allowed_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(memory, "MOST_HELD", 3 * LARGE)
    reserve = Reserve()
    lengths = [LARGE, LARGE + 1, LARGE + 2]
    arrays = [reserve.take(length) for length in lengths]
    assert not reserve.held
    while arrays:
        del arrays[0]
    assert [len(each) for each in reserve.held] == lengths[1:]
    reserve.take(4 * LARGE)
    assert [len(each) for each in reserve.held] == lengths[1:]


def test_threads_share_what_is_held():
    def take_and_leave() -> None:
        for count in 3 * [LARGE // 4, LARGE // 4 + 1]:
            results = [empty(count).fill_(value) for value in range(3)]
            agreed.extend((result == value).all().item() for value, result in enumerate(results))

    agreed: list[bool] = []
    threads = [threading.Thread(target=take_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == [True] * 72


def test_a_large_result_is_a_tensor_like_any_other(tmp_path):
    result = empty(LARGE).fill_(3)
    assert not result._is_view()  # which a function with gradients could not change in place
    torch.save(result, tmp_path / "result.pt")
    assert torch.equal(torch.load(tmp_path / "result.pt"), result)
    assert torch.equal(pickle.loads(pickle.dumps(result)), result)
    result.share_memory_()
    process = torch.multiprocessing.get_context("spawn").Process(target=Tensor.fill_, args=(result, 4))
    process.start()
    process.join()
    assert (result == 4).all()


def test_each_thread_has_its_own_workspace_which_stays():
    workspace, held = Workspace(), []
    first = workspace.of(10)
    assert workspace.of(5).data_ptr() == first.data_ptr()
    assert len(workspace.of(20)) >= 20
    thread = threading.Thread(target=lambda: held.append(workspace.of(20)))
    thread.start()
    thread.join()
    assert held[0].data_ptr() != workspace.of(20).data_ptr()
