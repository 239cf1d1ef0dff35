"""How fused kernels are launched: block sizes, pipelining, the search that is only on request."""

import pytest
import torch
from tests.kernels.fused import DEVICE  # before triton: sets the interpreter
from triton.runtime.errors import OutOfResources

from statezoo.kernels import _fused
from statezoo.kernels._fused import Hardware, Launch

H200 = Hardware(units=132, shared=227 * 1024)
GPU = torch.device("cuda", 0)


class Kernel:
    """Stands for a kernel: runs where it fits, and counts."""

    def __init__(self, most_stages):
        self.most_stages, self.ran = most_stages, []

    def __getitem__(self, grid):
        def run(num_warps, num_stages, x=None, **args):
            if num_stages > self.most_stages:
                raise OutOfResources(1, 0, "shared memory")
            self.ran.append((grid, num_warps, num_stages))
            if x is not None:
                x += 1

        return run

    __name__ = "kernel"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(_fused, "hardware", lambda device: H200)
    monkeypatch.setattr(_fused, "on", lambda device: _fused.nullcontext())
    monkeypatch.setattr(_fused, "_found", {})


def test_blocks_are_powers_of_two_from_16():
    assert [_fused.block(w, 64) for w in (1, 16, 17, 33, 64, 200)] == [16, 16, 32, 64, 64, 64]


@pytest.mark.usefixtures("gpu")
def test_walks_are_split_until_they_fill_the_gpu():
    assert _fused.scan_block(128, 64, 128, GPU) == 64  # 256 walks
    assert _fused.scan_block(128, 64, 32, GPU) == 32  # 128 walks
    assert _fused.scan_block(128, 64, 16, GPU) == 16  # 8 blocks of 16: 128 walks, as far as it goes
    assert _fused.scan_block(128, 64, 1, torch.device("cpu")) == 64


@pytest.mark.usefixtures("gpu")
def test_depth_goes_by_shared_memory():
    assert [_fused.depth(GPU, 3, size << 10) for size in (20, 70, 100, 300)] == [3, 2, 1, 1]


@pytest.mark.usefixtures("gpu")
def test_what_does_not_fit_runs_with_fewer_stages():
    kernel = Kernel(1)
    _fused.launch(kernel, 7, Launch(4, 3), GPU)
    assert kernel.ran == [((7,), 4, 1)]
    with pytest.raises(OutOfResources):
        _fused.launch(Kernel(0), 7, Launch(4, 3), GPU)
    _fused.launch(Kernel(0), 0, Launch(4, 3), GPU)  # nothing to run


@pytest.mark.usefixtures("gpu")
def test_search_takes_the_fastest_once_and_leaves_the_arguments_alone(monkeypatch):
    monkeypatch.setenv("STATEZOO_AUTOTUNE", "1")

    def do_bench(run, return_mode):
        run()
        return 1.0 if kernel.ran[-1][1:] == (2, 2) else 2.0

    monkeypatch.setattr(_fused.triton.testing, "do_bench", do_bench)
    kernel, x = Kernel(3), torch.zeros(1)
    _fused.launch(kernel, 7, Launch(4, 3), GPU, x=x, T=5, C=64)
    assert kernel.ran[-1] == ((7,), 2, 2)
    assert x == 1
    tried = len(kernel.ran)
    _fused.launch(kernel, 9, Launch(4, 3), GPU, x=x, T=6, C=64)
    assert len(kernel.ran) == tried + 1, "a new length was searched for"


def test_chunk_tables_of_packed_sequences():
    cu = torch.tensor([0, 17, 17, 18, 70], device=DEVICE)
    at = _fused.layout(torch.zeros(1, 70, 1, 1, device=DEVICE), cu)
    assert (at.C, at.total) == (32, 70 // 32 + 4)
    assert at.starts.tolist() == [0, 1, 1, 2, 4]
    assert at.segment.tolist() == [0, 2, 3, 3, 4, 4]
