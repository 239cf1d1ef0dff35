"""tune: what each choice trains, by name and by value."""

import builtins
import re
from pathlib import Path

import pytest
import torch
import yaml
from tests.lightning_modules.motifs import COMPLEMENT
from tests.zoo.cases import CASES, KINDS, has_memory
from torch import nn

from statezoo.lightning_modules import (
    CausalLM,
    Hybrid,
    MaskedLM,
    NoteFrames,
    SequenceClassifier,
    architectures,
    export,
)
from statezoo.lightning_modules.optim import Optim, adamw
from statezoo.lightning_modules.tuning import Adapter, default_rank, plain_network, tuned
from statezoo.zoo import StateZooConfig, StateZooForCausalLM, StateZooForSequenceClassification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
]
WORDS = 11
IDS = torch.randint(WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIGS = Path(__file__).parents[2] / "configs"
TINY = sorted(file.name for file in CONFIGS.glob("*_tiny.yaml"))
RECURRENT = [case for case in KINDS if any(map(has_memory, CASES[case]))]


def network(case, kind=StateZooForCausalLM, **settings):
    torch.manual_seed(0)
    mixers = CASES[case]
    settings = {"tie_embeddings": True, "n_layers": len(mixers)} | settings
    return kind(StateZooConfig(vocab_size=WORDS, d_model=16, mixers=mixers, **settings))


def trained(net):
    return {name for name, p in net.named_parameters() if p.requires_grad}


def linear_maps(net):
    """Names of all linear maps below the layers, found without the code that is tested."""
    return {
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


def two_steps(net):
    """Train; return the names of what has changed."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = adamw(net, Optim(lr=0.03))
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in net.parameters() if p.requires_grad
    }
    net.train()
    labels = IDS if hasattr(net, "lm_head") else torch.tensor([0, 1])
    for scale in (1.0, 0.3):
        optimizer.zero_grad()
        net(IDS, labels=labels).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] *= scale
        optimizer.step()
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("case", KINDS)
def test_lora_trains_an_update_of_every_projection_and_nothing_else(case):
    net = network(case)
    maps, logits = linear_maps(net), net.eval()(IDS).logits
    assert maps
    net, adapter = tuned(net, "lora", Adapter(rank=2, dropout=0.1))
    assert adapter == Adapter(2, 4.0, 0.1)
    assert trained(net) == {f"{m}.lora_{side}.default.weight" for m in maps for side in "AB"}
    assert torch.equal(net.eval()(IDS).logits, logits)
    assert two_steps(net) == trained(net)


@pytest.mark.parametrize("case", KINDS)
def test_lora_of_every_mixer_is_merged_with_equal_logits(case):
    net, adapter = tuned(network(case), "lora", Adapter(rank=2))
    before = net.eval()(IDS).logits
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    want = net.eval()(IDS).logits
    plain = plain_network(net, "lora", adapter).eval()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert (want - before).abs().max() > 1e-4
    torch.testing.assert_close(plain(IDS).logits, want, atol=1e-5, rtol=1e-4)  # order of sums


@pytest.mark.parametrize("name", TINY)
def test_the_adapter_of_every_family_is_below_five_percent(name):
    """Counted here: r * (in + out) of all maps, in float32, for the preset of each family."""
    settings = yaml.safe_load((CONFIGS / name).read_text())["model"]
    with torch.device("meta"):
        net = getattr(architectures, settings["class_path"])(**settings["init_args"]).net
        total = sum(p.numel() for p in net.parameters())
        widths = [sum(m.weight.shape) for n, m in net.named_modules() if n in linear_maps(net)]
        added = default_rank(net, "lora") * sum(widths)
    assert 0 < added < 0.05 * total


@pytest.mark.parametrize("case", RECURRENT)
def test_state_trains_initial_states_and_nothing_else(case):
    net = network(case)
    recurrent = [i for i, e in enumerate(net.config.layer_mixers) if has_memory(e)]
    names = {name for name, _ in net.named_parameters()}
    net, _ = tuned(net, "state", Adapter())
    assert trained(net) == {n for n, _ in net.named_parameters()} - names
    assert {re.match(r"model\.layers\.(\d+)\.initial_state\.", n)[1] for n in trained(net)} == {
        str(i) for i in recurrent
    }
    assert two_steps(net) == trained(net)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("case", KINDS)
def test_head_trains_the_head_alone(case, tie):
    net = network(case, tie_embeddings=tie)
    logits = net.eval()(IDS).logits
    table = net.get_input_embeddings().weight.detach().clone()
    net, _ = tuned(net, "head", Adapter())
    assert trained(net) == {"lm_head.weight"}
    assert torch.equal(net.eval()(IDS).logits, logits)
    assert two_steps(net) == {"lm_head.weight"}
    assert torch.equal(net.get_input_embeddings().weight, table)
    assert net.config.tie_embeddings is False


@pytest.mark.parametrize("case", ["gla", "hybrid", "mom"])
def test_full_trains_everything(case):
    net, _ = tuned(network(case), "full", Adapter())
    assert trained(net) == {name for name, _ in net.named_parameters()} == two_steps(net)


@pytest.mark.parametrize("tune", ["lora", "state", "head"])
def test_the_head_of_a_classifier_is_trained_with_all(tune):
    net = network("gla", StateZooForSequenceClassification, num_labels=2)
    net, _ = tuned(net, tune, Adapter())
    assert {"score.weight", "score.bias"} <= trained(net) == two_steps(net)
    assert all("lora" in n or "initial_state" in n or "score" in n for n in trained(net))


def test_states_are_not_pulled_to_zero():
    net, _ = tuned(network("gla"), "state", Adapter(rank=1))
    decayed, kept = adamw(net, Optim(weight_decay=0.5)).param_groups
    assert not decayed["params"]
    assert len(kept["params"]) == len(trained(net))


def test_the_default_rank_is_the_highest_that_is_small():
    """Counted here by hand: LoRA r * (in + out) of all maps, below 5 % of the base in bytes."""
    settings = {"vocab_size": 64, "d_model": 64, "n_layers": 2, "mixers": ["gla", "mamba2"]}
    base = StateZooForCausalLM(StateZooConfig(**settings))
    size = 4 * sum(p.numel() for p in base.parameters())
    widths = [sum(m.weight.shape) for n, m in base.named_modules() if n in linear_maps(base)]
    fits = [r for r in (16, 8, 4, 2, 1) if sum(4 * r * w + 256 for w in widths) < 0.05 * size]
    _, adapter = tuned(base, "lora", Adapter())
    assert adapter.rank == (fits or [1])[0]
    _, adapter = tuned(StateZooForCausalLM(StateZooConfig(**settings)), "state", Adapter())
    assert adapter.rank == 1  # more would be over 1 %
    whole, adapter = tuned(
        StateZooForCausalLM(StateZooConfig(**settings)), "state", Adapter(rank=0)
    )
    assert adapter.rank == 0
    assert dict(whole.named_parameters())["model.layers.0.initial_state.S"].shape == (4, 8, 16)


MISTAKES = {
    "tune: loar": ({"tune": "loar"}, r"tune must be full, .* got 'loar' \(did you mean lora\?\)"),
    "rank": ({"tune": "head", "adapter": {"rank": 2}}, "rank has no meaning for tune: head"),
    "alpha": ({"tune": "state", "adapter": {"alpha": 2.0}}, "alpha has no meaning for tune: state"),
    "zero": ({"tune": "lora", "adapter": {"rank": 0}}, "at least 1 for tune: lora, got 0"),
    "below": ({"tune": "lora", "adapter": {"rank": -1}}, "at least 0, got -1"),
    "dropout": ({"tune": "lora", "adapter": {"dropout": 1.0}}, r"lie in \[0, 1\), got 1.0"),
    "typo": ({"tune": "lora", "adapter": {"rnak": 1}}, "no setting 'rnak': did you mean rank"),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(["gla"], d_model=16, n_layers=1, **settings)


def test_attention_has_no_state_to_train():
    with pytest.raises(ValueError, match="this network has only attention: choose lora"):
        CausalLM(["attention"], d_model=16, n_layers=1, tune="state")


@pytest.mark.parametrize("tune", ["head", "lora", "state"])
def test_fresh_weights_are_not_tuned_in_part(tune, tiny, trainer, batches):
    with pytest.raises(ValueError, match=rf"tune: {tune} trains a part .* fresh: give --model"):
        trainer(max_steps=1).fit(tiny(tune=tune), batches([4]))


def test_without_peft_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "statezoo\[peft\]"'):
        CausalLM(["gla"], d_model=16, n_layers=1, tune="lora")


def test_a_new_head_is_not_left_frozen(tmp_path):
    base = export(network("gla", StateZooForSequenceClassification, num_labels=2), tmp_path)
    shape = {"vocab_size": WORDS, "d_model": 16, "n_layers": 1}
    with pytest.raises(ValueError, match="the head is new, and tune: lora would leave it"):
        CausalLM(["gla"], **shape, pretrained=str(base), tune="lora")


@pytest.mark.parametrize("tune", ["full", "head", "lora", "state"])
def test_all_tasks_can_be_tuned(tune, tmp_path):
    """One-mixer modules, hybrids, masked models and classifiers, also both ways and strands."""
    torch.manual_seed(0)
    shape = {"vocab_size": 8, "d_model": 16, "n_layers": 2, "tie_embeddings": True}
    base = StateZooForCausalLM(StateZooConfig(**shape, mixers=["gla"]))
    source = str(export(base, tmp_path))
    shape = {"d_model": 16, "n_layers": 2, "vocab_size": 8, "pretrained": source, "tune": tune}
    made = [
        architectures.GLA(**shape),
        Hybrid(["gla"], **shape),
        MaskedLM(["gla"], **shape, reverse_complement="equivariant", complement=COMPLEMENT),
        MaskedLM(["gla"], **shape, tie_directions=False),
        SequenceClassifier(["gla"], **shape, class_names=["a", "b"], bidirectional=True),
    ]
    ids = torch.randint(3, 7, (2, 6))
    targets = {"tokens": ids, "targets": ids, "labels": torch.tensor([0, 1])}
    for module in made:
        loss = module.training_loss(targets)
        loss["nats"].backward()
        found = {n for n, p in module.net.named_parameters() if p.grad is not None}
        assert found == trained(module.net)
        assert module.hparams["tune"] == tune
        again = type(module)(**module.hparams)  # as a checkpoint does
        again.load_state_dict(module.state_dict())
        assert trained(again.net) == trained(module.net)


def test_a_task_that_starts_anew_has_no_such_settings():
    module = NoteFrames(vocab_size=4, d_model=8, n_layers=1)
    assert not {"tune", "adapter", "pretrained"} & {*module.hparams}
    NoteFrames(**module.hparams)
