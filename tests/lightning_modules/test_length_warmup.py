import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from statezoo.datamodules import DNA, LabelledDNA, Text
from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.stages import Stage, StagedLoader, Warmup
from statezoo.lightning_modules import CausalLM, LengthWarmup, MaskedLM
from statezoo.lightning_modules import length_warmup as module
from statezoo.lightning_modules.memory import MARGIN, Footprint, LiveBytes
from statezoo.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Return what makes data of about 40 windows of 32 bytes to train on."""
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} says {i * i} and {i % 7}.\n\n" for i in range(64)))

    def make(**settings):
        return Text(str(path), **{"seq_len": 32, "batch_size": 2, "seed": 5, **settings})

    return make


@pytest.fixture
def genome(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "g.fa"
    draw = torch.Generator().manual_seed(0)
    letters = ["ACGT"[i] for i in torch.randint(4, (1200,), generator=draw)]
    path.write_text(f">one\n{''.join(letters[:800])}\n>two\n{''.join(letters[800:])}\n")
    return str(path)


class Seen(Callback):
    """Keeps each batch by number, the learning rate of each step, and validation's windows."""

    def __init__(self, save=None):
        self.save, self.batches, self.rates, self.validated, self.logged = save, [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.global_step, batch["tokens"].clone()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.logged.append(float(trainer.callback_metrics["train/seq_len"]))
        if self.save and len(self.batches) in self.save:
            trainer.save_checkpoint(self.save[len(self.batches)], weights_only=False)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.append(tuple(batch["tokens"].shape))


def causal(data, **settings):
    torch.manual_seed(0)
    return CausalLM(
        ["gla"], vocab_size=data.vocab_size, d_model=8, n_layers=1, channel=None, **settings
    )


# ------------------------------------------------------------------- stages


@pytest.mark.parametrize("start", [1, 8, 64, 512])
def test_stages_double_and_keep_the_tokens_of_a_batch(start):
    stages = Warmup(start, 30).stages(1024, 3)
    assert stages[0].seq_len == start
    assert stages[-1] == Stage(1024, 3, 30 * (len(stages) - 1))
    for k, (stage, after) in enumerate(itertools.pairwise(stages)):
        assert after.seq_len == 2 * stage.seq_len
        assert stage.first_step == 30 * k
    assert {s.seq_len * s.batch_size for s in stages} == {3072}


@pytest.mark.parametrize(
    ("start", "seq_len", "choices"),
    [
        (48, 1000, "500, 250, 125"),
        (1000, 1000, "500, 250, 125"),
        (2000, 1000, "500, 250, 125"),
        (1, 7, "none as seq_len is odd"),
    ],
)
def test_a_start_that_does_not_become_seq_len_is_refused(start, seq_len, choices):
    with pytest.raises(ValueError, match="Length warm-up needs") as error:
        Warmup(start, 10).stages(seq_len, 2)
    assert str(error.value) == (
        f"Length warm-up needs a start that becomes seq_len={seq_len} by doubling ({choices}), "
        f"got start={start}."
    )


class Numbers:
    """Windows that are their own numbers."""

    def __init__(self, name, count):
        self.name, self.count, self.size = name, count, 1

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"tokens": (self.name, tuple(index[1]))}


def staged(first_steps=(0, 4, 8), accumulate=2, **settings):
    from statezoo.datamodules.loader import SeekableLoader

    counts = {"short": 20, "middle": 10, "long": 5}
    loaders = [
        SeekableLoader(Numbers(name, n), size, shuffle=True, seed=3, **settings)
        for (name, n), size in zip(counts.items(), (4, 2, 1), strict=True)
    ]
    return StagedLoader(loaders, first_steps, accumulate)


def test_each_stage_begins_its_own_first_epoch_at_the_right_step():
    loader = staged()
    assert len(loader) == 5
    read = [*loader, *loader, *loader, *loader, *loader]
    # 5 batches a pass are 3 steps of 2, 2 and 1 batches: step 4 is batch 5 + 2, step 8 is 10 + 4
    assert loader.first_batches() == [0, 7, 14]
    parts = [read[:7], read[7:14], read[14:]]
    for k, part in enumerate(parts):
        alone = loader.loaders[k]
        want = [*alone, *alone, *alone][: len(part)]
        assert [b["tokens"] for b in part] == [b["tokens"] for b in want]
    limited = staged(accumulate=2)
    limited.limit(4)
    assert limited.first_batches() == [0, 8, 16]


@pytest.mark.parametrize(  # inside, before, at and after a boundary
    ("stop", "workers"), [(1, 0), (6, 0), (7, 0), (8, 0), (14, 0), (19, 0), (6, 2), (8, 2)]
)
def test_a_staged_loader_resumes_anywhere(stop, workers):
    whole = staged()
    want = [b["tokens"] for _ in range(5) for b in whole]
    first = staged(num_workers=workers)
    passes = itertools.chain.from_iterable(itertools.repeat(first))
    read = [b["tokens"] for b in itertools.islice(passes, stop)]
    second = staged(num_workers=workers)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert read + [b["tokens"] for _ in range(5) for b in second][: 25 - stop] == want


def test_another_warm_up_cannot_resume():
    state, plain = staged().state_dict(), staged().loaders[-1]
    with pytest.raises(ValueError, match=r"with stages of growing windows .* with the same"):
        plain.load_state_dict(state)
    with pytest.raises(ValueError, match=r"made without .* this run has \[\[0, 5\], \[7, 5\]"):
        staged().load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="resume with the same LengthWarmup"):
        staged(first_steps=(0, 2, 4)).load_state_dict(state)


# ------------------------------------------------------------------ training


def test_windows_grow_rate_goes_on_and_validation_is_at_full_length(trainer, text):
    runs = {}
    for name, warmup in (("grows", [LengthWarmup(8, 3)]), ("full", [])):
        data, seen = text(), Seen()
        seen.logged = [] if warmup else None
        callbacks = [*warmup, seen]
        if not warmup:
            seen.on_train_batch_end = lambda t, m, *a, s=seen: s.rates.append(
                t.optimizers[0].param_groups[0]["lr"]
            )
        made = trainer(
            max_steps=9, accumulate_grad_batches=2, callbacks=callbacks, val_check_interval=6,
            check_val_every_n_epoch=None,
        )  # fmt: skip
        made.fit(causal(data, optim={"lr": 0.01, "warmup_steps": 2}), datamodule=data)
        runs[name] = seen
        assert data.warmup is None
    grows = runs["grows"]
    shapes = [tuple(tokens.shape) for _, tokens in grows.batches]
    assert shapes == [(8, 8)] * 6 + [(4, 16)] * 6 + [(2, 32)] * 6
    assert [step for step, _ in grows.batches] == [n // 2 for n in range(18)]
    assert grows.logged == [8.0] * 6 + [16.0] * 6 + [32.0] * 6
    assert grows.rates == runs["full"].rates
    assert {length for _, length in grows.validated} == {32}
    assert grows.validated == runs["full"].validated


@pytest.mark.parametrize("kind", ["text", "packed", "dna", "masked"])
def test_a_run_resumed_in_the_middle_of_a_stage_is_the_same_run(
    kind, trainer, text, genome, tmp_path
):
    def run(save=None, ckpt=None):
        if kind in ("text", "packed"):
            data = text(packing="documents" if kind == "packed" else "stream")
        else:
            objective = "masked" if kind == "masked" else "causal"
            data = DNA(genome, seq_len=32, batch_size=2, objective=objective, rc_augment=True)
        torch.manual_seed(0)
        task = MaskedLM if kind == "masked" else CausalLM
        net = task(["gla"], vocab_size=data.vocab_size, d_model=8, n_layers=1)
        seen = Seen(save)
        made = trainer(
            max_steps=30, limit_val_batches=0, callbacks=[LengthWarmup(8, 10), seen],
            limit_train_batches=13,  # passes that end within stages
        )  # fmt: skip
        made.fit(net, datamodule=data, ckpt_path=ckpt)
        return seen.batches, net.state_dict()

    places = {4: tmp_path / "4.ckpt", 10: tmp_path / "10.ckpt", 17: tmp_path / "17.ckpt"}
    whole, weights = run(save=places)
    assert len(whole) == 30
    for place, path in places.items():
        rest, again = run(ckpt=path)
        assert [step for step, _ in rest] == list(range(place, 30))
        for (_, got), (_, want) in zip(rest, whole[place:], strict=True):
            assert torch.equal(got, want)
        for name, want in weights.items():
            assert torch.equal(again[name], want), f"resumed at {place}: {name}"


def test_every_epoch_of_a_stage_reads_all_once(genome):
    data = DNA(genome, seq_len=32, batch_size=2, seed=1)
    data.setup()
    data.warmup = Warmup(8, 1000)
    loader = data.train_dataloader()
    bases = sum(int(r.stop - r.start) for r in data.scans["train"].regions)
    short = loader.loaders[0]
    scored = sum(int((batch["targets"] != IGNORE).sum()) for batch in short)
    assert scored == bases


def test_the_estimate_leaves_no_trace(trainer, text, monkeypatch):
    def run(measured):
        if not measured:
            monkeypatch.setattr(LengthWarmup, "on_fit_start", lambda *a: None)
        data = text()
        net = causal(data)
        made = trainer(max_steps=5, limit_val_batches=0, callbacks=[LengthWarmup(8, 2)])
        made.fit(net, datamodule=data)
        return net.state_dict(), torch.get_rng_state()

    (one, rng), (two, same) = run(True), run(False)
    assert torch.equal(rng, same)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_on_the_command_line(text, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("warm.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: LengthWarmup\n"
        "      init_args: {start: 8, steps_per_stage: 2}\n"
    )
    caplog.set_level("INFO")
    main(
        ["fit", "--config", "warm.yaml", "--model", "GLA", "--model.d_model", "8",
         "--model.n_layers", "1", "--data", "Text", "--data.path", "text.txt",
         "--data.seq_len", "16", "--data.batch_size", "2", "--trainer.accelerator", "cpu",
         "--trainer.max_steps", "4", "--trainer.enable_progress_bar", "false", "--name", "w"]
    )  # fmt: skip
    told = [r.getMessage() for r in caplog.records if "windows of" in r.getMessage()]
    assert [line.split(" tokens")[0] for line in told] == [
        "from step 0: 4 windows of 8",
        "from step 2: 2 windows of 16",
    ]
    assert Path("runs/w/version_0/last.ckpt").is_file()


# ------------------------------------------------------------------ mistakes


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="LengthWarmup needs start of at least 1, got 0"):
        LengthWarmup(0)
    with pytest.raises(ValueError, match="needs steps_per_stage of at least 1, got -3"):
        LengthWarmup(8, -3)
    with pytest.raises(ValueError, match="needs memory above 0 GB, got 0"):
        LengthWarmup(8, 3, memory=0)


def fit(trainer, data, *callbacks, **settings):
    settings = {"max_steps": 1, "limit_val_batches": 0, **settings}
    trainer(callbacks=list(callbacks), **settings).fit(causal(data), datamodule=data)


def test_data_that_cannot_be_cut_so(trainer, text, genome):
    with pytest.raises(ValueError, match="read in windows, Text or DNA, got LabelledDNA"):
        fit(trainer, LabelledDNA(), LengthWarmup(8))
    with pytest.raises(ValueError, match=r"becomes seq_len=32 by doubling \(16, 8, 4, 2, 1\), got"):
        fit(trainer, text(), LengthWarmup(32))
    with pytest.raises(ValueError, match=r"leave trainer.overfit_batches or the callback out"):
        fit(trainer, text(), LengthWarmup(8), overfit_batches=2)
    with pytest.raises(ValueError, match=r"only 1[0-9]+ tokens to train on, windows of 8192 "):
        fit(trainer, text(seq_len=8192), LengthWarmup(8))
    with pytest.raises(ValueError, match="longest region to train on has 720 bases, windows of 1"):
        fit(trainer, DNA(genome, seq_len=1024), LengthWarmup(8))


def test_a_run_that_ends_before_full_length_is_warned_of(trainer, text):
    with pytest.warns(UserWarning, match="seq_len=32 begin at step 6, the run ends at step 1: ra"):
        fit(trainer, text(), LengthWarmup(8, 3))


def test_the_first_stage_that_does_not_fit_is_named(trainer, text, monkeypatch):
    """1 MB held and 3 more; 10,000 bytes a token and 1,000 for each pair, times MARGIN."""
    needs = Footprint(held=10**6, more=3 * 10**6, fixed=0, linear=10_000, quadratic=1000)
    monkeypatch.setattr(module, "measure", lambda *_: needs)
    assert needs.peak(2, 32) == pytest.approx(4e6 + MARGIN * 2 * (320e3 + 1024e3))
    room = (4e6 + 1.3 * 1.55e6) / 1e9  # stages of 1.152, 1.664 and 2.688 MB
    with pytest.raises(ValueError, match="LengthWarmup: stage 2") as error:
        fit(trainer, text(), LengthWarmup(8, 3, memory=room), max_steps=50)
    assert str(error.value) == (
        "LengthWarmup: stage 2, 4 windows of 16 tokens from step 3 on, needs about 6.2 MB of "
        "memory, there are 6.0 MB: lower data.batch_size from 2 to 1 and multiply "
        "trainer.accumulate_grad_batches by 2, which makes the same step."
    )
    with pytest.raises(ValueError, match=r"lower data.seq_len from 32: a single window does not"):
        fit(trainer, text(), LengthWarmup(8, 3, memory=0.0045), max_steps=50)
    with pytest.raises(ValueError, match=r"alone are 4.0 MB: make the model smaller"):
        fit(trainer, text(), LengthWarmup(8, 3, memory=0.003), max_steps=50)
    fit(trainer, text(), LengthWarmup(8, 3, memory=1.0), max_steps=7)


# ------------------------------------------------------------------- memory


def test_live_bytes_are_those_of_tensors_that_live():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes([x]) as counter:
        y = (x * 2).exp()  # 4,000 for the product, which dies, 4,000 for y, which exp saves
        assert (counter.now, counter.peak) == (4000, 8000)
        z = y.view(10, 100)[2:]  # the same memory
        assert counter.now == 4000
        y.add_(1)
        assert counter.now == 4000
        del y
        assert counter.now == 4000  # z holds it
        del z
        assert counter.now == 0


PROCESS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from lightning.pytorch import Callback, Trainer
from statezoo.datamodules import Text
from statezoo.lightning_modules import CausalLM, LengthWarmup, length_warmup

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name))

found = {}
def measure(*args):
    found["it"] = known(*args)
    return found["it"]
known, length_warmup.measure = length_warmup.measure, measure

class Before(Callback):
    def on_train_start(self, *_):
        found["before"] = resident("VmRSS")

data = Text(sys.argv[2], seq_len=1024, batch_size=16)
quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
trainer = Trainer(accelerator="cpu", devices=1, max_steps=4, limit_val_batches=0,
    callbacks=[LengthWarmup(512, 2), Before()], **dict.fromkeys(quiet, False))
trainer.fit(CausalLM([sys.argv[1]], d_model=64, n_layers=2), datamodule=data)
needs = found["it"].peak(16, 1024) - found["it"].held
print(json.dumps([needs, resident("VmHWM") - found["before"]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_the_estimate_is_what_a_process_takes(mixer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} says {i * i} and {i % 7}.\n\n" for i in range(4000)))
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, mixer, str(path)], capture_output=True, text=True,
        env={**os.environ, "STATEZOO_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    estimated, taken = json.loads(done.stdout.splitlines()[-1])
    assert taken > 100e6  # far more than what else a process allocates
    assert 0.7 < estimated / taken < 1.3, f"estimated {estimated:.3g}, taken {taken:.3g}"
