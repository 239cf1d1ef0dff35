"""The task Linearize: what it trains, and its two distances from the teacher by hand."""

import re

import pytest
import torch
import torch.nn.functional as F

from statezoo.lightning_modules import Linearize, export, load_checkpoint, load_network
from statezoo.lightning_modules.tuning import plain_network
from statezoo.zoo import StateZooConfig, StateZooForCausalLM
from statezoo.zoo.convert.linearize import linearize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
]
D, WORDS = 16, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher with grouped heads, and the model that it becomes but for its last layer."""
    torch.manual_seed(0)
    entry = {"name": "attention", "n_heads": 4, "n_kv_heads": 2, "qkv_bias": True}
    sizes = {"d_model": D, "n_layers": 3, "vocab_size": WORDS, "initializer_range": 0.3}
    teacher = StateZooForCausalLM(StateZooConfig(mixers=[entry], tie_embeddings=True, **sizes))
    where = tmp_path_factory.mktemp("models")
    export(teacher, where / "teacher")
    export(linearize(teacher, window=3, layers="0,1"), where / "student")
    return str(where / "teacher"), str(where / "student")


def task(folders, **settings):
    teacher, student = folders
    settings = {"teacher": teacher, "pretrained": student, "vocab_size": WORDS} | settings
    made = Linearize(**settings)
    made.read_teacher()
    return made.train()


def batch(T=9):
    draw = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(WORDS, (2, 2, T), generator=draw)
    targets[0, :4] = -100
    return {"tokens": tokens, "targets": targets, "n_bytes": torch.tensor(2 * T)}


def test_trains_lora_of_queries_keys_and_values_alone(folders):
    made = task(folders)
    found = {name for name, p in made.named_parameters() if p.requires_grad}
    assert found == {
        f"net.model.layers.{i}.mixer.{x}_proj.lora_{side}.default.weight"
        for i in range(3) for x in "qkv" for side in "AB"
    }  # fmt: skip
    assert made.adapter.rank == 8
    widths = {"q": D, "k": D // 2, "v": D // 2}
    size = 3 * sum(8 * (D + width) for width in widths.values())
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == size
    assert not any(name.startswith(("teacher", "_teacher")) for name in made.state_dict())


@pytest.mark.parametrize(
    ("attention", "distillation", "tau"), [(2.0, 0, 1), (0, 0.5, 3), (1, 1, 2)]
)
def test_distances_by_hand(folders, attention, distillation, tau):
    made = task(
        folders, attention_transfer=attention, distillation=distillation, temperature=float(tau)
    )
    given = batch()
    with torch.no_grad():  # updates that are not zero, in the student alone
        for name, p in made.net.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    loss = made.training_loss(given)
    teacher, student = load_network(folders[0]), plain_network(made.net, "lora", made.adapter)
    outs = [net(given["tokens"], output_hidden_states=True) for net in (teacher, student)]
    scored = given["targets"] != -100
    logits = [out.logits[scored] for out in outs]
    nll = F.cross_entropy(logits[1], given["targets"][scored], reduction="sum")
    torch.testing.assert_close(loss["nats"], nll)
    errors = []
    for i in range(2):  # the last layer is attention in both
        block = student.model.layers[i]
        x = block.mixer_norm(outs[1].hidden_states[i])
        y, wanted = block.mixer(x)[0], teacher.model.layers[i].mixer(x)[0]
        errors.append((y - wanted).square().mean())
    p, log_q = (logits[0] / tau).softmax(-1), (logits[1] / tau).log_softmax(-1)
    kl = tau**2 * (p * (p.log() - log_q)).sum(-1).mean()
    want = attention * torch.stack(errors).mean() + distillation * kl
    assert want > 0.01
    torch.testing.assert_close(loss["auxiliary"][0]["loss"], want)
    (loss["auxiliary"][0]["loss"]).backward()
    assert all(p.grad is None for p in made._teacher[0].parameters())
    grad = made.net.model.layers[0].mixer.q_proj.lora_A["default"].weight.grad
    assert grad.abs().sum() > 0


def test_trains_and_exports_a_plain_model(folders, trainer, batches, tmp_path):
    made = task(folders, attention_transfer=1.0, distillation=1.0)
    fit = trainer(max_epochs=2, enable_checkpointing=True, logger=False)
    loader = batches([8, 5, 8])
    fit.fit(made, loader, loader)
    metrics = fit.callback_metrics
    teacher = load_network(folders[0]).eval()
    nats = torch.cat([
        F.cross_entropy(teacher(b["tokens"]).logits[b["targets"] != -100],
                        b["targets"][b["targets"] != -100], reduction="none")
        for b in loader
    ])  # fmt: skip
    torch.testing.assert_close(metrics["val/teacher_nll"], nats.mean().detach())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["teacher"] == folders[0]
    assert all(name.startswith("net.") for name in content["state_dict"])
    plain = load_network(tmp_path / "a.ckpt").eval()
    export(plain, tmp_path / "plain")
    again = load_network(tmp_path / "plain").eval()
    names = {name for name, _ in again.named_parameters()}
    assert names == {name for name, _ in load_network(folders[1]).named_parameters()}
    assert [m["name"] for m in again.config.layer_mixers] == ["liger", "liger", "attention"]
    ids = batch()["tokens"]
    torch.testing.assert_close(again(ids).logits, made.eval().net(ids).logits)
    assert not torch.allclose(again(ids).logits, load_network(folders[1]).eval()(ids).logits)
    back = load_checkpoint(tmp_path / "a.ckpt").eval()
    torch.testing.assert_close(back.net(ids).logits, made.net(ids).logits)


def test_packed_batches_have_the_same_distances(folders):
    made = task(folders, attention_transfer=1.0, distillation=1.0)
    given = batch()
    tokens, targets = (given[key].reshape(1, -1) for key in ("tokens", "targets"))
    packed = {"tokens": tokens, "targets": targets, "cu_seqlens": torch.tensor([0, 9, 18])}
    one, other = (made.training_loss(b)["auxiliary"][0] for b in (given, packed))
    for key in ("attention_error", "distillation"):
        torch.testing.assert_close(one[key], other[key])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": None, "distillation": 1.0}, "need the teacher: give --model.teacher"),
        ({"attention_transfer": -1.0}, "attention_transfer and distillation of at least 0"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"adapter": {"targets": ["qproj"]}}, "no projection is called 'qproj'; there are down_"),
    ],
)
def test_says_what_is_wrong(folders, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        task(folders, **settings)


def test_refuses_what_is_not_linearised(folders, tmp_path):
    with pytest.raises(ValueError, match=r"no layer of .* is liger: make a linearised model first"):
        task(folders, pretrained=folders[0])
    small = StateZooForCausalLM(StateZooConfig(d_model=8, n_layers=3, vocab_size=WORDS))
    export(small, tmp_path / "small")
    with pytest.raises(ValueError, match="has d_model 8, the model 16: give the one that it was"):
        task(folders, teacher=str(tmp_path / "small"))
