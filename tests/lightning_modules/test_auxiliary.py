"""Auxiliary losses of mixers: in the gradient once, in the log by name, in no validation."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from statezoo.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
SGD = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}
MOM = {"name": "mom", "inner": "gla", "balance_coefficient": 1.0}


def test_it_counts_in_proportion_to_tokens_over_accumulated_batches(tiny, trainer, batches):
    parts, module, seen = batches([8, 3]), tiny([MOM], optim=SGD), {}
    net = tiny([MOM]).net.train()
    total = 0.0
    for part in parts:
        out = net.model(part["tokens"])
        logits = net.lm_head(out.last_hidden_state).flatten(0, 1)
        total += F.cross_entropy(logits, part["targets"].flatten(), reduction="sum")
        balance = torch.stack([told["loss"] for told in out.auxiliary.values()]).mean()
        total += balance * (part["targets"] != -100).sum()
    (total / 22).backward()

    def keep(*_args, **_kwargs):
        seen.update({n: p.grad.clone() for n, p in module.net.named_parameters()})

    module.clip_gradients = keep
    trainer(max_steps=1, accumulate_grad_batches=2).fit(module, parts)
    assert all(block.mixer.auxiliary is None for block in module.net.model.layers)
    for name, parameter in net.named_parameters():  # float32 sums in another order
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_it_is_logged_and_kept_out_of_the_losses(tiny, trainer, batches):
    parts, module = batches([8]), tiny([MOM], optim=SGD | {"lr": 0.0})
    fit = trainer(max_steps=1, log_every_n_steps=1)
    with torch.no_grad():
        told = module.net.train().model(parts[0]["tokens"]).auxiliary
        logits = module.net(parts[0]["tokens"]).logits.flatten(0, 1)
        nll = F.cross_entropy(logits, parts[0]["targets"].flatten()).item()
    fit.fit(module, parts, parts)
    found = {key: value.item() for key, value in fit.callback_metrics.items()}
    assert found["train/nll"] == pytest.approx(nll, rel=1e-5)
    assert found["val/nll"] == pytest.approx(nll, rel=1e-5)
    for name in ("router_balance", "router_entropy"):
        want = sum(told[i][name].item() for i in range(2)) / 2
        assert found[f"train/{name}"] == pytest.approx(want, rel=1e-5)
    for layer in range(2):
        loads = [found[f"train/router_load/{layer}.{m}"] for m in range(4)]
        assert loads == pytest.approx(told[layer]["router_load"].tolist(), rel=1e-5)
        assert sum(loads) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_run_from_the_command_line(tmp_path, monkeypatch):
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()  # they write to what was stderr on import
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(40)))
    main(
        [
            "fit", "--model", "MoM", "--model.inner", "gla", "--model.inner_settings.n_heads", "2",
            "--model.d_model", "16", "--model.n_layers", "2", "--data", "Text",
            "--data.path", "text.txt", "--data.seq_len", "16", "--data.batch_size", "2",
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
            "--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1",
        ]
    )  # fmt: skip
    (file,) = tmp_path.glob("runs/**/metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/nll"]]
    assert len(rows) == 2
    for row in rows:
        assert 1 < float(row["train/router_balance"]) < 4
        assert 0 < float(row["train/router_entropy"]) < 1.387  # log 4 = 1.386
        loads = [float(row[f"train/router_load/1.{m}"]) for m in range(4)]
        assert sum(loads) == pytest.approx(1, rel=1e-5)
