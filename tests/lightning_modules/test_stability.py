"""No architecture turns to NaN at ten times the learning rate."""

import pytest
import torch
from lightning.pytorch import seed_everything
from tests.lightning_modules.conftest import Batches
from tests.zoo.cases import CASES, KINDS

from statezoo.lightning_modules import CausalLM
from statezoo.lightning_modules.optim import Optim

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
TEXT = torch.frombuffer(
    bytearray("".join(f"{i} times {i} is {i * i}, {i} less. " for i in range(400)), "ascii"),
    dtype=torch.uint8,
).long()
T, B, DIFFERENT = 32, 2, 40


def batch(i):
    """Windows of the text, a few batches over and over: what is learnt by heart is sharp."""
    rows = [T * (B * (i % DIFFERENT) + row) for row in range(B)]
    windows = torch.stack([TEXT[at : at + T + 1] for at in rows])
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


def hot(case, trainer, steps):
    """Train at ten times the default rate, and return the losses before and after."""
    seed_everything(0, verbose=False)
    mixers = CASES[case]
    module = CausalLM(
        mixers,
        vocab_size=128,
        d_model=16,
        n_layers=max(2, len(mixers)),
        optim={"lr": 10 * Optim().lr},
    )
    runner = trainer(max_steps=steps)
    with torch.no_grad():
        before = module.token_nll(batch(0)).item() / (B * T)
    runner.fit(module, Batches([batch(i) for i in range(steps)]))
    assert runner.global_step == steps
    for name, parameter in module.named_parameters():
        assert parameter.isfinite().all(), name
    with torch.no_grad():
        logits = module.net.eval()(TEXT[None, : 8 * T]).logits  # longer than any seen
        after = module.token_nll(batch(steps - 1)).item() / (B * T)
    assert logits.isfinite().all()
    return before, after


@pytest.mark.parametrize("case", KINDS)
def test_sixty_steps_at_ten_times_the_rate(case, trainer):
    before, after = hot(case, trainer, 60)
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_five_hundred_steps_at_ten_times_the_rate(case, trainer):
    before, after = hot(case, trainer, 500)
    assert after < before / 2  # measured: 4.8 nats before, 0.7 to 1.2 after
