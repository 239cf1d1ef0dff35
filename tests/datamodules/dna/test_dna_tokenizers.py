import json
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.datamodules.dna.tokenizers import (
    KMers,
    Nucleotides,
    Pieces,
    dna_tokenizer,
    train_dna_bpe,
)
from statezoo.datamodules.tokenizers import Bytes, load_tokenizer, tokenizer_from_state

sequences = st.text("ACGTacgtNnRyX", max_size=80)
MIXED = "ACGTnnacgtRRACGATCGATTTAGCAGCTAGCTANACGACTAGCATGC\nAC GT"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    rng = np.random.default_rng(0)
    words = ["GATTACA", "TTAGGG", "CCCGGG", "ACGT"]
    letters = "".join(words[i] for i in rng.integers(len(words), size=2000))
    (folder / "g.fa").write_text(f">c\n{letters}NNNN{letters.lower()}\n")
    return train_dna_bpe([folder / "g.fa"], 40, folder / "tok")


@pytest.fixture(params=["characters", "kmer6", "kmer:2", "pieces"])
def tokenizer(request):
    if request.param == "pieces":
        return request.getfixturevalue("pieces")
    return dna_tokenizer(request.param)


def greedy(text, k):
    """Nucleotide Transformer's rule, as a loop: the longest word that begins here."""
    words = {"".join(w): 8 + i for i, w in enumerate(product("ACGT", repeat=k))}
    single = {"A": 3, "C": 4, "G": 5, "T": 6}
    ids, at, text = [], 0, text.upper()
    while at < len(text):
        word = text[at : at + k]
        ids.append(words.get(word, single.get(text[at], 7)))
        at += k if word in words else 1
    return ids


@given(sequences)
def test_characters_have_fixed_ids(text):
    ids = {"A": 3, "C": 4, "G": 5, "T": 6}
    tokenizer = Nucleotides()
    assert tokenizer.encode(text) == [ids.get(letter, 7) for letter in text.upper()]
    array = np.frombuffer(text.encode(), dtype=np.uint8)
    assert tokenizer.table[array].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("k", [2, 3, 6])
@given(text=sequences)
def test_kmers_are_those_of_a_plain_loop(k, text):
    tokenizer = KMers(k)
    ids, lengths = tokenizer.encode_document(text.encode())
    assert ids.tolist() == greedy(text, k)
    assert lengths.tolist() == [k if i >= 8 else 1 for i in ids]


@given(sequences)
def test_letters_come_back(text):
    clean = "".join(c if c in "ACGT" else "N" for c in text.upper())
    for tokenizer in (Nucleotides(), KMers(2), KMers(6)):
        assert tokenizer.decode(tokenizer.encode(text)) == clean
        ids, lengths = tokenizer.encode_document(text.encode())
        assert len(text) == (len(ids) if lengths is None else lengths.sum())


def test_ids_and_counts(tokenizer):
    assert tokenizer.encode("") == []
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.mask_id, tokenizer.n_id) == (0, 1, 2, 7)
    assert tokenizer.encode("NRx") == [7, 7, 7]
    assert tokenizer.encode(MIXED) == tokenizer.encode(MIXED.upper())
    assert tokenizer.decode([0, 1, 2, 3, 7, 10**6, -1]) == "AN"
    assert not {0, 1, 2, 7} & set(tokenizer.scored)
    assert set(tokenizer.replacements) <= set(tokenizer.scored)
    assert {"N"}.isdisjoint("".join(map(tokenizer.decode, ([i] for i in tokenizer.scored))))
    ids, lengths = tokenizer.encode_document(MIXED.encode())
    spelled = [len(tokenizer.decode([i])) for i in ids.tolist()]
    assert spelled == ([1] * len(ids) if lengths is None else lengths.tolist())


def test_sizes():
    assert Nucleotides().vocab_size == 8
    assert KMers(6).vocab_size == 4104
    assert Nucleotides().replacements == Nucleotides().scored == (3, 4, 5, 6)
    assert KMers(2).scored == (3, 4, 5, 6, *range(8, 24))
    assert KMers(2).replacements == tuple(range(8, 24))


@pytest.mark.parametrize("name", ["characters", "kmer2", "kmer:3", "kmer6"])
def test_complement_is_the_other_strand(name):
    tokenizer = dna_tokenizer(name)
    other = tokenizer.complement
    assert sorted(other) == list(range(tokenizer.vocab_size))
    assert [other[i] for i in other] == list(range(tokenizer.vocab_size))
    assert other[:3] == [0, 1, 2]
    assert other[7] == 7
    k = tokenizer.bases_per_token
    text = "".join(np.random.default_rng(k).choice(list("ACGT"), size=50 * k))
    turned = [other[i] for i in tokenizer.encode(text)][::-1]
    assert turned == tokenizer.encode(reverse_complement(text))


def test_pieces_are_learnt(pieces):
    assert pieces.vocab_size == 40
    assert pieces.complement is None
    assert len(pieces.encode("GATTACA" * 20)) < 60
    assert pieces.decode(pieces.encode("gattacaNNttaggg")) == "GATTACANNTTAGGG"
    assert pieces.bases_per_token > 1


def test_saved_folders_are_read_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(MIXED)
    assert theirs(MIXED)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.mask_token_id) == (0, 1, 2)
    assert theirs.decode([1, *ids], skip_special_tokens=True) == tokenizer.decode(ids)
    for again in (dna_tokenizer(tmp_path), load_tokenizer(tmp_path)):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(MIXED) == ids
    assert tokenizer_from_state(tokenizer.state_dict()).fingerprint == tokenizer.fingerprint


def test_a_checkpoint_gives_its_tokenizer(tmp_path, tokenizer):
    file = tmp_path / "last.ckpt"
    torch.save({"DNA": {"tokenizer": tokenizer.state_dict()}}, file)
    assert dna_tokenizer(file).fingerprint == tokenizer.fingerprint
    torch.save({"DNA": {}}, file)
    with pytest.raises(ValueError, match="holds no tokenizer: it was not made with Text, DNA"):
        dna_tokenizer(file)


def test_mistakes(tmp_path):
    with pytest.raises(
        ValueError, match=r"^No tokenizer 'codons' for DNA: give characters, kmer6, "
    ):
        dna_tokenizer("codons")
    with pytest.raises(ValueError, match=r"^KMers needs k from 2 to 8, got 12\.$"):
        dna_tokenizer("kmer12")
    Bytes().save(tmp_path)
    with pytest.raises(ValueError, match=r"is a tokenizer for text \(bytes\): give characters, "):
        dna_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"^Pieces needs a tokenizer whose first ids are \[PAD\] "):
        Pieces(Bytes().backend())
    with pytest.raises(
        ValueError, match=r"^train_dna_bpe needs vocab_size of at least 9, got 8\.$"
    ):
        train_dna_bpe([], 8, tmp_path)


def test_the_saved_configuration_is_plain_json(tmp_path):
    KMers(3).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["statezoo_kind"] == "kmers"
    assert config["statezoo_k"] == 3
    assert config["mask_token"] == "[MASK]"
