"""What a run writes, and the division by tokens over several processes."""

import json
from types import SimpleNamespace

import pytest
import torch

from statezoo.lightning_modules.callbacks import CompareWithBaselines, draw_losses
from statezoo.lightning_modules.causal_lm import GRADIENT_UNIT


def test_gradient_is_divided_by_the_tokens_of_all_processes(tiny):
    module = tiny()
    here, there = (30.0, 4), (50.0, 12, 0)  # nats and scored tokens of two processes; no nan
    module._trainer = SimpleNamespace(
        world_size=2,
        accumulate_grad_batches=3,
        global_step=0,
        log_every_n_steps=10,
        strategy=SimpleNamespace(
            reduce=lambda both, reduce_op: both + torch.tensor(there, dtype=both.dtype)
        ),
    )
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    module._window = [(torch.tensor(here[0]), torch.tensor(here[1]))]
    weight = module.net.lm_head.weight
    # what Lightning and DDP leave: the sum over all, in units, over micro-batches and processes
    weight.grad = torch.full_like(weight, 8.0 / GRADIENT_UNIT / 3 / 2)
    module.on_before_optimizer_step(torch.optim.SGD([weight], lr=0.1))
    torch.testing.assert_close(weight.grad, torch.full_like(weight, 8.0 / 16))
    assert logged["train/nll"] == pytest.approx(80 / 16)
    assert module._window == []


def test_table_of_baselines(tmp_path, capsys):
    trainer = SimpleNamespace(
        is_global_zero=True,
        log_dir=str(tmp_path),
        callback_metrics={"val/bits_per_byte": torch.tensor(2.25)},
        datamodule=SimpleNamespace(baselines=lambda: {"kneser_ney_3": 2.5, "xz": 2.75}),
    )
    CompareWithBaselines().on_fit_end(trainer, SimpleNamespace(unit="byte"))
    out = capsys.readouterr().out
    assert out.index("2.750") < out.index("2.500") < out.index("2.250")
    assert json.loads((tmp_path / "baselines.json").read_text())["xz"] == 2.75


def test_curve_takes_logs_with_gaps(tmp_path):
    source = tmp_path / "metrics.csv"
    source.write_text("step,train/nll,val/nll\n0,3.0,\n1,2.0,\n1,,2.5\n")
    draw_losses(source, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    source.write_text("step\n")
    draw_losses(source, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").is_file()
