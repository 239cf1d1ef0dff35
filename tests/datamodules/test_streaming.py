"""Documents in parts: the same ids, units and text as of the whole, and no more memory."""

import gzip
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statezoo.datamodules.dna.tokenizers import KMers, Nucleotides, train_dna_bpe
from statezoo.datamodules.music.satb import SatbGrid
from statezoo.datamodules.records import Report, read_file, text_parts
from statezoo.datamodules.streaming import encode_parts
from statezoo.datamodules.tokenizers import Bytes, Characters, train_bpe

LETTERS = "ACGTNacgt \nR"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "a.txt").write_text("one two three two one " * 20, encoding="utf-8")
    (folder / "a.fa").write_text(">a\n" + "ACGTTGCAACGGT" * 40 + "\n", encoding="utf-8")
    return {
        "bytes": Bytes(),
        "characters": Characters("one tw\n"),
        "bpe": train_bpe([folder / "a.txt"], 270, folder / "bpe"),
        "nucleotides": Nucleotides(),
        "kmers": KMers(3),
        "pieces": train_dna_bpe([folder / "a.fa"], 20, folder / "pieces"),
        "music": SatbGrid(),
    }


def joined(encoded):
    """Ids and units of all pieces."""
    encoded = list(encoded)
    sizes = [np.ones(len(ids)) if units is None else units for ids, units in encoded]
    return np.concatenate([ids for ids, _ in encoded]), np.concatenate(sizes)


def cut(text, places):
    """The characters of a text in parts, also empty ones."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b].encode() for a, b in pairwise(bounds)]


def check(tokenizer, text, places):
    ids, sizes = joined(encode_parts(tokenizer, cut(text, places)))
    want, want_sizes = joined([tokenizer.encode_document(text.encode())])
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_array_equal(sizes, want_sizes)


PLACES = st.lists(st.integers(0, 1000), max_size=8)


@pytest.mark.parametrize("name", ["nucleotides", "kmers", "pieces"])
@settings(deadline=None, max_examples=40)
@given(text=st.text(LETTERS, max_size=60), places=PLACES)
def test_dna_is_cut_as_the_whole_is(tokenizers, name, text, places):
    check(tokenizers[name], text, places)


@pytest.mark.parametrize("name", ["bytes", "characters", "bpe"])
@settings(deadline=None, max_examples=30)
@given(text=st.text("one tw\n\u4f60\U0001f3b5", max_size=60), places=PLACES)
def test_text_is_cut_as_the_whole_is(tokenizers, name, text, places):
    check(tokenizers[name], text, places)


def test_music_is_cut_between_names(tokenizers):
    tokenizer = tokenizers["music"]
    rng = np.random.default_rng(0)
    text = tokenizer.decode(rng.integers(1, tokenizer.vocab_size, 40)).replace(" ", " \n", 5)
    for places in ([3], [10, 11, 12], range(0, len(text), 7)):
        check(tokenizer, text, places)
    with pytest.raises(ValueError, match="'C#9' is not a token of"):
        list(encode_parts(tokenizer, [b"C", b"#9 "]))


def test_long_text_has_the_blocks_of_byte_pair_encoding(tokenizers):
    """More than a million characters are cut where the whole text is."""
    rng = np.random.default_rng(0)
    words = np.array(["one", "two", "three\n", "four"])
    text = " ".join(rng.choice(words, 260_000))
    assert len(text) > 1 << 20
    check(tokenizers["bpe"], text, range(0, len(text), 99_991))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_decoded_across_parts(tmp_path, code, packed):
    text = "na\u00efve \u4f60\u597d \U0001f3b5\r\n" * 9
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    data = text.encode(code)
    path.write_bytes(gzip.compress(data) if packed else data)
    for size in (2, 3, 7, 1000):
        report = Report()
        parts = list(text_parts(path, report, size))
        assert b"".join(parts) == text.encode("utf-8")
        assert not report
        for part in parts:
            part.decode("utf-8")  # characters are whole
    assert list(read_file(path, "text", Report())) == [text.encode("utf-8")]


def test_what_is_no_text_gives_nothing_and_says_where(tmp_path):
    path = tmp_path / "a.txt"
    cases = {
        b"abcd\xe9f": "byte 0xe9 at offset 4 is not UTF-8",
        b"\xef\xbb\xbfab\xff": "byte 0xff at offset 5 is not UTF-8",
        "ab\u4f60".encode()[:-1]: "byte 0xe4 at offset 2 is not UTF-8",
        b"\xff\xfea\x00\x00\xdc": "at offset 4 is not UTF-16",
        b" \n ": "empty; add text",
        b"": "empty; add text",
    }
    for data, reason in cases.items():
        path.write_bytes(data)
        for size in (2, 4, 100):
            report = Report()
            assert list(text_parts(path, report, size)) == []
            assert len(report) == 1
            assert reason in report[0]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"cut short" * 99)[:-9])
    report = Report()
    assert list(read_file(path, "text", report)) == []
    assert "cannot be read to its end" in report[0]


def test_memory_does_not_grow_with_the_document(tmp_path, tokenizers):
    """Peak of Python's allocations for 1 MB and for 4 MB of text, within 64 kB."""
    peaks = []
    for n in (1 << 20, 1 << 22):
        path = tmp_path / "a.txt"
        path.write_bytes(b"one two thre" * (n // 12))
        tracemalloc.start()
        count = sum(len(ids) for ids, _ in encode_parts(Bytes(), text_parts(path, Report())))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == n // 12 * 12
    assert abs(peaks[1] - peaks[0]) < 1 << 16, peaks
    assert peaks[1] < 1 << 20
