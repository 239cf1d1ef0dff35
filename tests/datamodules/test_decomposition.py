"""Documents in pieces: nothing lost, nothing mixed, the same number of tokens in every batch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statezoo.datamodules import DNA, Text
from statezoo.datamodules.decomposition import (
    Buckets,
    Decomposition,
    DocumentPieces,
    PieceLoader,
)
from statezoo.datamodules.loader import SeekableLoader
from statezoo.datamodules.packing import TokenFile

SIZES = [3, 8, 9, 0, 100, 7, 64, 63, 65, 33, 500, 12]


def segments(sizes):
    ends = np.cumsum(sizes)
    return np.stack([ends - sizes, ends], 1)


@pytest.fixture
def pieces(tmp_path):
    """Each token is its own number, and 0 begins a document."""
    np.save(tmp_path / "ids.npy", np.arange(1, sum(SIZES) + 1, dtype=np.int32))

    def make(seq_len=32, **own):
        return DocumentPieces(
            TokenFile(tmp_path / "ids.npy"), segments(SIZES), seq_len=seq_len, bos_id=0,
            settings=Decomposition(**{"shortest": 8, **own}), seed=3,
        )  # fmt: skip

    return make


def spans(buckets):
    """Where the pieces of each document are."""
    found = {}
    for n in range(len(buckets)):
        at, size = int(buckets.offset[n]), buckets.length(n)
        found.setdefault(int(buckets.document[n]), []).append((at, at + size))
    return {document: sorted(x) for document, x in found.items()}


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    shortest=st.sampled_from([1, 4, 16]),
    times=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 9),
)
def test_pieces_and_tail_are_the_document(sizes, shortest, times, seed):
    longest = shortest * times
    if max(sizes) < shortest:
        with pytest.raises(ValueError, match="no document to train on of at least"):
            Buckets(np.array(sizes), longest, Decomposition(shortest), seed)
        return
    buckets = Buckets(np.array(sizes), longest, Decomposition(shortest), seed)
    found, tails = spans(buckets), []
    for document, size in enumerate(sizes):
        parts, at = found.get(document, []), 0
        for start, stop in parts:  # one after the other, without gap
            assert start == at
            at = stop
        lengths = [b - a for a, b in parts]
        assert all(n & (n - 1) == 0 and shortest <= n <= longest for n in lengths)
        if size <= longest:  # greedy: the binary digits of the size, the largest first
            assert lengths == [
                1 << i for i in range(9, -1, -1) if size >> i & 1 and 1 << i >= shortest
            ]
        tails.append(size - at)
    assert all(0 <= n < shortest for n in tails)
    assert buckets.tail_tokens == sum(tails)
    assert buckets.tails == sum(n > 0 for n in tails)
    numbered = [buckets.length(n) for n in range(len(buckets))]
    assert numbered == sorted(numbered)


def test_long_documents_have_pieces_of_all_lengths():
    """By odds of their lengths: of 4 lengths, half of the tokens of 2^i for each of 2^(i+1)."""
    buckets = Buckets(np.array([3_000_000]), 64, Decomposition(8), 0)
    counts = np.diff(buckets.ends, prepend=0)
    assert buckets.lengths.tolist() == [8, 16, 32, 64]
    np.testing.assert_allclose(counts / counts.sum(), np.array([1, 2, 4, 8]) / 15, rtol=0.03)


def test_a_batch_is_of_one_length_and_all_have_as_many_tokens(pieces):
    windows = pieces()
    loader = PieceLoader(windows, 2, shuffle=True)
    batches = list(loader)
    assert len(batches) == len(loader) > 8
    assert {b["tokens"].numel() for b in batches} == {64}
    assert {b["tokens"].shape[1] for b in batches} == {8, 16, 32}
    assert {int(b["n_bytes"]) for b in batches} == {64}
    bounds = segments(SIZES)
    seen = []
    for batch in batches:
        for tokens, targets in zip(
            batch["tokens"].tolist(), batch["targets"].tolist(), strict=True
        ):
            assert targets == list(range(targets[0], targets[0] + len(targets)))
            document = np.searchsorted(bounds[:, 1], targets[0] - 1, side="right")
            start, stop = bounds[document]
            assert start < targets[0] <= targets[-1] <= stop
            assert tokens == [0 if targets[0] == start + 1 else targets[0] - 1, *targets[:-1]]
            seen += targets
    assert len(seen) == len(set(seen))
    told = windows.buckets.describe(2)
    unread = sum(SIZES) - windows.buckets.tail_tokens - len(seen)
    assert f"{windows.buckets.tail_tokens} tokens in 9 tails under 8 left out" in told
    assert f"leaves {unread} others" in told


def test_each_epoch_draws_anew_and_leaves_out_others(pieces):
    loader = PieceLoader(pieces(), 2, shuffle=True)
    epochs = [[b["targets"].tolist() for b in loader] for _ in range(8)]
    assert epochs[0] != epochs[1]
    assert [b["targets"].tolist() for b in PieceLoader(pieces(), 2, shuffle=True)] == epochs[0]
    read = {t for epoch in epochs for batch in epoch for row in batch for t in row}
    assert len(read) == sum(SIZES) - pieces().buckets.tail_tokens  # all of them, sooner or later
    other = PieceLoader(pieces(), 2, shuffle=True, seed=1)
    assert [b["targets"].tolist() for b in other] != epochs[0]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_read_equal_lengths_and_other_pieces(pieces, world):
    whole = PieceLoader(pieces(seq_len=16), world, shuffle=True)
    parts = [
        list(PieceLoader(pieces(seq_len=16), 1, shuffle=True, rank=r, world_size=world))
        for r in range(world)
    ]
    for together, *apart in zip(whole, *parts, strict=True):
        assert len({b["tokens"].shape for b in apart}) == 1
        rows = [row for b in apart for row in b["targets"].tolist()]
        assert sorted(rows) == sorted(together["targets"].tolist())


@pytest.mark.parametrize("stop", [1, 5, 13])
def test_resumes_anywhere(pieces, stop):
    first = PieceLoader(pieces(), 2, shuffle=True)
    want = [b["targets"].tolist() for _ in range(2) for b in first]
    first = PieceLoader(pieces(), 2, shuffle=True)
    list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(first)), stop))
    second = PieceLoader(pieces(), 2, shuffle=True)
    second.load_state_dict(first.state_dict())
    rest = [b["targets"].tolist() for b in second]
    assert rest == want[stop : stop + len(rest)]
    assert (stop + len(rest)) % len(second) == 0


def many(**own):
    """2,000 pieces of each of 8, 16 and 32 tokens."""
    sizes = np.repeat([8, 16, 32], 2000)

    class Numbers:
        buckets, size = Buckets(sizes, 32, Decomposition(8, **own), 0), 1

        def __len__(self):
            return len(self.buckets)

    loader = PieceLoader(Numbers(), 1, shuffle=True)
    return [Numbers.buckets.length(loader.index(n)[1][0]) for n in range(len(loader))]


def test_the_next_length_is_drawn_by_the_odds():
    lengths = many(odds=3.0, cycles=1)
    counts = {n: lengths.count(n) for n in (8, 16, 32)}
    assert counts == {8: 500, 16: 1000, 32: 2000}
    early = lengths[:600]  # until then none has run out: 9 of 13, 3 of 13, 1 of 13
    for length, odds in ((8, 9), (16, 3), (32, 1)):
        share = odds / 13
        error = (share * (1 - share) / 600) ** 0.5
        assert abs(early.count(length) / 600 - share) < 4 * error
    evenly = many(odds=1.0, cycles=1)[:900]
    assert all(abs(evenly.count(n) - 300) < 60 for n in (8, 16, 32))


def test_cycles_share_every_bucket():
    lengths = np.array(many(odds=100.0, cycles=4))
    bounds = np.flatnonzero((lengths[:-1] == 32) & (lengths[1:] == 8)) + 1
    starts = [b for b in bounds if (lengths[b : b + 20] == 8).mean() > 0.8]
    assert len(starts) == 3  # from long to short once between two cycles
    for part in np.split(lengths, starts):
        for length, share in ((8, 125), (16, 250), (32, 500)):
            assert abs((part == length).sum() - share) <= 3
    once = np.array(many(odds=1e9, cycles=1))
    assert (np.diff(once) >= 0).all()


# ---------------------------------------------------------------- data modules


@pytest.fixture
def text(tmp_path):
    lines = (f"Line {i} says {i * i} and {i % 7}. " * (1 + i % 9) + "\n\n" for i in range(60))
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{x.strip()}"}}\n' for x in lines))

    def make(**own):
        return Text(str(tmp_path / "t.jsonl"), **{"seq_len": 64, "batch_size": 2, **own})

    return make


def test_text_is_trained_on_in_pieces_and_validated_as_documents(text, caplog):
    data, plain = text(packing="decomposed"), text(packing="documents")
    with caplog.at_level("INFO"):
        loader = data.train_dataloader()
    assert {b["tokens"].numel() for b in loader} == {128}
    assert loader.describe() in caplog.text
    for split in ("val", "train"):
        same = [
            {k: v.tolist() for k, v in batch.items()}
            for batch in (data.val_dataloader() if split == "val" else [])
        ]
        want = [{k: v.tolist() for k, v in b.items()} for b in plain.val_dataloader()]
        assert split == "train" or same == want
    assert type(data.val_dataloader()) is SeekableLoader


def test_bases_of_contigs(tmp_path):
    draw = np.random.default_rng(0)
    contigs = ["".join(draw.choice(list("ACGT"), n)) for n in (700, 90, 1300)]
    body = "".join(f">{i}\n{x}\n" for i, x in enumerate(contigs))
    (tmp_path / "g.fa").write_text(body)
    data = DNA(str(tmp_path / "g.fa"), packing="decomposed", seq_len=64, batch_size=2)
    codes = data.tokenizer
    known = [
        "".join(map(str, codes.encode_array(np.frombuffer(x.encode(), np.uint8))[0]))
        for x in contigs
    ]
    total = 0
    for batch in data.train_dataloader():
        assert batch["tokens"].numel() == 128
        assert "attention_mask" not in batch
        for row in batch["targets"].tolist():
            assert any("".join(map(str, row)) in contig for contig in known)
            total += len(row)
    assert total > 0.7 * 0.9 * 2090
    turned = DNA(
        str(tmp_path / "g.fa"), packing="decomposed", seq_len=64, batch_size=2, rc_augment=True
    )
    assert {b["tokens"].numel() for b in turned.train_dataloader()} == {128}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"seq_len": 48}, "packing 'decomposed' needs a seq_len that is a power of two and at "
         "least decomposition.shortest=32, got seq_len=48: set it to 32."),
        ({"seq_len": 16}, "packing 'decomposed' needs a seq_len that is a power of two and at "
         "least decomposition.shortest=32, got seq_len=16: set it to 32."),
        ({"carry": True}, "packing 'decomposed' has pieces that do not go on from batch to batch: "
         "set carry to false, or choose another packing."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Text, DNA])
def test_settings_that_do_not_fit(kind, own, said):
    with pytest.raises(ValueError, match="decomposed") as error:
        kind(packing="decomposed", **{"seq_len": 64, **own})
    assert str(error.value) == said


@pytest.mark.parametrize("kind", [Text, DNA])
def test_settings_as_a_configuration_file_holds_them(kind):
    data = kind(packing="decomposed", seq_len=64, decomposition={"shortest": 16, "odds": 1.0})
    assert data.decomposition == Decomposition(16, 1.0, 8)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"shortest": 24}, "decomposition.shortest must be a power of two, such as 32, got 24."),
        ({"odds": 0.0}, "decomposition.odds must be a number above 0, got 0.0."),
        ({"cycles": 0}, "decomposition.cycles must be at least 1, got 0."),
    ],
)
def test_settings_out_of_range(own, said):
    with pytest.raises(ValueError, match="decomposition") as error:
        Decomposition(**own)
    assert str(error.value) == said


def test_too_few_pieces_for_a_batch(text):
    with pytest.raises(ValueError, match="has no batch of 8192 tokens from pieces of one length"):
        text(packing="decomposed", batch_size=128).train_dataloader()
    with pytest.raises(ValueError, match="lower decomposition"):
        text(
            packing="decomposed", seq_len=1024, decomposition=Decomposition(1024)
        ).train_dataloader()


def test_windows_of_one_length_are_refused(text):
    data = text(packing="decomposed")
    data.setup()
    with pytest.raises(ValueError, match="leave LengthWarmup out"):
        data.at_length(32)


def test_another_order_is_refused(pieces):
    state = PieceLoader(pieces(), 2, shuffle=True).state_dict()
    with pytest.raises(ValueError, match="resume with the same data") as error:
        PieceLoader(pieces(odds=1.0), 2, shuffle=True).load_state_dict(state)
    assert "made with {'shortest': 8, 'odds': 2.0, 'cycles': 8" in str(error.value)
    with pytest.raises(ValueError, match="this run has windows in random order"):
        SeekableLoader(pieces(), 2).load_state_dict(state)
