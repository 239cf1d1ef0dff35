"""An interrupted run, resumed, is the uninterrupted run."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = 14
COMMON = [
    "--data.seq_len", "16", "--data.batch_size", "2", "--trainer.accelerator", "cpu",
    "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "6",
    "--checkpoints.every_n_steps", "3", "--trainer.max_steps", str(STEPS),
]  # fmt: skip
MODEL = ["--model", "GLA", "--model.d_model", "16", "--model.n_layers", "1", "--data", "Text"]
CALLBACKS = """
import os, signal
from lightning.pytorch import Callback

class KillAt(Callback):
    def __init__(self, step: int):
        self.step = step
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

class AskAt(Callback):
    def __init__(self, step: int, name: str):
        self.step, self.name = step, name
        if name == "SIGINT":  # a shell's background jobs ignore it, and so would this process
            signal.signal(signal.SIGINT, signal.default_int_handler)
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), getattr(signal, self.name))

class KeepAll(Callback):
    step = 0
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step != self.step:  # not between the micro-batches of a step
            self.step = trainer.global_step
            trainer.save_checkpoint(f"at-{self.step}.ckpt", weights_only=False)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a text of about five optimiser steps per epoch, and callbacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    paragraphs = (f"Line {i} says {i * i} and {i % 7}.\n\n" for i in range(16))
    Path("text.txt").write_text("".join(paragraphs))
    Path("interrupting.py").write_text(CALLBACKS)
    yield tmp_path
    sys.modules.pop("interrupting", None)


def losses(run):
    """Return the training loss of each step in a run's log."""
    with Path("runs", run, "version_0", "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/nll")]
    return {int(row["step"]): float(row["train/nll"]) for row in rows}


def test_a_run_resumed_at_any_step_is_the_same_run(folder):
    data = ["--data.path", "text.txt", *COMMON]
    main(["fit", *MODEL, *data, "--name", "whole", "--trainer.callbacks+=interrupting.KeepAll"])
    whole = losses("whole")
    assert sorted(whole) == list(range(STEPS))
    for step in (1, 5, 6, 9):  # mid-epoch, near its end, after a validation, in the next epoch
        main(
            ["fit", "--data", "Text", *data, "--ckpt_path", f"at-{step}.ckpt", "--name", f"r{step}"]
        )
        again = losses(f"r{step}")
        assert sorted(again) == list(range(step, STEPS))
        assert again == {n: whole[n] for n in again}, f"resumed at step {step}"


def test_a_killed_run_goes_on_from_its_last_checkpoint(folder):
    data = ["--data.path", "text.txt", *COMMON]
    kill = ["--trainer.callbacks+=interrupting.KillAt", "--trainer.callbacks.step=8"]
    killed = subprocess.run(
        [sys.executable, "-m", "statezoo", "fit", *MODEL, *data, "--name", "killed", *kill],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    main(["fit", *MODEL, *data, "--name", "whole"])
    main(["fit", *MODEL, *data, "--name", "resumed", "--ckpt_path", "runs/killed"])
    whole, resumed = losses("whole"), losses("resumed")
    assert min(resumed) == 6  # the last multiple of checkpoints.every_n_steps before step 8
    assert resumed == {n: whole[n] for n in resumed}


@pytest.mark.parametrize(("name", "code", "saved"), [("SIGTERM", 143, 5), ("SIGINT", 1, 3)])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on(name, code, saved, folder):
    callback = ["--trainer.callbacks+=interrupting.AskAt", "--trainer.callbacks.step", "4",
                "--trainer.callbacks.name", name]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "statezoo", "fit", *MODEL, "--data.path", "text.txt", *COMMON,
         *callback], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert f"saved at {saved}: go on with  statezoo fit --config runs" in done.stderr
    assert "Traceback" not in done.stderr
