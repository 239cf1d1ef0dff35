"""Pretrained weights for data with more symbols, or others; and the tokenizer for that."""

import json
from pathlib import Path

import pytest
import torch

import statezoo
from statezoo.datamodules.extending import extend_tokenizer
from statezoo.datamodules.tokenizers import Bytes, Characters, load_tokenizer, train_bpe
from statezoo.lightning_modules import CausalLM, MaskedLM, export, load_network
from statezoo.lightning_modules.vocabulary import check_extends
from statezoo.main import main
from statezoo.zoo import StateZooConfig, StateZooForCausalLM, StateZooForMaskedLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE = {"d_model": 16, "n_layers": 1}
IDS = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(0))


def base(folder, kind=StateZooForCausalLM, **settings):
    torch.manual_seed(0)
    net = kind(StateZooConfig(vocab_size=12, mixers=["gla"], eos_token_id=3, **SHAPE, **settings))
    return net, str(export(net, folder))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("task", "kind"), [(CausalLM, StateZooForCausalLM), (MaskedLM, StateZooForMaskedLM)]
)
def test_extend_keeps_the_old_rows_and_begins_the_new_at_their_mean(task, kind, tie, tmp_path):
    net, source = base(tmp_path, kind, tie_embeddings=tie, bidirectional=task is MaskedLM)
    more = task(["gla"], vocab_size=15, **SHAPE, pretrained=source, vocabulary="extend").net
    tables = ("model.embeddings.weight", "lm_head.weight")
    new = more.state_dict()
    for name, x in net.state_dict().items():
        if name in tables:
            assert torch.equal(new[name][:12], x)
            for row in new[name][12:]:
                torch.testing.assert_close(row, x.sum(0) / 12)
        else:
            assert torch.equal(new[name], x), name
    assert (more.lm_head.weight is more.model.embeddings.weight) == tie
    assert more.config.vocab_size == 15
    assert more.config.eos_token_id == 3
    torch.testing.assert_close(more.eval()(IDS).logits[..., :12], net.eval()(IDS).logits)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", [5, 12, 20])
def test_new_keeps_the_layers_alone(size, tie, tmp_path):
    net, source = base(tmp_path, tie_embeddings=tie)
    made = CausalLM(["gla"], vocab_size=size, **SHAPE, pretrained=source, vocabulary="new").net
    old, new = net.state_dict(), made.state_dict()
    same = {
        name for name in new if new[name].shape == old[name].shape and new[name].equal(old[name])
    }
    assert same == new.keys() - {"model.embeddings.weight", "lm_head.weight"}
    assert abs(float(new["model.embeddings.weight"].std()) - 0.02) < 0.006  # initializer_range
    assert made.config.eos_token_id is None


def test_both_strands_take_the_complement_of_the_new_symbols(tmp_path):
    complement = [0, 1, 2, 6, 5, 4, 3, 7, 8, 9, 10, 11]
    _, source = base(tmp_path, StateZooForMaskedLM, bidirectional=True, complement=complement)
    more = {"vocab_size": 14, "pretrained": source, "vocabulary": "extend"}
    net = MaskedLM(["gla"], **SHAPE, **more, reverse_complement="equivariant",
                   complement=[*complement, 13, 12]).net  # fmt: skip
    assert net.config.complement == [*complement, 13, 12]
    with pytest.raises(ValueError, match="needs the complement of every symbol"):
        MaskedLM(["gla"], **SHAPE, **more)


def test_new_rows_can_be_trained_alone(tmp_path):
    _, source = base(tmp_path, tie_embeddings=True)
    rates = {"model.layers.*": 0, "model.norm*": 0}
    task = CausalLM(["gla"], vocab_size=15, **SHAPE, pretrained=source, vocabulary="extend",
                    optim={"rates": rates})  # fmt: skip
    assert [n for n, p in task.net.named_parameters() if p.requires_grad] == [
        "model.embeddings.weight"
    ]


MISTAKES = {
    "same": ({"vocab_size": 15}, r"vocab_size 12, the data 15: .* --model\.vocabulary extend or n"),
    "fewer": ({"vocab_size": 9, "vocabulary": "extend"}, "all 12 symbols of the weights and more"),
    "typo": ({"vocab_size": 12, "vocabulary": "more"}, "same, extend or new, got 'more'"),
    "lora": (
        {"vocab_size": 15, "vocabulary": "extend", "tune": "lora"},
        "which tune: lora would not learn to read: use tune: full",
    ),
    "fresh": (
        {"vocab_size": 15, "vocabulary": "new", "pretrained": None},
        "and these are fresh: give --model.pretrained",
    ),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(settings, message, tmp_path):
    _, source = base(tmp_path)
    with pytest.raises(ValueError, match=message):
        CausalLM(["gla"], **{**SHAPE, "pretrained": source, **settings})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(24)))
    Path("asked.txt").write_text("".join(f"<q>Line {i}<a>{i * i}.\n\n" for i in range(24)))
    return tmp_path


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_an_extended_tokenizer_reads_all_else_as_before(kind, folder):
    text = "Line 7 says é <b> 49.\n"
    made = {"bytes": Bytes, "characters": lambda: Characters.of([text.encode()]),
            "bpe": lambda: train_bpe(["text.txt"], 270, "bpe")}  # fmt: skip
    old = made[kind]()
    extend_tokenizer(old, ["<q>", "<a>"]).save("more")
    new = load_tokenizer("more")
    assert (new.vocab_size, new.bos_id) == (old.vocab_size + 2, old.bos_id)
    assert new.encode(text) == old.encode(text)
    ids = new.encode(f"<q>{text}<a>x")
    assert ids[0] == old.vocab_size
    assert ids[1 : 1 + len(old.encode(text))] == old.encode(text)
    assert new.decode(new.encode(f"<q>{text}<a>L")) == f"<q>{text}<a>L"
    old.save("old")
    read = [{"tokenizer.json": Path(f, "tokenizer.json").read_bytes()} for f in ("old", "more")]
    check_extends(*read)
    with pytest.raises(ValueError, match=r"'<q>', number \d+ of the weights, is missing in the da"):
        check_extends(*read[::-1])


def test_from_the_command_line(folder, capsys):
    fit = ["fit", "--model", "GLA", "--data", "Text", "--data.seq_len", "16", "--data.batch_size",
           "2", "--trainer.max_steps", "3", "--trainer.accelerator", "cpu",
           "--trainer.enable_progress_bar", "false"]  # fmt: skip
    main([*fit, "--model.d_model", "16", "--model.n_layers", "1", "--data.path", "text.txt",
          "--name", "base"])  # fmt: skip
    main(["tokenizer", "extend", "runs/base", "--tokens", "<q>, <a>", "--out", "more"])
    assert "wrote more: 258 symbols, 2 of them new" in capsys.readouterr().out
    extend = ["--data.path", "asked.txt", "--data.tokenizer", "more",
              "--model.pretrained", "runs/base", "--model.vocabulary", "extend"]  # fmt: skip
    main([*fit, *extend, "--name", "asked"])
    run = Path("runs/asked/version_0")
    main([*fit, *extend, "--name", "on", "--ckpt_path", "runs/asked", "--trainer.max_steps", "5"])
    capsys.readouterr()
    for source in (["--ckpt", "runs/asked"], ["--model", str(run / "export")]):
        main(["generate", *source, "--prompt", "<q>Line", "--max_new_tokens", "6", "--seed", "2"])
    out = capsys.readouterr().out
    assert out.startswith("<q>Line")
    first, second = out.split("<q>Line")[1:3]
    assert first.rstrip("\n") == second.rstrip("\n")
    net = statezoo.load(run / "export")
    assert net.config.vocab_size == 258 == net.lm_head.weight.shape[0]
    assert len(json.loads((run / "export/tokenizer.json").read_text())["added_tokens"]) >= 2
    assert load_network(run / "best.ckpt").config.vocab_size == 258

    # a tokenizer that numbers its symbols in another way is refused, and taken as new
    train_bpe(["text.txt"], 270, "bpe")
    other = [*fit, "--data.path", "text.txt", "--data.tokenizer", "bpe",
             "--model.pretrained", "runs/base", "--model.vocabulary"]  # fmt: skip
    with pytest.raises(SystemExit):
        main([*other, "extend", "--name", "no"])
    told = " ".join(capsys.readouterr().err.split())
    assert "vocabulary: extend needs a tokenizer that numbers the symbols" in told
    main([*other, "new", "--name", "other"])
    assert load_network("runs/other/version_0/best.ckpt").config.vocab_size == 270
    with pytest.raises(SystemExit):
        main(["tokenizer", "extend", "more", "--tokens", "<q>", "--out", "again"])
    assert "'<q>' is a symbol of the tokenizer already" in capsys.readouterr().err
