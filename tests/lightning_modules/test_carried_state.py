"""Training with a state that is carried along is one long pass with gradients cut at the joins."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from tests.zoo.cases import CASES, KINDS, WIDTH, WORDS, make

from statezoo.datamodules import DNA, Text
from statezoo.datamodules.packing import TokenFile, Windows
from statezoo.datamodules.streams import StreamLoader
from statezoo.lightning_modules import Adapter, CausalLM, LengthWarmup, Linearize
from statezoo.lightning_modules.carried import Carried, check_bounded
from statezoo.zoo import cache_to_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:lightning"
)
FP64 = 1e-9  # the same sums in another order, through two layers
GROWING = [
    "attention", "attention-nope", "hybrid", "configs/bach", "configs/gdn_hybrid", "configs/jamba",
    "ngram_heads", "ngram_heads-one", "hybrid-ngrams", "configs/ngram_heads",
]  # fmt: skip
SOME = ["gla", "gated_deltanet", "mamba2", "mom", "hybrid-window"]
BOTH = [
    pytest.param(case, packed, marks=[] if case in KINDS else pytest.mark.slow)
    for packed, cases in ((True, CASES), (False, SOME))
    for case in cases
    if case not in GROWING
]
T, STREAMS = 5, 2
SEGMENTS = np.array([[0, 7], [7, 20], [20, 21], [21, 40]])  # joins inside windows and between


@pytest.fixture
def windows(tmp_path):
    ids = np.random.default_rng(1).integers(1, WORDS, 40).astype(np.uint8)
    np.save(tmp_path / "ids.npy", ids)

    def cut(packed):
        return Windows(
            TokenFile(tmp_path / "ids.npy"), SEGMENTS, seq_len=T, bos_id=0, packed=packed
        )

    return cut


def task(net):
    """A task with this network, in the middle of a fit."""
    module = CausalLM(["gla"], vocab_size=WORDS, d_model=WIDTH, n_layers=1, channel=None)
    module.net, module.carried = net.train(), Carried()
    return module


def sequences(row, packed, start=0, stop=20):
    """Bounds of the sequences of a stream of 20 tokens, those within ``start`` and ``stop``."""
    joins = SEGMENTS[:, 0] - 20 * row if packed else np.array([0])
    cuts = {start, stop, *joins[(start < joins) & (joins < stop)].tolist()}
    bounds = sorted(cuts)
    return list(itertools.pairwise(bounds))


def nats(net, tokens, targets, past=None):
    logits = net(tokens, past_key_values=past, use_cache=past is not None).logits
    return F.cross_entropy(logits[0], targets[0], reduction="sum")


def window_alone(net, packed, row, step, tokens, targets):
    """Nats of a window of a stream: what is before it in its sequence is read without gradient."""
    total = 0.0
    for start, stop in sequences(row, packed, step * T, step * T + T):
        begin = max(a for a, _ in sequences(row, packed) if a <= start)
        past = None
        if begin < start:
            with torch.no_grad():
                past = net(tokens[:, begin:start], use_cache=True).past_key_values
        total = total + nats(net, tokens[:, start:stop], targets[:, start:stop], past)
    return total


def gradients(net, loss):
    named = list(net.named_parameters())
    found = torch.autograd.grad(loss, [p for _, p in named])
    return {n: g for (n, _), g in zip(named, found, strict=True)}


@pytest.mark.parametrize(("case", "packed"), BOTH)
def test_losses_and_gradients_are_those_of_one_long_sequence(case, packed, windows):
    net = make(case)
    module = task(net)
    batches = list(StreamLoader(windows(packed), STREAMS))
    assert len(batches) == 4
    each = [[b[k].view(STREAMS, 1, T) for b in batches] for k in ("tokens", "targets")]
    streams = list(zip(*(torch.cat(x, 2) for x in each), strict=True))
    carried = 0.0
    for step, batch in enumerate(batches):
        got = module.training_loss(batch)["nats"]
        want = sum(window_alone(net, packed, i, step, *x) for i, x in enumerate(streams))
        torch.testing.assert_close(got, want, atol=FP64, rtol=FP64)
        carried += got.detach()
        wanted = gradients(net, want)
        for name, found in gradients(net, got).items():
            error = (found - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)
            assert error < FP64, f"step {step}, gradient of {name}: relative error {error:.1e}"
    with torch.no_grad():  # all at once, without any state handed on
        whole = sum(
            nats(net, tokens[:, a:b], targets[:, a:b])
            for row, (tokens, targets) in enumerate(streams)
            for a, b in sequences(row, packed)
        )
    torch.testing.assert_close(carried, whole, atol=FP64, rtol=FP64)


@pytest.mark.slow
def test_states_that_grow_are_the_only_ones_refused():
    refused = []
    for case in CASES:
        try:
            check_bounded(make(case))
        except ValueError:
            refused.append(case)
    assert sorted(refused) == sorted(GROWING)


def test_a_state_that_grows_is_refused(text, trainer):
    module = CausalLM(["gla", "attention"], d_model=16, n_layers=2)
    with pytest.raises(ValueError, match=r"data\.carry") as error:
        trainer(max_steps=1).fit(module, datamodule=text())
    assert str(error.value) == (
        "data.carry needs states of fixed size, and layer 1, attention, keeps its whole past: give "
        "it a window, {name: attention, window: 256}, or set data.carry to false."
    )


# ------------------------------------------------------------------------ runs


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Line {i} says {i * i} and {i % 7}." * 2 for i in range(12)))

    def make(**settings):
        return Text(str(path), **{"seq_len": 16, "batch_size": 4, "carry": True, **settings})

    return make


class Watch(Callback):
    """Saves at some steps, keeps the loss of each, and breaks nothing."""

    def __init__(self, folder=None, at=()):
        self.folder, self.at, self.losses, self.starts = folder, at, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.starts.append(batch["starts"].tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if "train/nll" in trainer.callback_metrics:  # not before the first whole step
            self.losses[step] = float(trainer.callback_metrics["train/nll"])
        if step in self.at and not (self.folder / f"{step}.ckpt").exists():
            trainer.save_checkpoint(self.folder / f"{step}.ckpt", weights_only=False)


def module():
    torch.manual_seed(0)
    mixers = ["gated_deltanet", {"name": "attention", "window": 8}]
    return CausalLM(mixers, d_model=16, n_layers=2, optim={"warmup_steps": 2, "total_steps": 12})


def fit(trainer, data, watch, ckpt=None, **settings):
    net = module()
    settings = {"max_steps": 12, "callbacks": [watch], "log_every_n_steps": 1, **settings}
    trainer(**settings).fit(net, datamodule=data, ckpt_path=ckpt)
    return net


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("more", ["plain", "accumulated", "warmed up"])
def test_a_run_resumed_anywhere_is_the_same_run(packing, more, text, trainer, tmp_path):
    settings = {"accumulate_grad_batches": 2} if more == "accumulated" else {}
    settings["val_check_interval"] = 4
    kept = [4, 5, 9] if more != "plain" else [3, 7, 10]
    whole = Watch(tmp_path, kept)
    warm = [LengthWarmup(8, 5)] if more == "warmed up" else []
    settings["callbacks"] = [whole, *warm]
    want = fit(trainer, text(packing=packing), whole, **settings)
    assert not all(map(all, whole.starts))
    assert sum(map(all, whole.starts)) >= 2  # more than one epoch, or stage
    for step in kept:
        again = Watch()
        warm = [LengthWarmup(8, 5)] if warm else []
        settings["callbacks"] = [again, *warm]
        got = fit(trainer, text(packing=packing), again, tmp_path / f"{step}.ckpt", **settings)
        assert again.losses == {n: x for n, x in whole.losses.items() if n > step}
        for name, weight in want.state_dict().items():
            assert torch.equal(weight, got.state_dict()[name]), f"{name}, resumed at {step}"


def test_a_checkpoint_without_its_states_would_not_go_on_the_same(text, trainer, tmp_path):
    whole = Watch(tmp_path, [3])
    fit(trainer, text(), whole)
    kept = torch.load(tmp_path / "3.ckpt", weights_only=True)
    kept["statezoo"]["carried"] = {
        name: torch.zeros_like(x) for name, x in kept["statezoo"]["carried"].items()
    }
    torch.save(kept, tmp_path / "forgot.ckpt")
    again = Watch()
    fit(trainer, text(), again, tmp_path / "forgot.ckpt")
    assert again.losses[4] != whole.losses[4]


def test_validation_disturbs_nothing(text, trainer):
    often, never = Watch(), Watch()
    fit(trainer, text(), often, val_check_interval=1)
    fit(trainer, text(), never, limit_val_batches=0)
    assert often.losses == never.losses


def test_a_run_without_carried_states_cannot_go_on_with_them(text, trainer, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=False)

    trainer(max_steps=3, callbacks=[Save()]).fit(module(), datamodule=text(carry=False))
    with pytest.raises(ValueError, match="The checkpoint was made") as error:
        fit(trainer, text(), Watch(), tmp_path / "plain.ckpt")
    assert str(error.value) == (
        "The checkpoint was made with windows in random order, this run has {'streams': 4}: resume "
        "with the same data.packing, data.carry and data.decomposition, or start a new run from "
        "the checkpoint's weights."
    )


def test_states_of_other_rows_are_refused(windows):
    first, second, *_ = StreamLoader(windows(False), STREAMS)
    fresh = task(make("gla"))
    with pytest.raises(ValueError, match="a batch goes on") as error:
        fresh.training_loss(second)
    assert str(error.value) == (
        "a batch goes on in 2 of 2 rows, and there are states of 0: resume with a checkpoint of a "
        "run with data.carry and as many rows, or start a new run from its weights."
    )
    fresh.training_loss(first)
    fresh.training_loss(second)


def test_states_are_dealt_anew_to_other_numbers_of_processes():
    net = make("mom")
    with torch.no_grad():
        cache = net(torch.arange(20).view(4, 5) % WORDS, use_cache=True).past_key_values
    tensors = Carried(cache, 4).tensors(1)
    part = Carried.of(net, tensors, 1, 2)
    assert part.rows == 2
    for name, x in cache_to_tensors(part.cache).items():
        if name != "seen":
            assert torch.equal(x, tensors[name][1::2])


def test_a_genome_is_carried_along_its_regions(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    draw = torch.Generator().manual_seed(0)
    letters = "".join("ACGT"[i] for i in torch.randint(4, (1000,), generator=draw))
    letters = letters[:300] + "NN" + letters[302:]
    (tmp_path / "g.fa").write_text(f">one\n{letters[:537]}\n>two\n{letters[537:]}\n")
    data = DNA(str(tmp_path / "g.fa"), seq_len=16, batch_size=2, carry=True)
    loader = data.train_dataloader()
    net = make("gated_deltanet", n_layers=1)
    fresh, got, rows = task(net), 0.0, [[], []]
    with torch.no_grad():
        for batch in loader:
            got += fresh.training_loss(batch)["nats"]
            mask = batch.get("attention_mask", torch.ones_like(batch["tokens"])).bool()
            for i, row in enumerate(rows):
                if batch["starts"][i]:
                    row.append([])
                row[-1].append((batch["tokens"][i][mask[i]], batch["targets"][i][mask[i]]))
        want, scored = 0.0, 0
        for part in (part for row in rows for part in row):
            tokens, targets = (torch.cat(x)[None] for x in zip(*part, strict=True))
            want += nats(net, tokens, targets)
            scored += int((targets != -100).sum())
    assert sum(len(row) for row in rows) <= 5  # two regions in two streams, and the epoch's ends
    assert scored == sum(found.composition.bases for s, found in data.scans.items() if s == "train")
    torch.testing.assert_close(got, want, atol=FP64, rtol=FP64)


def test_a_teacher_cannot_follow(text, trainer, monkeypatch):
    student = Linearize(
        ["gla"], d_model=16, n_layers=1, teacher="none", tune="full", adapter=Adapter()
    )
    with pytest.raises(ValueError, match="a teacher sees") as error:
        trainer(max_steps=1).fit(student, datamodule=text())
    assert str(error.value) == (
        "a teacher sees no more than a window, the model would: set data.carry to false, or leave "
        "model.teacher out."
    )


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_from_two(text, trainer, tmp_path):
    one = Watch()
    fit(trainer, text(), one)
    settings = {"strategy": "ddp_spawn", "devices": 2, "max_steps": 5}
    spawned: Trainer = trainer(callbacks=[Watch(tmp_path, [5])], log_every_n_steps=1, **settings)
    spawned.fit(module(), datamodule=text(batch_size=2))
    again = Watch()
    fit(trainer, text(), again, tmp_path / "5.ckpt")
    assert sorted(again.losses) == list(range(6, 13))
    for step, loss in again.losses.items():
        assert loss == pytest.approx(one.losses[step], rel=1e-4), step
