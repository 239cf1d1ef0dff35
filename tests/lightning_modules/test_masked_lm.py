"""Hidden tokens: loss, weights, both strands, weights from elsewhere, export."""

import math

import pytest
import torch
from tests.lightning_modules.motifs import BOS, COMPLEMENT, MASK, Motifs
from torch.nn import functional as F
from torch.utils.data import DataLoader

from statezoo.lightning_modules import CausalLM, MaskedLM, load_checkpoint, load_network
from statezoo.lightning_modules.network import export_checkpoint
from statezoo.lightning_modules.strands import other_strand

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]
TINY = {"vocab_size": 8, "d_model": 16, "n_layers": 1}
SGD = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}


def masked(mixers=("gla",), **settings):
    torch.manual_seed(1)
    module = MaskedLM(list(mixers), **{**TINY, **settings})
    torch.nn.init.normal_(module.net.lm_head.weight, std=1.0)  # opinions
    return module


def hidden(B=3, T=10, seed=0, p=0.3):
    """Make a batch in which some tokens are hidden."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 7, (B, T), generator=draw)
    chosen = torch.rand(B, T, generator=draw) < p
    return {
        "tokens": tokens.masked_fill(chosen, MASK),
        "targets": tokens.masked_fill(~chosen, -100),
        "n_bytes": chosen.sum(),
    }


def gradients(module, trainer, made, **settings):
    seen = {}

    def keep(*_args, **_kwargs):
        seen.update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    module.clip_gradients = keep
    trainer(max_steps=1, **settings).fit(module, DataLoader(made, batch_size=None))
    return seen


@pytest.mark.parametrize("task", [MaskedLM, CausalLM])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_weighted_mean(task, weighted, trainer):
    parts = [hidden(seed=1), hidden(seed=2, p=0.0), hidden(B=1, seed=3)]
    if weighted:
        for part in parts:
            draw = torch.Generator().manual_seed(9)
            part["weights"] = torch.rand(part["tokens"].shape, generator=draw) / 10

    def fresh():
        torch.manual_seed(0)
        return task(["gla"], **TINY, optim=SGD)

    got = gradients(fresh(), trainer, parts, accumulate_grad_batches=3)
    module = fresh()
    total = weights = 0
    for part in parts:
        nll = -module.net(part["tokens"]).logits.log_softmax(-1)
        for b, t in (part["targets"] != -100).nonzero().tolist():
            weight = float(part["weights"][b, t]) if weighted else 1.0
            total = total + weight * nll[b, t, part["targets"][b, t]]
            weights += weight
    (total / weights).backward()
    for name, parameter in module.named_parameters():  # float32 sums in another order
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("task", [MaskedLM, CausalLM])
def test_validation_counts_all_alike_and_the_unmasked_beside(task, trainer):
    module, parts = task(["gla"], **TINY), [hidden(seed=1), hidden(B=1, seed=2)]
    module.unit = "base"
    for part in parts:
        part["weights"] = torch.full(part["tokens"].shape, 0.1)
        part["weights"][:, ::2] = 1.0
    (found,) = trainer().validate(module, DataLoader(parts, batch_size=None), verbose=False)
    every, plain = [], []
    for part in parts:
        nll = -module.net(part["tokens"]).logits.log_softmax(-1).detach()
        for b, t in (part["targets"] != -100).nonzero().tolist():
            every.append(float(nll[b, t, part["targets"][b, t]]))
            if t % 2 == 0:
                plain.append(every[-1])
    want = {
        "val/nll": sum(every) / len(every),
        "val/bits_per_base": sum(every) / len(every) / math.log(2),
        "val/bits_per_base_unmasked": sum(plain) / len(plain) / math.log(2),
    }
    assert 0 < len(plain) < len(every)
    assert found == pytest.approx(want, rel=1e-5)


def turned(row, bos=False):
    """Reverse-complement a list of tokens."""
    head = row[:1] if bos and row[0] == BOS else []
    return head + [COMPLEMENT[i] for i in reversed(row[len(head) :])]


@pytest.mark.parametrize("bos", [False, True])
def test_the_other_strand_of_rows_padded_rows_and_packs(bos):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 8, (n,), generator=draw).tolist() for n in (6, 1, 4)]
    rows = [[BOS, *row] for row in rows] if bos else rows
    want = [turned(row, bos) for row in rows]
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    packed = torch.tensor([[i for row in rows for i in row]])
    bounds = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()])
    for batch, lengths in (
        ({"tokens": padded, "attention_mask": mask}, None),
        ({"tokens": packed, "cu_seqlens": bounds.int()}, bounds.diff().tolist()),
        ({"tokens": torch.tensor(rows[:1])}, None),
    ):
        other, index = other_strand(batch, COMPLEMENT, BOS)
        if lengths is None:
            got = [x[: len(r)].tolist() for x, r in zip(other["tokens"], rows, strict=False)]
        else:
            got = [part.tolist() for part in other["tokens"][0].split(lengths)]
        assert got == want[: len(got)]
        assert torch.equal(index[index], torch.arange(len(index)))
        back, _ = other_strand(other, COMPLEMENT, BOS)
        assert torch.equal(back["tokens"], batch["tokens"])


@pytest.mark.parametrize("packed", [False, True])
def test_average_is_the_mean_of_both_strands_at_each_place(packed, trainer):
    module = masked(reverse_complement="average", complement=COMPLEMENT).eval()
    batch = hidden(B=2, T=7)
    if packed:
        batch = {k: v.view(1, -1) if v.ndim else v for k, v in batch.items()}
        batch["cu_seqlens"] = torch.tensor([0, 7, 14], dtype=torch.int32)
    rows = batch["tokens"].view(2, 7)
    with torch.no_grad():
        found = module.log_probabilities(batch).view(2, 7, 8)
        for row, got in zip(rows, found, strict=True):
            one = module.net(row[None]).logits[0].log_softmax(-1)
            other = module.net(torch.tensor([turned(row.tolist())])).logits[0].log_softmax(-1)
            for t in range(7):
                mean = [(one[t, w] + other[6 - t, COMPLEMENT[w]]) / 2 for w in range(8)]
                want = torch.stack(mean).log_softmax(-1)
                torch.testing.assert_close(got[t], want, rtol=1e-4, atol=1e-5)
    scored = batch["targets"] != -100
    want = F.nll_loss(found.view(-1, 8)[scored.flatten()], batch["targets"][scored])
    (logged,) = trainer().validate(module, DataLoader([batch], batch_size=None), verbose=False)
    assert logged["val/nll"] == pytest.approx(float(want), rel=1e-5)
    (predicted,) = trainer().predict(module, DataLoader([batch], batch_size=None))
    assert float(predicted["nll"].sum() / scored.sum()) == pytest.approx(float(want), rel=1e-5)
    assert predicted["nll"].shape == batch["tokens"].shape
    training = module.token_nll(batch).detach() / scored.sum()  # one strand alone
    assert abs(float(training) - float(want)) > 1e-3


def test_equivariant_networks_follow_the_data(trainer):
    module = masked(reverse_complement="equivariant", complement=COMPLEMENT)
    assert module.net.config.complement == COMPLEMENT
    trainer(max_steps=1).fit(module, Motifs("masked"))
    x = hidden()["tokens"]
    other = torch.tensor(COMPLEMENT)[x.flip(1)]
    with torch.no_grad():
        there = module.eval().net(other).logits.flip(1)[..., COMPLEMENT]
        torch.testing.assert_close(module.net(x).logits, there, rtol=0, atol=1e-5)


def test_data_for_another_objective_is_told(trainer):
    with pytest.raises(ValueError, match="MaskedLM needs data made for the masked objective, Moti"):
        trainer(max_steps=1).fit(masked(), Motifs("causal"))
    with pytest.raises(ValueError, match=r"CausalLM needs .* set --data.objective causal"):
        trainer(max_steps=1).fit(CausalLM(["gla"], **TINY), Motifs("masked"))
    with pytest.raises(ValueError, match=r"made for the causal one: DNA has it"):
        trainer(max_steps=1).fit(masked(), Motifs("labels"))
    with pytest.raises(ValueError, match="says the complement of each symbol"):
        masked(reverse_complement="average")


def test_weights_of_a_causal_model_go_on(trainer, tmp_path, caplog):
    first = CausalLM(["gla"], **TINY)
    fitted = trainer(max_steps=2)
    fitted.fit(first, Motifs("causal"))
    path = str(tmp_path / "causal.ckpt")
    fitted.save_checkpoint(path)
    module = MaskedLM(vocab_size=8, pretrained=path)
    assert caplog.messages[-1].endswith(
        "kept the embedding and 1 layer (gla) and the head, now reading both ways with the same "
        "weights"
    )
    assert module.hparams["bidirectional"]
    word = torch.tensor([[5]])  # one token has no other side
    torch.testing.assert_close(module.eval().net(word).logits, first.eval().net(word).logits)
    again = MaskedLM(vocab_size=8, pretrained=path, bidirectional=False)
    words = torch.tensor([[5, 3, 4]])
    torch.testing.assert_close(again.eval().net(words).logits, first.net(words).logits)
    both = MaskedLM(
        vocab_size=8, pretrained=path, reverse_complement="equivariant", complement=COMPLEMENT
    )
    assert both.net.config.complement == COMPLEMENT
    assert "now reading both strands with the same weights" in caplog.messages[-1]
    fitted = trainer(max_steps=1)
    fitted.fit(both, Motifs("masked"))
    fitted.save_checkpoint(tmp_path / "both.ckpt")
    third = MaskedLM(vocab_size=8, pretrained=str(tmp_path / "both.ckpt"))
    assert third.reverse_complement == "equivariant"
    with pytest.raises(ValueError, match="is equivariant, so reverse_complement 'augment'"):
        MaskedLM(vocab_size=8, pretrained=str(tmp_path / "both.ckpt"), reverse_complement="augment")
    with pytest.raises(ValueError, match=r"takes \[0, 1, 2, 6, .* the data \[0, 1, 2, 3"):
        MaskedLM(vocab_size=8, pretrained=str(tmp_path / "both.ckpt"), complement=list(range(8)))


def test_checkpoints_and_exported_folders_come_back(trainer, tmp_path):
    from transformers import AutoModelForMaskedLM

    module = masked(tie_directions=False)
    fitted = trainer(max_steps=1)
    fitted.fit(module, Motifs("masked", weights=True))
    path = tmp_path / "x.ckpt"
    fitted.save_checkpoint(path)
    words = hidden()["tokens"]
    want = module.eval().net(words).logits
    again = load_checkpoint(path).eval()
    assert type(again) is MaskedLM
    assert dict(again.hparams) == dict(module.hparams)
    torch.testing.assert_close(again.net(words).logits, want)
    export_checkpoint(path, tmp_path / "out")
    net = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(net(words).logits, want)
    assert type(load_network(tmp_path / "out")) is type(net) is type(module.net)
