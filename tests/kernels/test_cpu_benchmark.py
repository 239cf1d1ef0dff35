"""The CPU benchmark's comparisons run, at sizes that say nothing about speed."""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "cpu_kernels.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("cpu_kernels", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_is_measured(benchmark):
    torch.use_deterministic_algorithms(False)  # transformers' forms have no deterministic backward
    rows = [*benchmark.matrix_rows((1, 64, 2, 16), 1), *benchmark.scan_rows(16, 1, 16)]
    assert len(rows) == 10
    for row in rows:
        name, ours, *rest = benchmark.measure(row).strip("| ").split(" | ")
        assert name == row.name
        if row.peer is not None:  # else fla is not installed here, and the table says so
            assert float(ours) > 0
            assert float(rest[1]) > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read off Linux")
def test_peak_memory_is_within_its_limit(benchmark):
    cells = benchmark.peak("scalar gate", 4096).strip("| ").split(" | ")
    assert 1 <= float(cells[3]) < float(cells[4])
