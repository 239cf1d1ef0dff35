"""Two processes train what one does, with DDP and with FSDP2, every family."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from tests.lightning_modules.ranks import WORDS, UnevenData, spawn, trainer
from tests.zoo.cases import small

from statezoo.lightning_modules import CausalLM
from statezoo.zoo import MIXERS

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of Lightning and torch, in processes of one's own
FAMILIES = [name for name, mixer in MIXERS.items() if mixer.__module__.startswith("statezoo.zoo.")]
STRATEGIES = ("ddp", "fsdp2")
STEPS, TOGETHER = 3, 2


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, *_):
        if "train/nll" in trainer.callback_metrics:
            self.seen[trainer.global_step] = float(trainer.callback_metrics["train/nll"])


def run(folder, name, strategy="auto", rank=0, world=1, **settings):
    """Train a family on batches of four windows; return losses, weights and the validation."""
    alternate = world == 1 and name == "mom"  # its auxiliary loss is one per batch, not per token
    seed_everything(1, verbose=False)
    shape = {"vocab_size": WORDS, "d_model": 16, "n_layers": 2, **settings}
    module = CausalLM([small(name)], **shape)
    losses, together = Losses(), TOGETHER * (2 if alternate else 1)
    data = UnevenData(2 if alternate else 4 // world, as_ranks=2 if alternate else 1)
    made = trainer(
        folder, strategy, rank, world, callbacks=[losses], max_steps=STEPS,
        accumulate_grad_batches=together, val_check_interval=STEPS * together,
    )  # fmt: skip
    made.fit(module, data)
    state = module.state_dict()
    weights = {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in state.items()}
    return losses.seen, weights, float(made.callback_metrics["val/nll"])


def work(rank, world, folder, names):
    """Train families in one of two processes, and leave what came of it."""
    for name in names:
        for strategy in STRATEGIES:
            found = run(folder, name, strategy, rank, world)
            if rank == 0:
                torch.save(found, Path(folder, f"{name}-{strategy}.pt"))


def differences(folder, names):
    """Return of each family and strategy how far losses, weights and validation are from one's."""
    spawn(work, 2, folder, str(folder), names)
    table = {}
    for name in names:
        one = run(folder, name)
        for strategy in STRATEGIES:
            losses, weights, val = torch.load(folder / f"{name}-{strategy}.pt", weights_only=True)
            assert losses.keys() == one[0].keys() == set(range(1, STEPS + 1))
            table[name, strategy] = (
                max(abs(losses[i] - one[0][i]) for i in losses),
                max(float((weights[k] - x).abs().max()) for k, x in one[1].items()),
                abs(val - one[2]),
            )
    return table


def check(table):
    """Print the table, and raise where a run of two is not that of one."""
    sys.stdout.write(f"\n{'mixer':22}{'strategy':10}{'loss':>10}{'weights':>10}{'val':>10}\n")
    for (name, strategy), found in table.items():
        sys.stdout.write(f"{name:22}{strategy:10}{''.join(f'{x:10.1e}' for x in found)}\n")
    for case, (loss, weights, val) in table.items():
        assert loss < 1e-5, case  # float32, sums in another order
        assert val < 1e-5, case
        assert weights < 1e-4, case  # Adam divides by small averages: rounding grows to parts of lr


@pytest.mark.slow
def test_every_family_trains_on_two_processes_as_on_one(tmp_path):
    check(differences(tmp_path, FAMILIES))
