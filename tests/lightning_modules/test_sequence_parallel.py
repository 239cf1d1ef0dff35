"""Runs of several processes that share every sequence are the run of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from tests.lightning_modules.ranks import spawn

from statezoo.kernels import sequence
from statezoo.lightning_modules.sequence_parallel import cut
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
ME = "tests.lightning_modules.test_sequence_parallel"
ROOT = Path(__file__).parents[2]
COMMON = [
    "--data", "Text", "--data.path", "text.txt", "--data.batch_size", "4", "--data.seq_len", "16",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.limit_val_batches", "3", "--model.d_model", "16", "--model.n_layers", "2",
    "--model.optim.total_steps", "4", "--model.optim.warmup_steps", "1",
]  # fmt: skip
DOUBLE, SINGLE = ["--trainer.precision", "64-true"], ["--trainer.precision", "32-true"]
SHARED = ["--trainer.strategy", "sequence_parallel"]
UNCLIPPED = ["--model.optim.clip_norm", "1e9"]
HYBRID = ["--model", "Hybrid", "--model.mixers", "[gla, attention]"]
PACKED = ["--data.packing", "documents"]
CASES = {
    "gla": ["--model", "GLA", *UNCLIPPED],
    "gated_deltanet": ["--model", "GatedDeltaNet", *PACKED, *UNCLIPPED],
    "mamba": ["--model", "Mamba", *UNCLIPPED],
    "hybrid": [*HYBRID, *PACKED, "--trainer.callbacks+=ActivationCheckpointing"],
    "mom": ["--model", "MoM", *UNCLIPPED],
    # 45 tokens for 2, in two micro-batches, the gradient clipped
    "filled": [*HYBRID, *PACKED, "--data.seq_len", "15", "--data.batch_size", "3",
               "--trainer.accumulate_grad_batches", "2"],
    "growing": ["--model", "GLA", "--trainer.callbacks+=LengthWarmup",
                "--trainer.callbacks.start", "8", "--trainer.callbacks.steps_per_stage", "2"],
}  # fmt: skip


class Record(Callback):
    """Write what a run computed, in full precision, as ``NAME.json`` and ``NAME.pt``."""

    def __init__(self, name: str) -> None:
        self.name, self.step = name, 0
        self.rows = {"loss": [], "norm": [], "val": [], "tokens": []}

    def add(self, trainer, key, total, count):
        sums = torch.stack([total.double(), count.double()])
        total, count = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.rows[key].append(total / count)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        nats, counts = (torch.stack(x) for x in zip(*module._window, strict=True))
        self.add(trainer, "loss", nats.sum(), counts.sum())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        tokens = torch.tensor(float(batch["tokens"].numel()))
        self.rows["tokens"].append(float(trainer.strategy.reduce(tokens, reduce_op="sum")))
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            squares = [p.grad.double().square().sum() for p in module.parameters()]
            self.rows["norm"].append(float(torch.stack(squares).sum().sqrt()))

    def on_validation_epoch_end(self, trainer, module):
        for metric in (module.nll["val"], module.bits["val"]):
            self.add(trainer, "val", metric.total, metric.count)

    def on_fit_end(self, trainer, module):
        if trainer.is_global_zero:
            Path(f"{self.name}.json").write_text(json.dumps(self.rows))
            torch.save(module.state_dict(), f"{self.name}.pt")


def fit(name, *arguments, steps=4):
    """Return the arguments of a fit that is recorded."""
    return ["fit", *COMMON, *arguments, "--name", name, "--trainer.max_steps", str(steps),
            f"--trainer.callbacks+={ME}.Record", "--trainer.callbacks.name", name]  # fmt: skip


def run_all(rank, world, folder, runs):
    """Be one of the processes that torchrun starts."""
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "TORCHELASTIC_RUN_ID": "test", "STATEZOO_CACHE": str(folder / "cache"),
    }  # fmt: skip
    for arguments in runs:
        main([*arguments, "--trainer.devices", str(world)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a text of many documents of uneven length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    texts = [f"Line {i} says {i**3}." + " More of it." * (i % 5) for i in range(60)]
    Path("text.txt").write_text("\n\n".join(texts))
    return tmp_path


def differences(one, other, keys=("loss", "norm", "val", "tokens")):
    """Return the largest relative difference of records of two runs, and of weights."""
    found = {}
    records = [json.loads(Path(f"{name}.json").read_text()) for name in (one, other)]
    for key in keys:
        a, b = (torch.tensor(record[key], dtype=torch.float64) for record in records)
        found[key] = float(((a - b) / a).abs().max())
    weights = [torch.load(f"{name}.pt") for name in (one, other)]
    found["weights"] = max(
        float((w - weights[1][key]).abs().max()) for key, w in weights[0].items()
    )
    return found


def assert_alike(one, other, allowed):
    """Compare the losses, validation, gradient norms and final weights of two runs."""
    found = differences(one, other)
    wrong = {key: x for key, x in found.items() if not x < allowed and key != "tokens"}
    assert not wrong, f"{other} differs from {one}: {wrong}, allowed {allowed:.0e}"


def compare(folder, cases, precision, world, allowed):
    """Make runs in one process and in some that share sequences, and compare them."""
    more = ["--trainer.enable_checkpointing", "false", *precision]
    runs = [fit(f"{n}-shared", *CASES[n], *more, *SHARED) for n in cases]
    for name in cases:
        main(fit(name, *CASES[name], *more))
    spawn(run_all, world, folder, folder, runs)
    for name in cases:
        assert_alike(name, f"{name}-shared", allowed)


@pytest.mark.slow
def test_runs_are_those_of_one_process(folder):
    cases = ["gla", "gated_deltanet", "mamba", "hybrid", "mom"]
    compare(folder, cases, DOUBLE, 2, 1e-9)  # the order of sums alone
    for name in cases:
        assert differences(name, f"{name}-shared")["tokens"] == 0
        assert json.loads(Path(f"{name}.json").read_text())["loss"][0] > 1


@pytest.mark.slow
def test_runs_in_single_precision(folder):
    compare(folder, [*CASES], SINGLE, 2, 1e-5)


@pytest.mark.slow
def test_slices_that_are_filled_up_and_windows_that_grow(folder):
    compare(folder, ["filled", "growing"], DOUBLE, 2, 1e-9)


@pytest.mark.slow
def test_four_processes(folder):
    compare(folder, ["gated_deltanet", "hybrid", "mom"], DOUBLE, 4, 1e-9)


@pytest.mark.slow
def test_two_groups_of_two_read_different_windows(folder):
    two = ["--trainer.strategy", "SequenceParallel", "--trainer.strategy.sequence_size", "2"]
    more = ["--trainer.enable_checkpointing", "false", *DOUBLE]
    for name in ("gla", "gated_deltanet"):
        main(fit(name, *CASES[name], *more, "--data.batch_size", "8"))
    runs = [fit(f"{name}-grid", *CASES[name], *more, *two) for name in ("gla", "gated_deltanet")]
    spawn(run_all, 4, folder, folder, runs)
    for name in ("gla", "gated_deltanet"):
        assert_alike(name, f"{name}-grid", 1e-9)


@pytest.mark.slow
def test_resumes_with_another_number_of_processes(folder):
    settings = [*CASES["hybrid"], *DOUBLE, "--checkpoints.every_n_steps", "1"]
    resume = ["--ckpt_path", "half.ckpt"]
    main(fit("whole", *settings))
    main(fit("one", *settings, steps=2))
    half = fit("two", *settings, *SHARED, steps=2)
    spawn(run_all, 2, folder, folder, [half])
    for name, others in (("one", (2, 4)), ("two", (1, 4))):
        Path("half.ckpt").write_bytes(Path("runs", name, "version_0/last.ckpt").read_bytes())
        for world in others:
            to = f"{name}-{world}"
            if world == 1:
                main(fit(to, *settings, *resume))
            else:
                spawn(run_all, world, folder, folder, [fit(to, *settings, *resume, *SHARED)])
            whole, rest = (json.loads(Path(f"{n}.json").read_text()) for n in ("whole", to))
            assert rest["loss"] == pytest.approx(whole["loss"][2:], rel=1e-9), to
            assert differences("whole", to, ["val"])["weights"] < 1e-9, to


def test_one_line_on_the_command_line(folder):
    """The launcher of Lightning; one process goes on where two stopped."""
    five = "[gla, {name: mom, n_memories: 3}, gated_deltanet, mamba, attention]"
    model = ["--model", "Hybrid", "--model.mixers", five, "--model.n_layers", "5", *PACKED, *DOUBLE]
    done = subprocess.run(
        [sys.executable, "-m", "statezoo", *fit("two", *model, steps=2), *SHARED,
         "--trainer.devices", "2"],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(Path("runs/two/version_0/train.json").read_text())
    assert facts["tokens"] == 2 * 4 * 16
    main(fit("one", *model, steps=2))
    assert_alike("one", "two", 1e-9)
    main(fit("whole", *model))
    main(fit("rest", *model, "--ckpt_path", "runs/two/version_0/last.ckpt"))
    assert differences("whole", "rest", ["val"])["weights"] < 1e-9


FEW = "SequenceParallel needs at least 2 processes, got 1: set trainer.devices and trainer."
LONG = "SequenceParallel needs at least a token for each of 4 slices, got windows of 2: raise data."
MISTAKES = [
    ([], [], FEW),
    (["--trainer.strategy", "SequenceParallel"], [], FEW),
    (["--trainer.strategy", "SequenceParallel", "--trainer.strategy.sequence_size", "3"], ["4"],
     "SequenceParallel needs a multiple of sequence_size=3 processes, got 4: set trainer.devices"),
    (["--trainer.strategy", "SequenceParallel", "--trainer.strategy.sequence_size", "1"], ["4"],
     "SequenceParallel needs sequence_size of at least 2, got 1: with --trainer.strategy ddp"),
    (["--trainer.strategy", "sequence_paralel"], ["2"],
     "no strategy 'sequence_paralel' (did you mean sequence_parallel?): --trainer.strategy takes"),
    (["--trainer.strategy", "SequenceParalel"], ["2"],
     "no strategy 'SequenceParalel' (did you mean sequence_parallel?): --trainer.strategy takes"),
    (["--trainer.strategy.sequence_size", "2"], ["2"],
     "trainer.strategy: no class named 'sequence_parallel' (did you mean SequenceParallel?)"),
    (["--data.seq_len", "2"], ["4"], LONG),
    (["--trainer.callbacks+=LengthWarmup", "--trainer.callbacks.start", "2"], ["4"], LONG),
    (["--data.carry", "true"], ["2"],
     "SequenceParallel runs the slices of a window side by side, and data.carry is to hand states"),
]  # fmt: skip


def message(capsys, arguments):
    """Return what is said of a mistake, before any process is started."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "GLOBAL_RANK" not in said
    return said


@pytest.mark.parametrize(("given", "devices", "wanted"), MISTAKES)
def test_mistakes_are_told_before_processes_are_started(given, devices, wanted, folder, capsys):
    devices = ["--trainer.devices", *devices] if devices else []
    assert wanted in message(capsys, fit("wrong", "--model", "GLA", *SHARED, *given, *devices))


@pytest.mark.parametrize("model", ["MaskedLM", "SequenceClassifier"])
def test_other_tasks_are_refused_by_name(model, folder, capsys):
    data = ["--data", "DNA", "--data.objective", "masked"]
    if model == "SequenceClassifier":
        rows = (f"word {i},{'yes' if i % 2 else 'no'}\n" for i in range(40))
        Path("rows.csv").write_text("text,label\n" + "".join(rows))
        data = ["--data", "LabelledText", "--data.path", "rows.csv"]
    said = message(
        capsys, ["fit", "--model", model, *data, *SHARED, "--trainer.devices", "2",
                 "--trainer.accelerator", "cpu", "--name", "wrong"]
    )  # fmt: skip
    assert f"CausalLM and the architectures by their names, and {model} needs whole sequ" in said


def test_help_names_the_strategy(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "SequenceParallel" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.strategy.help", "SequenceParallel"])
    assert "Processes that share each sequence; default all." in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_a_batch(rank, monkeypatch):
    """Pieces worked out by hand; no messages, so one process is both."""
    monkeypatch.setattr(sequence, "_check", lambda *_: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    shape = (2, 5)
    batch = {
        "tokens": torch.arange(10).view(shape), "targets": torch.arange(10).view(shape) - 100,
        "weights": torch.ones(shape), "n_bytes": torch.tensor(18),
    }  # fmt: skip
    part = cut(batch, object())
    assert part["tokens"].tolist() == [[[0, 1, 2], [5, 6, 7]], [[3, 4, 0], [8, 9, 0]]][rank]
    assert part["targets"][:, -1].tolist() == [[-98, -93], [-100, -100]][rank]
    assert part["weights"].sum() == [6, 4][rank]
    assert float(part["n_bytes"]) == [18 * 5 / 9, 18 * 4 / 9][rank]  # -100 at token 0: not scored
    packed = {key: batch[key].view(1, -1)[:, :7] for key in ("tokens", "targets")}
    part = cut({**packed, "cu_seqlens": torch.tensor([0, 2, 6, 7])}, object())
    assert part["cu_seqlens"].tolist() == [[0, 2, 4], [0, 2, 3, 4]][rank]
    assert part["shard"].before == [0, 2][rank]
    with pytest.raises(ValueError, match="cannot cut attention_mask, labels of a batch"):
        cut({**packed, "labels": torch.zeros(1), "attention_mask": torch.ones(1, 7)}, object())
