"""Recomputed activations and compiled networks: the same numbers, no graph breaks."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from statezoo.lightning_modules import ActivationCheckpointing, Compile
from statezoo.lightning_modules.memory import LiveBytes
from statezoo.zoo import MIXERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec", "ignore:.*does not have many", "ignore:.*no .val_dataloader"
)


def packed(seed, bounds):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(16, (1, bounds[-1]), generator=draw)
    return {
        "tokens": tokens,
        "targets": tokens.roll(-1, 1),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
    }


SMALL = {"mamba2": {"head_dim": 8, "d_state": 8}, "mamba3": {"head_dim": 8, "d_state": 8}}
PACKED = [packed(0, [0, 24]), packed(1, [0, 7, 15, 24]), packed(2, [0, 1, 9, 20, 24])]


def trained(module, trainer, batches, **settings):
    fit = trainer(max_steps=len(batches), **settings)
    fit.fit(module, DataLoader(batches, batch_size=None))
    return module


PADS = {"attention", "liger"}
"""Mixers whose attention needs to know the longest of packed sequences: there the graph breaks."""


QUICK = ("attention", "gla", "mamba", "gated_deltanet")  # every op once


@pytest.mark.parametrize(
    "mixer",
    [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(MIXERS) if n not in QUICK)],
)
def test_training_compiles_without_graph_breaks(mixer, tiny, trainer):
    torch._dynamo.reset()
    entry = {"name": mixer, **SMALL.get(mixer, {})}
    plain, compiled = (tiny((entry,), n_layers=1, optim={"lr": 1e-3}) for _ in range(2))
    given = [{k: v for k, v in b.items() if k != "cu_seqlens"} for b in PACKED]
    given = given if mixer in PADS else PACKED
    trained(plain, trainer, given)
    counters.clear()
    trained(compiled, trainer, given, callbacks=[Compile(backend="aot_eager")])
    assert counters["frames"]["ok"] >= 1, "nothing was compiled"
    assert not counters["graph_break"], dict(counters["graph_break"])
    for (name, a), b in zip(
        plain.state_dict().items(), compiled.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_compiling_leaves_no_trace(tiny, trainer):
    module = trained(tiny(), trainer, PACKED, callbacks=[Compile(backend="eager")])
    assert list(module.state_dict()) == list(tiny().state_dict())
    assert module.net.model._compiled_call_impl is None
    copy.deepcopy(module.net)


@pytest.mark.parametrize("mixer", ["gla", "mom"])
def test_recomputing_changes_no_bit(mixer, tiny, trainer):
    plain = trained(tiny((mixer,)), trainer, PACKED)
    anew = trained(tiny((mixer,)), trainer, PACKED, callbacks=[ActivationCheckpointing()])
    for a, b in zip(plain.state_dict().values(), anew.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not anew.net.model.layers[0].gradient_checkpointing


class Peak(ActivationCheckpointing):
    """Measures the live tensors of the steps, and checkpoints only if told to."""

    def __init__(self, on):
        self.on = on

    def setup(self, trainer, pl_module, stage):
        if self.on:
            super().setup(trainer, pl_module, stage)
        self.counter = LiveBytes([*pl_module.parameters()])
        self.counter.__enter__()

    def teardown(self, trainer, pl_module, stage):
        self.counter.__exit__(None, None, None)
        super().teardown(trainer, pl_module, stage)


def test_recomputing_takes_a_fraction_of_the_memory(tiny, trainer):
    long, peaks = [packed(0, [0, 2048])], []
    for on in (False, True):
        peak = Peak(on)
        trained(tiny(("gated_deltanet",), n_layers=8), trainer, long, callbacks=[peak])
        peaks.append(peak.counter.peak)
    assert peaks[1] < 0.35 * peaks[0]  # of eight blocks, one whole and eight streams


def test_recomputing_works_under_compilation(tiny, trainer):
    torch._dynamo.reset()
    plain = trained(tiny(("gla",)), trainer, PACKED)
    both = trained(
        tiny(("gla",)),
        trainer,
        PACKED,
        callbacks=[ActivationCheckpointing(), Compile(backend="aot_eager")],
    )
    for a, b in zip(plain.state_dict().values(), both.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-3)


class Other(LightningModule):
    """No task of ours."""


@pytest.mark.parametrize("callback", [Compile, ActivationCheckpointing])
def test_says_what_it_needs(callback):
    with pytest.raises(ValueError, match=r"needs a task with a network of blocks.*got Other"):
        callback().setup(None, Other(), "fit")


def test_mode_is_of_inductor():
    with pytest.raises(ValueError, match="mode='max-autotune' is of backend inductor"):
        Compile(backend="eager", mode="max-autotune")
