import gzip
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from statezoo.datamodules.tokenizers import (
    BPE,
    Bytes,
    Characters,
    load_tokenizer,
    text_blocks,
    tokenizer_from_state,
    train_bpe,
)

TEXT = "naïve café, 東京 🎵\n\tdef f(x):  return x\r\n" * 3


def word_level():
    """Loses what it does not know: lower case, no white space, unknown words."""
    backend = Backend(models.WordLevel({"<unk>": 0, "def": 1, "return": 2, "<s>": 5}, "<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return BPE(backend)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text(TEXT * 5, encoding="utf-8")
    return train_bpe([folder / "a.txt"], 300, folder / "out")


@pytest.fixture(scope="module", params=["bytes", "characters", "bpe", "words"])
def tokenizer(request, bpe):
    made = {"bytes": Bytes(), "characters": Characters.of([TEXT.encode()]), "bpe": bpe}
    return made.get(request.param) or word_level()


def test_bytes_of_tokens_add_up(tokenizer):
    ids, lengths = tokenizer.encode_document(TEXT.encode())
    total = len(ids) if lengths is None else int(lengths.sum())
    assert total == len(TEXT.encode())
    assert lengths is None or len(lengths) == len(ids)
    assert ids.dtype == tokenizer.dtype
    assert ids.max() < tokenizer.vocab_size


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_bytes_of_tokens_add_up_on_any_text(bpe, text):
    for tokenizer in (Bytes(), Characters("abc é"), bpe):
        ids, lengths = tokenizer.encode_document(text.encode())
        assert (len(ids) if lengths is None else lengths.sum()) == len(text.encode())
        if not isinstance(tokenizer, Characters):
            assert tokenizer.decode(ids) == text


def test_lossless_ones_return_the_text(tokenizer):
    back = tokenizer.decode(tokenizer.encode(TEXT))
    assert back == TEXT or tokenizer.vocab_size == 6


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for again in (load_tokenizer(tmp_path), tokenizer_from_state(tokenizer.state_dict())):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
        assert again.encode(TEXT + "new ß") == tokenizer.encode(TEXT + "new ß")


def test_transformers_reads_the_saved_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT))


def test_decodes_whatever_a_model_says(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(40))]
        assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(tokenizer.decode([-1, 10**9]), str)
    assert tokenizer.decode(np.array([], dtype=np.int64)) == ""


def test_characters_by_hand():
    tokenizer = Characters.of([b"baba", "é".encode()])
    assert tokenizer.alphabet == "abé"
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("abzé") == [1, 2, 0, 3]
    assert tokenizer.decode([1, 0, 3]) == "a\N{REPLACEMENT CHARACTER}é"
    assert tokenizer.encode_document("aé😀".encode())[1].tolist() == [1, 2, 4]


def test_bytes_by_hand():
    assert Bytes().encode("aé") == [97, 195, 169]
    assert Bytes().decode([97, 195]) == "a\N{REPLACEMENT CHARACTER}"


def test_fingerprints_differ(bpe):
    made = [Bytes(), Characters("ab"), Characters("ba"), bpe, word_level()]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 5


@settings(max_examples=50, deadline=None)
@given(text=st.text("ab \n"), size=st.integers(2, 9))
def test_long_texts_are_cut_into_parts(text, size):
    parts = list(text_blocks(text, size))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= size


def test_parts_of_a_long_text_end_with_a_line_or_a_word():
    assert list(text_blocks("abcd\ne efgh ijklmnop", 8)) == ["abcd\n", "e efgh", " ijklmno", "p"]


def test_special_tokens_decide_what_begins_a_document(bpe):
    assert bpe.bos_id == 0
    assert word_level().bos_id == 5


def test_train_bpe_reads_folders_of_all_kinds(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt.gz").write_bytes(gzip.compress(b"hello hello hello"))
    (tmp_path / "in/b.jsonl").write_text(json.dumps({"text": "yellow yellow"}))
    made = train_bpe([tmp_path / "in"], 265, tmp_path / "out")
    assert made.vocab_size <= 265
    assert len(made.encode("hello")) < 5
    assert load_tokenizer(tmp_path / "out").fingerprint == made.fingerprint
    assert load_tokenizer(tmp_path / "out/tokenizer.json").encode("hello") == made.encode("hello")


def test_train_bpe_says_what_is_wrong(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe([tmp_path / "a.txt"], 100, tmp_path)
    with pytest.raises(ValueError, match="empty"):
        train_bpe([tmp_path / "a.txt"], 300, tmp_path)


def test_no_such_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a file of the tokenizers library"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"No tokenizer .* give bytes, characters"):
        load_tokenizer(str(tmp_path / "nowhere"))
