import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from statezoo.datamodules.ngram import KneserNey, baselines, unigram_entropy, xz_bits

SHAKESPEARE = Path(__file__).parents[3] / "shared/data/text/tinyshakespeare.txt.gz"
TRAIN = b"the cat sat on the mat; the dog sat on the log. " * 3 + bytes(range(256))


@pytest.mark.parametrize("order", [0, 1, 3, 5, 7])
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(order):
    model = KneserNey(TRAIN, order)
    for context in (b"", b"the cat", b"zzzzzzzz", b"q the m"):
        p = [float(model.probabilities(bytes([b]), context)[0]) for b in range(256)]
        assert min(p) > 0
        assert sum(p) == pytest.approx(1, abs=1e-12)


def test_equals_kneser_ney_written_with_dictionaries():
    text = b"abracadabra abracadabra alakazam"
    order = 2
    padded = bytes(order) + text
    counts = [Counter() for _ in range(order + 1)]
    counts[order] = Counter(padded[i : i + order + 1] for i in range(len(text)))
    for k in range(order - 1, -1, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])

    def probability(context, byte, k):
        if k < 0:
            return 1 / 256
        after = {gram[-1]: n for gram, n in counts[k].items() if gram[:-1] == context}
        lower = probability(context[1:], byte, k - 1)
        if not after:
            return lower
        n1, n2 = (sum(n == wanted for n in counts[k].values()) for wanted in (1, 2))
        d = n1 / (n1 + 2 * n2)
        return (max(after.get(byte, 0) - d, 0) + d * len(after) * lower) / sum(after.values())

    test = b"abra zam"
    seen = bytes(order) + test
    want = [probability(seen[i : i + order], test[i], order) for i in range(len(test))]
    np.testing.assert_allclose(KneserNey(text, order).probabilities(test), want, rtol=1e-12)


def test_unigram_entropy_of_hand_worked_texts():
    assert unigram_entropy(b"aabb") == pytest.approx(1)
    assert unigram_entropy(b"aaaa") == 0
    assert unigram_entropy(b"aab") == pytest.approx(math.log2(3) - 2 / 3)


def test_xz_alone_and_primed():
    text = bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8))
    alone = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert xz_bits(text) == alone
    assert xz_bits(text, train=text) < 0.1 * alone


@pytest.mark.parametrize(("train", "test"), [(b"", b"a"), (b"a", b"")])
def test_nothing_to_count_or_score_is_an_error(train, test):
    with pytest.raises(ValueError, match="at least one byte"):
        baselines(train, test)


def test_order_out_of_range():
    with pytest.raises(ValueError, match="order of 0 to 7"):
        KneserNey(b"abc", 8)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the shared data folder is absent")
def test_known_numbers_of_tiny_shakespeare():
    text = gzip.decompress(SHAKESPEARE.read_bytes())
    found = baselines(text[:1_003_854], text[1_003_854:])
    want = {"kneser_ney_3": 2.495, "kneser_ney_5": 2.248, "xz": 2.947, "xz_primed": 2.518}
    for name, bits in want.items():
        assert found[name] == pytest.approx(bits, abs=5e-4)  # as printed, three decimals
