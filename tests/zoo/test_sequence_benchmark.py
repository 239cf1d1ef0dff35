"""The benchmark of sequence parallelism on one mixer, and what it says where something is wrong."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "sequence_parallel.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("sequence_parallel", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_process_measures_and_tells(benchmark, tmp_path, capsys):
    benchmark.work(0, 1, str(tmp_path), ["gla", "attention"], [48, 96])
    equal, sent = torch.load(tmp_path / "1.pt")
    assert [row["mixer"] for row in equal] == ["gla", "attention"]
    assert benchmark.show_equality(equal) == []
    assert benchmark.show_traffic(sent, [48, 96]) == []
    said = capsys.readouterr().out
    state, gates = 4 * 8 * 16 * 4, 4 * 8 * 4  # 4 heads of 8 by 16 in float32, and their decays
    row = f"| gla | 1 | state | 1 + 1 | {state + gates:,} / {state + gates:,} | "
    assert row + f"{state:,} / {state:,} | no |" in said
    keys = 2 * 48 * 64 * 4
    assert f"| attention | 1 | keys, values | 1 + 1 | {keys:,} / {2 * keys:,} | " in said
    assert "| with T |" in said


def test_what_is_wrong_is_said(benchmark, capsys):
    row = {"mixer": "gla", "processes": 2, "outputs": 1e-14, "gradients": float("nan")}
    assert benchmark.show_equality([row]) == ["gla on 2 processes is off by more than 1e-10"]
    rows = [
        {"mixer": "gla", "processes": 2, "length": T, "part": "state", "pass": "forward",
         "collectives": 1, "bytes": T}
        for T in (8, 16)
    ]  # fmt: skip
    (wrong,) = benchmark.show_traffic(rows, [8, 16])
    assert wrong == "what gla sends on 2 processes grows with T: state"


def test_lengths_that_cannot_be_cut_are_refused(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sequence_parallel.py", "--lengths", "258"])
    with pytest.raises(SystemExit):
        benchmark.arguments()
    assert "4 processes cannot have slices of one length of [258] tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_by_one_command(tmp_path):
    command = [sys.executable, FILE, "--mixers", "mamba", "--processes", "2", "--out", tmp_path]
    run = subprocess.run(
        [*map(str, command), "--lengths", "64", "128"], capture_output=True, text=True, timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = csv.DictReader((tmp_path / "equality.csv").open())
    assert float(row["gradients"]) < 1e-10
    parts = {(r["part"], r["pass"]) for r in csv.DictReader((tmp_path / "traffic.csv").open())}
    assert parts == {(p, w) for p in ("state", "halo") for w in ("forward", "backward")}
