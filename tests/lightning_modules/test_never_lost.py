"""Full disks, damaged checkpoints, changed data and losses that are no number: no run is lost."""

import csv
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.run_log import RunLog
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = 8
MODEL = ["--model", "GLA", "--model.d_model", "16", "--model.n_layers", "1",
         "--model.optim.total_steps", "20"]  # fmt: skip
TEXT = [
    "--data", "Text", "--data.path", "text.txt", "--data.seq_len", "16", "--data.batch_size", "2",
]  # fmt: skip
COMMON = [
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1",
    "--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", "4",
    "--checkpoints.every_n_steps", "2", "--trainer.max_steps",
]  # fmt: skip
CALLBACKS = """
import torch
from lightning.pytorch import Callback

class Poison(Callback):
    \"\"\"Make the loss, or a gradient, of a step nan.\"\"\"
    def __init__(self, step: int, what: str = "loss"):
        self.step, self.what = step, what
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and self.what == "loss":
            with torch.no_grad():
                self.before = module.net.lm_head.weight[0, 0].item()
                module.net.lm_head.weight[0, 0] = float("nan")
    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            if self.what == "loss":
                with torch.no_grad():
                    module.net.lm_head.weight[0, 0] = self.before
            else:
                module.net.lm_head.weight.grad[0, 0] = float(self.what)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a text and callbacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    write_text()
    Path("poisoning.py").write_text(CALLBACKS)
    yield tmp_path
    sys.modules.pop("poisoning", None)


def write_text(last="."):
    lines = "".join(f"Line {i} says {i * i} and {i % 7}.\n\n" for i in range(16))
    Path("text.txt").write_text(lines + last)


def fit(name, *more, steps=STEPS, data=TEXT):
    """Train in ``runs/NAME``, and return the newest run's folder there."""
    main(["fit", *MODEL, *data, *COMMON, str(steps), "--name", name, *more])
    return max(Path("runs", name).glob("version_*"))


def failure(capsys, *arguments, **settings):
    """Return exit code and message of a fit that fails."""
    with pytest.raises(SystemExit) as stopped:
        fit(*arguments, **settings)
    return stopped.value.code, capsys.readouterr().err


def rows(run):
    """Return the log without what the clock says."""
    with (run / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "second" not in k} for row in found]


def weights(run, name="last"):
    return ckpt.read_whole(run / f"{name}.ckpt")["state_dict"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in one.items())


def steps_of(run):
    return {f.stem: ckpt.read_whole(f)["global_step"] for f in run.glob("*.ckpt")}


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:  # a byte inside of a tensor, which torch reads without a word
        at = content.find(next(iter(ckpt.read(file)["state_dict"].values())).numpy().tobytes())
        assert at > 0
        content[at] ^= 255
    file.write_bytes(content)


# ------------------------------------------------------------------- where a run goes on


def test_a_run_goes_on_in_its_folder_and_its_log_reads_as_if_it_had_never_stopped(folder):
    whole = fit("whole")
    assert {f.name for f in whole.iterdir()} >= {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert steps_of(whole)["last"] == STEPS
    for last in ("new", "again"):  # the first begins it, as there is none; the second goes on
        run = fit("parts", "--ckpt_path", "last", steps={"new": 5, "again": STEPS}[last])
        Path(run, "last.ckpt.part").write_bytes(b"left by a kill")
        with (run / "metrics.csv").open("a") as file:
            file.write("0,5,9.9")  # cut off in the middle of a row
    assert run == Path("runs/parts/version_0")
    fit("parts", "--ckpt_path", "runs/parts", steps=STEPS + 2)
    fit("whole", "--ckpt_path", str(whole), steps=STEPS + 2)
    assert not list(run.glob("*.part"))
    assert len(list(Path("runs/parts").iterdir())) == 1
    assert [r["step"] for r in rows(run) if r["train/nll"]] == [str(i) for i in range(STEPS + 2)]
    assert same(weights(run), weights(whole))
    assert "ckpt_path: null" in (run / "config.yaml").read_text()


@pytest.mark.parametrize("interval", ["4", "6"])  # a validation at the end of epochs, or not
def test_a_run_that_goes_on_at_the_end_of_epochs_counts_them_right(interval, folder):
    epochs = ["--trainer.limit_train_batches", "4", "--trainer.val_check_interval", interval]
    whole = fit("whole", *epochs, steps=12)
    for steps in (4, 8, 12):
        run = fit("parts", *epochs, "--ckpt_path", "last", steps=steps)
    got, want = (
        [(r["epoch"], r["step"], r["train/nll"]) for r in rows(x) if r["train/nll"]]
        for x in (run, whole)
    )
    assert got == want
    assert [int(epoch) for epoch, _, _ in got] == [i // 4 for i in range(12)]


def test_a_file_or_another_name_begins_a_new_run(folder):
    first = fit("one")
    second = fit("one", "--ckpt_path", str(first / "last.ckpt"), steps=STEPS + 2)
    assert second.name == "version_1"
    assert steps_of(first)["last"] == STEPS
    assert fit("two", "--ckpt_path", str(first), steps=STEPS + 2) == Path("runs/two/version_0")


def test_rows_of_lost_work_give_way(tmp_path):
    for lines in (range(6), range(3, 7)):
        log = RunLog(tmp_path, name="r", version="v")
        for step in lines:
            log.log_metrics({"a": step + len(lines)}, step)
            log.log_metrics({"a": step + len(lines)}, step)  # said twice, written once
            log.save()
        log.log_metrics({"b": 1.0}, step)
        log.save()
    with (tmp_path / "r/v/metrics.csv").open(newline="") as file:
        got = [(int(r["step"]), r["a"], r["b"]) for r in csv.DictReader(file)]
    assert got == [(0, "6", ""), (1, "7", ""), (2, "8", ""), *(
        (i, str(i + 4), "") for i in range(3, 7)
    ), (6, "", "1.0")]  # fmt: skip


# ------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, folder, caplog):
    whole = fit("whole")
    shutil.copytree("runs/whole", "runs/hurt")
    run = Path("runs/hurt/version_0")
    (run / "best.ckpt").unlink()  # which is as new as the last
    before = steps_of(run)["previous"]
    damage(run / "last.ckpt", how)
    with pytest.raises(ckpt.CheckpointError, match=r"damaged|cut off"):
        ckpt.read_whole(run / "last.ckpt")
    fit("hurt", "--ckpt_path", str(run))
    assert f"{run / 'last.ckpt'}" in caplog.text
    assert "Going on from previous.ckpt instead." in caplog.text
    assert (run / "last.ckpt.damaged").is_file()
    assert before < steps_of(run)["last"] == STEPS
    assert same(weights(run), weights(whole))
    assert rows(run) == rows(whole)


def test_nothing_left_to_go_on_from(folder, capsys):
    run = fit("hurt")
    damage(run / "last.ckpt", "flipped")
    code, said = failure(capsys, "new", "--ckpt_path", str(run / "last.ckpt"))
    assert code == 2
    assert "last.ckpt' is damaged: its part 'last/data/" in said or "is damaged: its part" in said
    assert f"--ckpt_path {run}, and it goes on from the newest checkpoint that can be read." in said
    for name in ("previous", "best"):
        damage(run / f"{name}.ckpt", "cut")
    code, said = failure(capsys, "hurt", "--ckpt_path", str(run))
    assert code == 2
    assert f"no checkpoint of {str(run)!r} can be read:" in said
    assert all(f"{name}.ckpt' is" in said for name in ("last", "previous", "best"))
    assert "Put back a copy of one, or start a new run without --ckpt_path." in said


# ------------------------------------------------------------------------------ full disk


class Full:
    """A disk that is full while ``steps`` are made; what was begun stays half written."""

    def __init__(self, monkeypatch, steps):
        self.save = torch.save
        self.steps = steps
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, content, file):
        if content["global_step"] in self.steps:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.save(content, file)


def test_a_full_disk_costs_no_checkpoint_and_training_goes_on(folder, monkeypatch, caplog):
    whole = fit("whole")
    Full(monkeypatch, {4, 6})
    run = fit("full")
    assert (
        "runs/full/version_0/last.ckpt could not be written at step 4 (No space left on device); "
        "the one of step 2 is kept, training goes on, and it is tried again in 2 steps: make room"
    ) in caplog.text
    assert "best.ckpt could not be written at step 4 (No space left" in caplog.text
    assert same(weights(run), weights(whole))
    assert steps_of(run) == {"last": STEPS, "previous": 2, "best": STEPS}
    assert not list(run.glob("*.part"))


def test_a_disk_that_is_full_at_the_end_is_an_error(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        Full(patch, {STEPS})
        code, said = failure(capsys, "full")
    run = Path("runs/full/version_0")
    assert code == 1
    assert (
        f"{run / 'last.ckpt'} could not be written at the last step, {STEPS} (No space left on "
        f"device); the one of step 6 is kept: make room and go on with --ckpt_path {run}."
    ) in said
    assert same(weights(fit("full", "--ckpt_path", str(run))), weights(fit("whole")))


SMALL_DISK = """
mount -t tmpfs -o size=400k none runs
exec "$0" -m statezoo "$@"
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full(folder):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs a user namespace to mount a small disk in")
    Path("runs").mkdir()
    command = ["fit", "--model", "GLA", "--model.d_model", "64", "--model.n_layers", "1", *TEXT]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SMALL_DISK, sys.executable, *command, *COMMON, "8"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "could not be written at step 2 (No space left on device); there is none" in done.stderr
    assert "could not be written at the last step, 8" in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- changed data


def test_text_that_has_changed_is_refused(folder, capsys):
    run = fit("text")
    write_text(last="!")  # as long as before
    code, said = failure(capsys, "text", "--ckpt_path", str(run), steps=STEPS + 2)
    assert code == 2
    assert "text.txt is not what it was when the checkpoint was made" in said
    assert "put it back as it was, or start a new run from the weights" in said
    assert steps_of(run)["last"] == STEPS
    write_text()
    code, said = failure(capsys, "text", "--ckpt_path", str(run), "--data.seed", "3")
    assert code == 2
    assert "The checkpoint was made with seed 0, this data has 3" in said
    main(["validate", "--ckpt_path", str(run), *TEXT, "--data.seed", "3"])  # is no going on
    fit("text", "--ckpt_path", str(run), steps=STEPS + 2)


# ------------------------------------------------------------------------------ no number


@pytest.mark.parametrize("what", ["loss", "inf"])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run(what, folder, capsys):
    poison = ["--trainer.callbacks+=poisoning.Poison", "--trainer.callbacks.step=5",
              "--trainer.callbacks.what", what]  # fmt: skip
    code, said = failure(capsys, "sick", *poison)
    run = Path("runs/sick/version_0")
    assert code == 1
    kind = "the training loss is nan" if what == "loss" else "a gradient is inf or nan"
    assert f"{kind} at step 5 (epoch " in said
    assert "of net.model.embeddings.weight, the loss is a number" in said or what == "loss"
    left = torch.load(run / "not_finite.pt", weights_only=True)
    (row,) = left["batches"]
    assert f"batch {row['batch']} (windows {', '.join(map(str, row['windows']))}, moved" in said
    assert f"the last checkpoint is {run / 'last.ckpt'}." in said
    text = Path("text.txt").read_text()
    for ids, written in zip(row["tokens"], row["text"], strict=True):
        assert bytes(ids[1:].tolist()).decode() in written
        assert bytes(ids[1:8].tolist()).decode() in text
    assert steps_of(run)["last"] == 4
    assert same(weights(fit("sick", "--ckpt_path", str(run))), weights(fit("whole")))
