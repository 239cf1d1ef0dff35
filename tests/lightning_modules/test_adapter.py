"""Adapters as folders, and runs that train them, from the command line."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import statezoo
from statezoo.lightning_modules import (
    SequenceClassifier,
    architectures,
    export,
    load_checkpoint,
    load_network,
)
from statezoo.lightning_modules.adapter import apply_adapter, save_adapter
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = 6
COMMON = [
    "--data", "Text", "--data.path", "text.txt", "--data.seq_len", "16", "--data.batch_size", "2",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.log_every_n_steps", "1", "--trainer.max_steps", str(STEPS),
    "--trainer.val_check_interval", "3", "--checkpoints.every_n_steps", "1",
]  # fmt: skip
SHAPE = ["--model.d_model", "16", "--model.n_layers", "2"]
PART = ["head", "lora", "state"]
KEEP = """
from lightning.pytorch import Callback

class KeepAll(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"at-{trainer.global_step}.ckpt", weights_only=False)
"""
IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a text, a callback, and a trained base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(24)))
    Path("keeping.py").write_text(KEEP)
    main(["fit", "--model", "GLA", *SHAPE, *COMMON, "--name", "base"])
    return tmp_path


def losses(run):
    with Path("runs", run, "version_0", "metrics.csv").open(newline="") as file:
        return {
            int(r["step"]): float(r["train/nll"]) for r in csv.DictReader(file) if r["train/nll"]
        }


def logits(net):
    with torch.no_grad():
        return net.eval()(IDS).logits


@pytest.mark.parametrize("tune", PART)
def test_a_run_writes_its_adapter_and_goes_on_where_it_was(tune, folder, capsys):
    fit = ["fit", "--model", "GLA", *SHAPE, *COMMON, "--model.pretrained", "runs/base"]
    lora = ["--model.adapter.dropout", "0.2"] if tune == "lora" else []
    fit += ["--model.tune", tune, *lora, "--model.optim.lr", "0.05"]
    main([*fit, "--name", "whole", "--trainer.callbacks+=keeping.KeepAll"])
    run = Path("runs/whole/version_0")

    # resumed from the settings, and from the checkpoint alone, it is the same run
    whole = losses("whole")
    main([*fit, "--name", "again", "--ckpt_path", "at-2.ckpt"])
    main(["fit", *COMMON, "--name", "alone", "--ckpt_path", "at-4.ckpt"])
    assert losses("again") == {n: whole[n] for n in range(2, STEPS)}
    assert losses("alone") == {n: whole[n] for n in range(4, STEPS)}
    a, b = (load_checkpoint(f"runs/{r}/version_0/last.ckpt") for r in ("whole", "alone"))
    for (name, p), q in zip(a.net.named_parameters(), b.net.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert json.loads(Path("runs/alone/version_0/adapter/adapter.json").read_text())["base"]

    # the adapter and its base, the checkpoint and the exported folder are one network
    base = load_network("runs/base/version_0/best.ckpt")
    before = logits(base)
    want = logits(load_checkpoint(run / "best.ckpt").net)
    assert (want - before).abs().max() > 1e-3
    for found in (
        load_network(run / "best.ckpt"),
        statezoo.load(run / "export"),
        apply_adapter(base, run / "adapter"),
    ):
        assert type(found) is StateZooForCausalLM
        assert not any(".lora_" in name for name, _ in found.named_parameters())
        torch.testing.assert_close(logits(found), want, atol=2e-6, rtol=1e-5)  # order of sums
    assert torch.equal(logits(base), before)  # which is left as it was
    info = json.loads((run / "adapter" / "adapter.json").read_text())
    files = [file for file in (run / "adapter").iterdir() if file.name != "adapter.json"]
    assert info["bytes"] == sum(file.stat().st_size for file in files)
    assert info["base"] == "runs/base/version_0/best.ckpt"
    assert info["kind"] == tune

    # and every command reads it
    capsys.readouterr()
    for source in (["--ckpt", "runs/whole"], ["--model", str(run / "export")]):
        main(["generate", *source, "--prompt", "Line", "--max_new_tokens", "5", "--seed", "1"])
    one, two = capsys.readouterr().out.split("Line")[1:3]
    assert one.strip() == two.strip()
    main(["export", "runs/whole", "merged"])
    assert torch.equal(logits(statezoo.load("merged")), logits(load_network(run / "best.ckpt")))
    main(["test", *COMMON[:8], "--ckpt_path", "runs/whole", "--trainer.accelerator", "cpu"])


def test_peft_itself_reads_a_lora_adapter(folder):
    import peft

    main(["fit", "--model", "GLA", *SHAPE, *COMMON, "--model.pretrained", "runs/base",
          "--model.tune", "lora", "--model.optim.lr", "0.05", "--name", "tuned"])  # fmt: skip
    run = Path("runs/tuned/version_0")
    base = load_network("runs/base/version_0/best.ckpt")
    theirs = peft.PeftModel.from_pretrained(base, run / "adapter")
    want = logits(load_checkpoint(run / "best.ckpt").net)
    torch.testing.assert_close(logits(theirs), want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), want, atol=2e-6, rtol=1e-5)


def preset(name):
    """A base of one of our presets, and the names of its module and shape."""
    model = yaml.safe_load((Path(__file__).parents[2] / f"configs/{name}.yaml").read_text())[
        "model"
    ]
    cls = getattr(architectures, model["class_path"])
    torch.manual_seed(0)
    return cls, model["init_args"]


@pytest.mark.parametrize("name", ["gla_tiny", "gated_deltanet_tiny", "gdn_hybrid_tiny"])
@pytest.mark.parametrize(("tune", "share"), [("lora", 0.05), ("state", 0.01)])
def test_adapters_are_small(name, tune, share, tmp_path):
    cls, shape = preset(name)
    base = export(cls(**shape).net, tmp_path / "base")
    module = cls(**shape, pretrained=str(base), tune=tune)
    folder = save_adapter(module, tmp_path / "adapter")
    size = (base / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in folder.iterdir()) < share * size + 600  # the json
    assert (folder / "adapter_model.safetensors").stat().st_size < share * size


@pytest.mark.parametrize("tune", PART)
def test_a_classifier_of_a_causal_base(tune, tmp_path):
    import peft

    torch.manual_seed(0)
    shape = {"vocab_size": 16, "d_model": 16, "n_layers": 2}
    base = StateZooForCausalLM(StateZooConfig(**shape, mixers=["gla"])).eval()
    settings = {"class_names": ["a", "b", "c"], "bidirectional": True, "tune": tune}
    source = str(export(base, tmp_path / "base"))
    module = SequenceClassifier(["gla"], **shape, **settings, pretrained=source)
    with torch.no_grad():
        for p in module.net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    ids = IDS % 16
    want = module.net.eval()(ids).logits
    folder = save_adapter(module, tmp_path / "adapter")
    found = apply_adapter(base, folder).eval()
    torch.testing.assert_close(found(ids).logits, want, atol=2e-6, rtol=1e-5)
    assert found.config.id2label == {0: "a", 1: "b", 2: "c"}
    if tune == "lora":
        fresh = SequenceClassifier(
            ["gla"], **shape, **settings | {"tune": "full"}, pretrained=source
        ).net
        theirs = peft.PeftModel.from_pretrained(fresh, folder).eval()
        torch.testing.assert_close(theirs(ids).logits, want, atol=2e-6, rtol=1e-5)


def test_of_a_mixture_of_memories(tmp_path):
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(0)
    shape = {"vocab_size": 16, "d_model": 16, "n_layers": 1, "n_memories": 2}
    source = str(export(architectures.MoM(**shape).net, tmp_path / "base"))
    module = architectures.MoM(**shape, pretrained=source, tune="lora", adapter={"rank": 2})
    with torch.no_grad():
        for p in module.net.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    folder = save_adapter(module, tmp_path / "adapter")
    found = apply_adapter(load_network(source), folder)
    ids = IDS % 16
    want = module.net.eval()(ids).logits
    torch.testing.assert_close(found.eval()(ids).logits, want, atol=2e-6, rtol=1e-5)
    for part in module.net.modules():
        if isinstance(part, LoraLayer):
            part.merge()
    torch.testing.assert_close(module.net(ids).logits, want, atol=2e-6, rtol=1e-5)


def test_states_go_on_being_trained(tmp_path):
    """What was tuned is a base like any other: for all of it, or its states once more."""
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "d_model": 16, "n_layers": 1, "mixers": ["gla"]}
    net = StateZooForCausalLM(StateZooConfig(**shape, initial_states=1))
    source = str(export(net, tmp_path))
    for tune in ("full", "state", "lora"):
        module = architectures.GLA(
            vocab_size=16, d_model=16, n_layers=1, pretrained=source, tune=tune
        )
        names = {n for n, p in module.net.named_parameters() if p.requires_grad}
        states = {n for n in names if "initial_state" in n}
        assert {"full": len(states) == 2, "state": names == states, "lora": not states}[tune]
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        again = type(module)(**module.hparams)
        again.on_load_checkpoint(checkpoint)
        again.load_state_dict(checkpoint["state_dict"])
        assert torch.equal(again.net.eval()(IDS % 16).logits, module.net.eval()(IDS % 16).logits)
    with pytest.raises(ValueError, match=r"of rank 1, adapter\.rank is 2"):
        architectures.GLA(vocab_size=16, d_model=16, n_layers=1, pretrained=source, tune="state",
                          adapter={"rank": 2})  # fmt: skip


def test_mistakes_are_told(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "d_model": 16, "n_layers": 1}
    base = StateZooForCausalLM(StateZooConfig(**shape, mixers=["gla"]))
    with pytest.raises(FileNotFoundError, match=r"of ours: it has no adapter\.json"):
        apply_adapter(base, tmp_path)
    source = str(export(base, tmp_path / "base"))
    with pytest.raises(ValueError, match="tune: full leaves no adapter"):
        save_adapter(architectures.GLA(**shape, pretrained=source), tmp_path / "none")
    module = architectures.GLA(**shape, pretrained=source, tune="state")
    folder = save_adapter(module, tmp_path / "adapter")
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        n for n, p in module.net.named_parameters() if p.requires_grad
    }
    other = StateZooForCausalLM(StateZooConfig(**shape, mixers=["gla"]))
    with pytest.raises(ValueError, match=r"for other weights than these: .* from '.*base'"):
        apply_adapter(other, folder)
