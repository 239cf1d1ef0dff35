"""Pretrained attention layers with another base or window, and longer windows of data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from statezoo.lightning_modules import (
    CausalLM,
    apply_adapter,
    architectures,
    export,
    load_network,
    save_adapter,
)
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE = {"vocab_size": 9, "d_model": 16, "n_layers": 2}
IDS = torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(0))


def base(folder, mixers):
    torch.manual_seed(0)
    net = StateZooForCausalLM(StateZooConfig(**SHAPE, mixers=mixers))
    return net, str(export(net, folder))


@pytest.mark.parametrize("settings", [{"rope_base": 5e4}, {"window": 4}, {"rope_base": None}])
def test_attention_changes_without_its_weights(settings, tmp_path):
    net, source = base(tmp_path, ["gla", "attention"])
    made = CausalLM(**SHAPE, pretrained=source, attention=settings)
    for name, x in net.state_dict().items():
        assert torch.equal(made.net.state_dict()[name], x), name
    by_hand = StateZooForCausalLM(
        StateZooConfig(**SHAPE, mixers=["gla", {"name": "attention", **settings}])
    )
    by_hand.load_state_dict(net.state_dict())
    logits = made.net.eval()(IDS).logits
    assert torch.equal(logits, by_hand.eval()(IDS).logits)
    assert not torch.allclose(logits, net.eval()(IDS).logits, atol=1e-6)
    again = CausalLM(**made.hparams)  # as a checkpoint does
    assert again.net.config.mixers == made.net.config.mixers


def test_mistakes_are_told(tmp_path):
    _, source = base(tmp_path / "a", ["gla", "attention"])
    _, recurrent = base(tmp_path / "b", ["gla"])
    wrong = {
        r"attention has rope_base and window, got n_heads": (source, {"n_heads": 2}),
        r"attention\.window needs layers that attend, these are gla": (recurrent, {"window": 3}),
        r"attention is about pretrained layers, and these weights": (None, {"window": 3}),
    }
    for message, (weights, settings) in wrong.items():
        with pytest.raises(ValueError, match=message):
            CausalLM(**SHAPE, pretrained=weights, attention=settings)
    _, attention = base(tmp_path / "c", ["attention"])
    with pytest.raises(ValueError, match=r"set --model\.attention '\{rope_base: 80000\.0\}'"):
        architectures.Transformer(**SHAPE, pretrained=attention, rope_base=80000.0)


def test_a_hybrid_reads_four_times_the_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    words = np.random.default_rng(0).choice(["one ", "two ", "three "], 2500)
    Path("text.txt").write_text("".join(words))
    run = ["--data.path", "text.txt", "--trainer.accelerator", "cpu",
           "--trainer.enable_progress_bar", "false"]  # fmt: skip
    main(["fit", "--model", "Hybrid", "--model.mixers", "[gla, attention]", "--model.d_model", "16",
          "--model.n_layers", "2", "--data", "Text", "--data.seq_len", "32", "--trainer.max_steps",
          "3", "--name", "short", *run])  # fmt: skip
    main(["fit", "--config", "finetune/longer", "--model.pretrained", "runs/short", *run,
          "--model.attention", "{rope_base: 42000}", "--model.optim.lr", "0", "--name", "long",
          "--data.seq_len", "128", "--data.batch_size", "2", "--trainer.max_steps", "4",
          "--trainer.val_check_interval", "2", "--trainer.callbacks.init_args.start", "32",
          "--trainer.callbacks.init_args.steps_per_stage", "1"])  # fmt: skip
    long = Path("runs/long/version_0")
    content = torch.load(long / "best.ckpt", weights_only=True)
    assert math.isfinite(content["callbacks"]["Checkpoints"]["best_score"])
    ends = [load_network(f"runs/{name}/version_0/best.ckpt") for name in ("short", "long")]
    short, new = (net.state_dict() for net in ends)
    assert all(torch.equal(short[name], new[name]) for name in short)  # at a rate of 0
    for config in (json.loads((long / "export/config.json").read_text()), ends[1].config.to_dict()):
        assert [m.get("rope_base") for m in config["mixers"]] == [None, 42000]


def test_an_adapter_brings_the_base_along(tmp_path):
    net, source = base(tmp_path / "base", ["gla", "attention"])
    task = CausalLM(**SHAPE, pretrained=source, attention={"rope_base": 5e4}, tune="state")
    folder = save_adapter(task, tmp_path / "adapter")
    found = apply_adapter(net, folder)
    assert found.config.mixers[1]["rope_base"] == 5e4
    torch.testing.assert_close(found.eval()(IDS).logits, task.net.eval()(IDS).logits)
