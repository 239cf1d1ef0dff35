import json
import math
import os
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F

from statezoo.datamodules import Text
from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.readers import Embedded
from statezoo.datamodules.tokenizers import load_tokenizer, train_bpe

SENTENCE = "The quick brown fox jumps over the lazy dog, naïvely. "


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def ready(*args, **kwargs):
    data = Text(*args, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def said(loader):
    """All scored targets of a loader, in order, and the bytes they stand for."""
    batches = list(loader)
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    return targets[targets != IGNORE].tolist(), sum(int(batch["n_bytes"]) for batch in batches)


def test_embedded_text_has_both_splits_and_shares_no_paragraph():
    data = ready()
    assert (data.vocab_size, data.unit) == (256, "byte")

    def paragraphs(split):
        found = {" ".join(p.split()) for p in data.raw(split).decode().split("\n\n")}
        return found - {""}

    assert len(paragraphs("train")) > len(paragraphs("val")) > 0
    assert not paragraphs("train") & paragraphs("val")
    share = len(data.raw("val")) / len(data.raw("train") + data.raw("val"))
    assert 0.05 < share < 0.15


def test_docstrings_stand_in_for_the_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    topics = Embedded().topics()
    assert len(topics) > 20
    assert "textwrap" in topics


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize(("seq_len", "val_context"), [(7, 0), (64, 32), (5000, 100)])
def test_validation_scores_each_byte_once(tmp_path, packing, seq_len, val_context):
    files = {f"{n}.txt": f"{n} {SENTENCE * (n % 3 + 1)}" for n in range(30)}
    data = ready(
        write(tmp_path / "in", files),
        seq_len=seq_len, packing=packing, val_context=val_context, batch_size=3,
    )  # fmt: skip
    targets, n_bytes = said(data.val_dataloader())
    assert bytes(targets) == data.raw("val")
    assert n_bytes == len(data.raw("val"))
    targets, n_bytes = said(data.train_dataloader())
    assert sorted(targets) == sorted(data.raw("train"))
    assert n_bytes == len(data.raw("train"))


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_bits_per_byte_equal_a_plain_loop(tmp_path, kind):
    held_out = [SENTENCE * n + "naïve" for n in range(5)]
    files = {f"val/{n}.txt": text for n, text in enumerate(held_out)}
    path = write(tmp_path / "in", {**files, "a.txt": SENTENCE * 9})
    if kind == "bpe":
        train_bpe([path], 280, tmp_path / "bpe")
    data = ready(path, str(tmp_path / "bpe") if kind == "bpe" else kind, seq_len=16, batch_size=3)
    rng = torch.Generator().manual_seed(0)
    log_p = torch.randn(data.vocab_size, data.vocab_size, generator=rng).double().log_softmax(-1)
    nats, n_bytes = 0.0, 0
    for batch in data.val_dataloader():
        scores = log_p[batch["tokens"]].transpose(1, 2)
        nats += F.nll_loss(scores, batch["targets"], ignore_index=IGNORE, reduction="sum").item()
        n_bytes += int(batch["n_bytes"])

    plain = 0.0
    for document in held_out:
        before = data.tokenizer.bos_id
        for token in data.tokenizer.encode(document):
            plain -= log_p[before, token].item()
            before = token
    size = len("".join(held_out).encode())
    assert n_bytes == size
    assert nats / n_bytes / math.log(2) == pytest.approx(plain / size / math.log(2), abs=1e-6)


def test_named_parts_are_taken_as_splits(tmp_path):
    files = {
        "train.txt": "t",
        "sub/valid/a.txt": "v",
        "dev-00000-of-00001.txt": "w",
        "test.txt": "x",
    }
    data = ready(write(tmp_path / "in", {**files, "contest.txt": "y", "test_notes.txt": "z"}))
    assert data.raw("val") == b"wv"
    assert data.raw("test") == b"x"
    assert sorted(data.raw("train")) == sorted(b"tyz")
    assert said(data.test_dataloader())[0] == [ord("x")]


def test_first_words_of_names_count_where_some_say_train(tmp_path):
    files = {"train_a.txt": "a", "train_b.txt": "b", "valid_c.txt": "c", "test-d.txt": "d"}
    data = ready(write(tmp_path / "in", files))
    assert [data.raw(split) for split in ("train", "val", "test")] == [b"ab", b"c", b"d"]


def test_one_document_is_split_by_position(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(1000))
    data = ready(write(tmp_path, {"a.txt": text}) + "/a.txt", val_fraction=0.1, test_fraction=0.2)
    parts = [data.raw(split).decode() for split in ("train", "val", "test")]
    assert "".join(parts) == text
    assert [len(part) for part in parts] == [700, 100, 200]


def test_position_never_cuts_a_character(tmp_path):
    for n in range(1, 9):
        data = ready(write(tmp_path, {"a.txt": "é🎵" * n + "a"}), val_fraction=0.3)
        assert data.raw("train").decode() + data.raw("val").decode() == "é🎵" * n + "a"


def test_documents_are_held_out_whole_and_copies_stay_together(tmp_path):
    texts = {f"{n}.txt": f"<{n % 20}: {SENTENCE}>" for n in range(40)}  # each twice
    found = [ready(write(tmp_path, texts), seed=seed).raw("val").decode() for seed in range(4)]
    for val in found:
        documents = val.split(">")[:-1]
        assert 2 <= len(documents) <= 5
        assert all(documents.count(document) == 2 for document in documents)
    assert len(set(found)) > 1
    assert ready(str(tmp_path), seed=0).raw("val").decode() == found[0]


class Tiny(LightningModule):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.scored = {"train": 0, "val": 0, "test": 0}

    def step(self, batch, split):
        self.scored[split] += int(batch["n_bytes"])
        logits = self.table(batch["tokens"]).transpose(1, 2)
        return F.cross_entropy(logits, batch["targets"], ignore_index=IGNORE)

    def training_step(self, batch, index):
        return self.step(batch, "train")

    def validation_step(self, batch, index):
        self.step(batch, "val")

    def test_step(self, batch, index):
        self.step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("files", [{"a.txt": "One sentence."}, {"a.txt": "ab", "b.txt": "cde"}])
@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.filterwarnings("ignore:`isinstance.*LeafSpec", "ignore:.*smaller than the logging")
def test_trains_on_almost_nothing_with_trainer_defaults(tmp_path, files, packing, caplog):
    data = Text(write(tmp_path / "in", files), packing=packing)
    module = Tiny(data.vocab_size)
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, logger=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert module.scored["train"] == 2 * len(data.raw("train"))
    assert module.scored["val"] >= 2 * len(data.raw("val")) > 0
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert load_tokenizer(tmp_path / "last.ckpt").fingerprint == data.tokenizer.fingerprint
    trainer.test(module, data, verbose=False)
    assert module.scored["test"] == len(data.raw("val"))
    assert "instead of seq_len=256; add text" in caplog.text


def test_checkpoint_keeps_the_tokenizer(tmp_path):
    one = Text(write(tmp_path / "one", {"a.txt": "abc"}), "characters")
    two = Text(write(tmp_path / "two", {"a.txt": "xyz"}), "characters")
    state = json.loads(json.dumps(one.state_dict()))
    one.load_state_dict(state)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        two.load_state_dict(state)


def test_cache_follows_content_and_settings(tmp_path, cache):
    path = write(tmp_path / "in", {"a.txt": "aaaa", "b.txt": "bbbb"})
    assert b"c" not in ready(path).raw("train") + ready(path).raw("val")
    assert len(list((cache / "text").iterdir())) == 1
    before = (tmp_path / "in/b.txt").stat()
    write(tmp_path / "in", {"b.txt": "cccc"})
    os.utime(tmp_path / "in/b.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert b"c" in ready(path).raw("train") + ready(path).raw("val")
    assert ready(path, "characters").vocab_size == 3
    data = ready(path, max_bytes=6)
    assert sorted(data.raw("train") + data.raw("val")) == sorted(b"aaaacc")


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set STATEZOO_CACHE"):
        Text().prepare_data()


def test_baselines_are_of_the_same_split(tmp_path):
    data = ready(write(tmp_path, {"a.txt": SENTENCE * 40}))
    found = data.baselines()
    assert set(found) >= {"unigram_entropy", "kneser_ney_3", "kneser_ney_5", "xz"}
    assert found["kneser_ney_5"] < found["kneser_ney_3"] < found["unigram_entropy"] < 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 0}, "seq_len of at least 1, got 0"),
        ({"packing": "boxes"}, "'stream' or 'decomposed', got 'boxes'"),
        ({"val_fraction": 0.0}, "val_fraction above 0"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "some text left to train on"),
        ({"val_context": 256}, "val_context < seq_len=256"),
        ({"tokenizer": "./nowhere/tokenizer.json"}, "No tokenizer"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Text(**settings)
