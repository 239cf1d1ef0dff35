import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from statezoo.datamodules import DNA
from statezoo.datamodules.dna import mixture
from statezoo.datamodules.dna.baselines import (
    LONGEST,
    ORDERS,
    Counts,
    baselines,
    keys_of,
    order_bits,
    other_strand,
)
from statezoo.datamodules.dna.sequence import reverse_complement, to_codes

REAL = Path(__file__).parents[3] / "../shared/data/dna"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


def letters(n, seed, alphabet="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(alphabet), size=n))


def plain(train, test, order):
    """The same in loops over strings."""
    grams, contexts = Counter(), Counter()
    for part in train:
        for strand in (part, reverse_complement(part)):
            for i in range(order, len(strand)):
                gram = strand[i - order : i + 1]
                if "N" not in gram:
                    grams[gram] += 1
                    contexts[gram[:-1]] += 1
    bits = []
    for part in test:
        for i, base in enumerate(part):
            if base == "N":
                continue
            context = part[i - order : i] if i >= order else "N"
            n, total = grams[context + base], contexts[context]
            bits.append(-math.log2((n + 1) / (total + 4)) if "N" not in context else 2.0)
    return sum(bits) / len(bits)


def codes(parts):
    return [to_codes(part.encode()) for part in parts]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5, 12])
@pytest.mark.parametrize("alphabet", ["ACGT", "AACGTN", "AAAC"])
def test_orders_equal_a_plain_loop(order, alphabet):
    train = [letters(400, 1, alphabet), letters(3, 2, alphabet), letters(90, 3, alphabet)]
    test = [letters(200, 4, alphabet), letters(5, 5, alphabet)]
    keys = np.concatenate([keys_of(part) for part in codes(test)])
    found = order_bits(Counts(codes(train)), keys, order)
    assert found == pytest.approx(plain(train, test, order), abs=1e-9)


def test_longest_context_is_seen():
    train = letters(60, 1)
    counts = Counts(codes([train]))
    keys = keys_of(to_codes(train.encode()))
    n = counts.of(keys, LONGEST)
    assert n.sum() == len(train) - LONGEST
    assert (n[:LONGEST] == 0).all()
    with pytest.raises(ValueError, match=r"^order_bits needs an order of 0 to 26, got 27\.$"):
        order_bits(counts, keys, 27)


def test_other_strand():
    text = letters(50, 1, "ACGTN")
    assert (other_strand(to_codes(text.encode())) == codes([reverse_complement(text)])[0]).all()


def test_mixture_finds_repeats_and_loses_nothing_on_noise():
    noise = baselines(codes([letters(40_000, 1)]), codes([letters(4_000, 2)]))
    assert list(noise) == [*(f"order_{k}" for k in ORDERS), "mixture"]
    assert noise["mixture"] == pytest.approx(2, abs=0.02)
    unit = letters(3_000, 3)
    copies = [unit if n % 2 else reverse_complement(unit) for n in range(12)]
    found = baselines(codes(["".join(copies)]), codes([unit]))
    assert found["mixture"] < 0.1
    assert found["mixture"] < min(found[f"order_{k}"] for k in ORDERS)


def test_mixture_is_a_distribution():
    """Probabilities of the four bases after the same contexts sum to one."""
    train = codes([letters(8_000, 5, "AACGT")])
    counts = Counts(train)
    keys = np.sort(keys_of(to_codes(letters(50, 6).encode())))
    total = 0.0
    for key in keys[:2]:
        four = [mixture.mixture_bits(train, counts, np.array([key // 5 * 5 + b])) for b in range(4)]
        total += sum(2**-bits for bits in four)
    assert total == pytest.approx(2, abs=1e-4)  # weights are fitted in float32


def test_needs_bases():
    with pytest.raises(ValueError, match=r"^baselines needs bases to train and to test on, got"):
        baselines(codes(["NNN"]), codes(["ACGT"]))


def test_of_the_data_module(tmp_path):
    (tmp_path / "g.fa").write_text(f">a\n{letters(3000, 1)}\n>b\n{letters(50, 2)}{'N' * 1200}A\n")
    data = DNA(str(tmp_path / "g.fa"), val_contigs=["b"])
    parts = ["".join(map(str, part.tolist())) for part in data.codes("val")]
    assert list(map(len, parts)) == [50, 1]
    assert data.baselines() == baselines(data.codes("train"), data.codes("val"))
    assert [len(part) for part in data.codes("train", 70)] == [70]


def test_of_the_synthetic_genome():
    data = DNA()
    found = data.baselines(limit=50_000)
    assert all(name.startswith("SYNTHETIC ") for name in found)
    assert found["SYNTHETIC entropy of the generator"] == data.genome.entropy
    assert 1.7 < data.genome.entropy < 1.9


@real
def test_numbers_of_lambda():
    data = DNA(str(REAL / "lambda_phage.fa.gz"))
    found = {name: round(bits, 3) for name, bits in data.baselines().items()}
    mixed = found.pop("mixture")
    assert found == {
        "order_1": 1.988, "order_3": 1.978, "order_6": 2.046, "order_8": 2.068, "order_12": 2.001,
    }  # fmt: skip
    assert mixed == pytest.approx(1.994, abs=0.005)


@pytest.mark.slow
@real
def test_numbers_of_e_coli():
    data = DNA(str(REAL / "ecoli_k12_mg1655.fa.gz"))
    found = {name: round(bits, 3) for name, bits in data.baselines().items()}
    assert found.pop("mixture") < 1.894  # the adaptive mixture, frozen where training ends
    assert found == {
        "order_1": 1.983, "order_3": 1.952, "order_6": 1.933, "order_8": 1.935, "order_12": 1.994,
    }  # fmt: skip
