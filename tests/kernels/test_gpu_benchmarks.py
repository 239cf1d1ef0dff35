"""The GPU scripts, as far as they run without a GPU."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from tests.kernels.fused import bfloat16_products

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    spec = spec_from_file_location("gpu_kernels", BENCHMARKS / "gpu_kernels.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_kernels", module)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--quick"])
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_says_in_one_line_that_it_needs_a_gpu(script, capsys):
    assert script.main() == 2
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.usefixtures(bfloat16_products.__name__)
@pytest.mark.parametrize("index", [1, 4])
def test_checks_and_rows(script, monkeypatch, index):
    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "CHECKED", (1, 20, 1))
    monkeypatch.setattr(script, "milliseconds", lambda run, budget: run() and 2.0)
    monkeypatch.setattr(script, "peer", lambda op: lambda q, k, v, *gates: v * q.sum())
    op, shape = script.OPS[index], (1, 20, 1, 16)
    assert script.check(op, torch.bfloat16, 16) < script.ALLOWED[torch.bfloat16]
    monkeypatch.setattr(script, "both", lambda function, inputs, budget: (2.0, 4.0))
    cells = script.row(op, shape, script.draw(shape, torch.bfloat16), (1.0, 6.0), 0.0).split(" | ")
    assert cells[2:6] == ["2.000", "2.000", "1.00", "0.50"]
    assert cells[7:11] == ["4.000", "4.000", "1.00", "1.50"]


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
def test_kernels_compile_for_hopper_and_fit(gate):
    command = [sys.executable, BENCHMARKS / "gpu_resources.py", "--widths", "128", "--gates", gate]
    env = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    spilled = [int(line.split("|")[8]) for line in done.stdout.splitlines()[2:]]
    assert len(spilled) >= 9
    assert max(spilled) <= 256  # bytes a thread; a few where gates are per channel
