"""FSDP2: what its checkpoints are, who reads them, and what is trained with it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tests.lightning_modules.ranks import WORDS, UnevenData, spawn, trainer
from tests.lightning_modules.test_ranks import Losses

from statezoo.lightning_modules import (
    FSDP2,
    CausalLM,
    CheckpointError,
    load_checkpoint,
    load_network,
)
from statezoo.lightning_modules import checkpoint as ckpt
from statezoo.lightning_modules.callbacks import ExportHub
from statezoo.lightning_modules.checkpoints import Checkpoints
from statezoo.lightning_modules.network import export_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
MIXERS = [{"name": "gla", "n_heads": 2}, {"name": "mamba2", "head_dim": 8, "d_state": 4}]
STEPS, HALF = 6, 3


class KeepAll(Callback):
    """Keeps the state of one step more, as a checkpoint of its own."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == HALF and not trainer.fit_loop._should_accumulate():
            folder = Path(trainer.default_root_dir)
            trainer.save_checkpoint(folder / f"half-{type(trainer.strategy).__name__}.ckpt")


def fit(folder, strategy="auto", rank=0, world=1, ckpt_path=None, run=None, start=None, **settings):
    """Train on batches of four windows, two to a step; return losses and whole weights."""
    seed_everything(1, verbose=False)
    given = {"optim": {"clip_norm": 0.1}, "tie_embeddings": True, **(start or {})}
    module = CausalLM(MIXERS, vocab_size=WORDS, d_model=16, n_layers=2, **given)
    losses, more = Losses(), [KeepAll()] if ckpt_path is None else []
    if run is not None:
        more += [Checkpoints(every_n_steps=2, folder=str(run)), ExportHub("export")]
        settings["enable_checkpointing"] = True
    made = trainer(
        run or folder, strategy, rank, world, callbacks=[losses, *more], max_steps=STEPS,
        accumulate_grad_batches=2, val_check_interval=2 * STEPS, **settings,
    )  # fmt: skip
    made.fit(module, UnevenData(4 // world), ckpt_path=ckpt_path)
    state = module.state_dict()
    whole = {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in state.items()}
    return losses.seen, whole


def near(got, want):
    """Compare losses and weights."""
    assert got[0]
    assert all(abs(got[0][i] - want[0][i]) < 1e-5 for i in got[0])
    assert all(torch.allclose(got[1][k], x, atol=1e-4) for k, x in want[1].items())


def two(rank, world, folder):
    """Two processes: a run, one that resumes a file of one process, and frozen parts."""
    folder = Path(folder)
    found = fit(folder, "fsdp2", rank, world, run=folder / "run")
    resumed = fit(folder, "fsdp2", rank, world, ckpt_path=folder / "half-SingleDeviceStrategy.ckpt")
    cases = {}
    for tune in ("lora", "head", "state"):
        start = {"pretrained": str(folder / "half-SingleDeviceStrategy.ckpt"), "tune": tune}
        cases[tune] = fit(folder / tune, "fsdp2", rank, world, start=start)
    for precision in ("bf16-mixed", "bf16-true"):
        cases[precision] = fit(folder / precision, "fsdp2", rank, world, precision=precision)
    if rank == 0:
        torch.save([found, resumed, cases], folder / "two.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process trains, and two."""
    folder = tmp_path_factory.mktemp("runs")
    one = fit(folder)
    spawn(two, 2, folder, str(folder))
    return folder, one, torch.load(folder / "two.pt", weights_only=True)


def test_two_processes_train_what_one_does(runs):
    _, one, (found, _, _) = runs
    assert sorted(found[0]) == list(range(1, STEPS + 1))
    near(found, one)


def test_a_checkpoint_of_two_processes_resumes_on_one(runs):
    folder, one, _ = runs
    half = folder / "run" / "half-FSDP2.ckpt"
    resumed = fit(folder, ckpt_path=half)
    assert sorted(resumed[0]) == list(range(HALF + 1, STEPS + 1))
    near(resumed, one)


def test_a_checkpoint_of_one_process_resumes_on_two(runs):
    _, one, (_, resumed, _) = runs
    assert sorted(resumed[0]) == list(range(HALF + 1, STEPS + 1))
    near(resumed, one)


@pytest.mark.parametrize("tune", ["lora", "head", "state"])
def test_parts_are_trained_as_on_one_process(runs, tune):
    folder, _, (_, _, cases) = runs
    start = {"pretrained": str(folder / "half-SingleDeviceStrategy.ckpt"), "tune": tune}
    near(cases[tune], fit(folder / f"one-{tune}", start=start))


@pytest.mark.parametrize(("precision", "allowed"), [("bf16-mixed", 2e-3), ("bf16-true", 2e-2)])
def test_lower_precision(runs, precision, allowed):
    folder, _, (_, _, cases) = runs
    losses, weights = fit(folder / f"one-{precision}", precision=precision)
    assert all(abs(cases[precision][0][i] - losses[i]) < allowed for i in losses)  # 8 bits each
    assert all(cases[precision][1][k].dtype == x.dtype for k, x in weights.items())


def test_shards_are_read_wherever_checkpoints_are(runs, tmp_path):
    folder, _, ((_, weights), _, _) = runs
    last = folder / "run" / "last.ckpt"
    module = load_checkpoint(last)
    assert all(torch.equal(x, weights[name]) for name, x in module.state_dict().items())
    net = load_network(export_checkpoint(last, tmp_path / "hub"))
    assert all(torch.equal(x, weights[f"net.{name}"]) for name, x in net.state_dict().items())
    assert net.lm_head.weight is net.model.embeddings.weight
    exported = load_network(folder / "run" / "export")
    best = load_network(folder / "run" / "best.ckpt")
    for name, x in best.state_dict().items():
        assert torch.equal(exported.state_dict()[name], x)


def test_every_process_writes_its_part_and_no_shard_is_left_over(runs):
    folder = runs[0] / "run"
    kept = {"last.ckpt", "previous.ckpt", "best.ckpt", "half-FSDP2.ckpt"}
    assert {file.name for file in folder.glob("*.ckpt*")} == kept
    named = {torch.load(folder / n, weights_only=True)["shards"]["folder"] for n in kept}
    assert {part.name for part in (folder / "shards").iterdir()} == named
    parts = [sorted(part.iterdir()) for part in (folder / "shards").iterdir()]
    assert all(len(files) == 2 for files in parts)
    assert all(1 / 3 < a.stat().st_size / b.stat().st_size < 3 for a, b in parts)


@pytest.fixture
def copied(runs, tmp_path):
    """Return a copy of the last checkpoint, what its file holds, and its first shard."""
    run, target = runs[0] / "run", tmp_path / "last.ckpt"
    content = torch.load(run / "last.ckpt", weights_only=True)
    folder = content["shards"]["folder"]
    shutil.copytree(run / "shards" / folder, tmp_path / "shards" / folder)
    shutil.copy(run / "last.ckpt", target)
    return target, content, min((tmp_path / "shards" / folder).iterdir())


def test_what_is_wrong_with_shards_is_told(copied):
    last, _, shard = copied
    assert ckpt.read_whole(last)["state_dict"]["net.lm_head.weight"].shape == (WORDS, 16)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    ckpt.read(last)
    with pytest.raises(CheckpointError, match=f"{shard.name} is not what was written: that folder"):
        ckpt.read_whole(last)
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} is cut off"):
        load_checkpoint(last)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing: that folder belongs to"):
        load_checkpoint(last)
    with pytest.raises(CheckpointError, match=r"is read by .*load_checkpoint\(PATH\)"):
        CausalLM.load_from_checkpoint(last, weights_only=True)


def claims_more(path):
    """Let a shard say that its tensors lie far behind the end."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + n])
    places = json.loads(head["__metadata__"]["DCP_SHARDING_INFO"])
    for said in places.values():
        said["saved_offsets"][0] = 1 << 40
    head["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + n :])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folder": "../shards"}, "its shards would be in '../shards'"),
        ({"files": {"/etc/passwd": [1, 1]}}, "its shards would be in '/etc/passwd'"),
        ({"files": None}, "does not say what its shards are"),
    ],
)
def test_hostile_indices_are_refused(copied, change, said):
    last, content, _ = copied
    content["shards"] |= change
    torch.save(content, last)
    with pytest.raises(CheckpointError, match=said):
        ckpt.read(last)


def test_tensors_larger_than_the_files_are_refused(copied):
    last, content, shard = copied
    claims_more(shard)
    content["shards"]["files"][shard.name][0] = shard.stat().st_size
    torch.save(content, last)
    with pytest.raises(CheckpointError, match="has gaps"):
        ckpt.read(last)


def test_losses_that_are_scaled_are_refused(tmp_path):
    strategy = FSDP2()
    strategy.precision_plugin = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ValueError, match="fsdp2 needs a precision of 32-true, bf16-mixed, bf16-tr"):
        strategy.setup(None)


def four(rank, world, folder):
    """Four processes go on with what two have begun."""
    folder = Path(folder)
    resumed = fit(folder, "fsdp2", rank, world, ckpt_path=folder / "run" / "half-FSDP2.ckpt")
    if rank == 0:
        torch.save(resumed, folder / "four.pt")


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_resumes_on_four(runs):
    folder, one, _ = runs
    spawn(four, 4, folder, str(folder))
    resumed = torch.load(folder / "four.pt", weights_only=True)
    assert sorted(resumed[0]) == list(range(HALF + 1, STEPS + 1))
    near(resumed, one)


DYING = """
import os, signal
from lightning.pytorch import Callback

class Die(Callback):
    def __init__(self, rank: int, how: str):
        self.rank, self.how = rank, how
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5 and trainer.global_rank == self.rank:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the data has a hole")
"""
COMMAND = [
    "--data", "Text", "--data.path", "text.txt", "--data.seq_len", "16",
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.max_steps", "8",
    "--trainer.enable_progress_bar", "false", "--checkpoints.every_n_steps", "2",
]  # fmt: skip


def statezoo(folder, *arguments):
    """Run a command; return its exit code and what it said."""
    environment = {"OMP_NUM_THREADS": "1", "STATEZOO_CACHE": "cache", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "statezoo", *arguments], cwd=folder, capture_output=True, text=True,
        timeout=600, env={**os.environ, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def losses(folder, name):
    """Return the training loss of each step in a run's log."""
    with (folder / "runs" / name / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/nll")]
    return {int(row["step"]): float(row["train/nll"]) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank", "strategy"),
    [("kill", 1, "fsdp2"), ("raise", 1, "ddp"), ("raise", 0, "fsdp2"), ("kill", 0, "ddp")],
)
def test_a_process_that_dies_ends_the_run_which_goes_on(tmp_path, how, rank, strategy):
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(64)))
    model = ["--model", "GLA", "--model.d_model", "16", "--model.n_layers", "1"]
    spread = ["--trainer.strategy", strategy, "--trainer.devices", "2", "--data.batch_size", "2"]
    die = ["--trainer.callbacks+=dying.Die", f"--trainer.callbacks.rank={rank}",
           f"--trainer.callbacks.how={how}"]  # fmt: skip
    code, said = statezoo(tmp_path, "fit", *model, *COMMAND, *spread, *die, "--name", "dies")
    if how == "raise":
        assert "statezoo fit: error: the data has a hole" in said
    if (how, rank) == ("kill", 0):
        assert code == -signal.SIGKILL
    else:
        assert code in (1, 2)
    if rank == 1:
        reason = "was killed by signal 9 (SIGKILL)" if how == "kill" else "ended with exit code 2"
        assert f"process 0 of 2 stops at step 5: process 1 {reason}" in said
        assert f"go on with --ckpt_path {Path('runs', 'dies', 'version_0')}." in said
    folder = tmp_path / "runs" / "dies" / "version_0"
    assert ckpt.read_whole(folder / "last.ckpt")["global_step"] == 4
    again = ["--data.batch_size", "4", "--ckpt_path", str(folder / "last.ckpt"), "--name", "again"]
    code, told = statezoo(tmp_path, "fit", *COMMAND, *again)
    assert code == 0, told
    code, told = statezoo(
        tmp_path, "fit", *model, *COMMAND, "--data.batch_size", "4", "--name", "whole"
    )
    assert code == 0, told
    whole, resumed = losses(tmp_path, "whole"), losses(tmp_path, "again")
    assert sorted(resumed) == [4, 5, 6, 7]
    assert resumed == pytest.approx({i: whole[i] for i in resumed}, abs=1e-5)
    code, told = statezoo(tmp_path, "generate", "--ckpt", str(folder), "--prompt", "Line",
                          "--max_new_tokens", "4")  # fmt: skip
    assert code == 0, told
