"""Batches that go on where the one before ended."""

import itertools

import numpy as np
import pytest
import torch

from statezoo.datamodules import DNA, Text
from statezoo.datamodules.batch import IGNORE
from statezoo.datamodules.packing import TokenFile, Windows
from statezoo.datamodules.streams import StreamLoader

SEGMENTS = np.array([[0, 30], [30, 44], [44, 97]])


@pytest.fixture
def windows(tmp_path):
    """Each token is its own number, and 0 begins a document."""
    np.save(tmp_path / "ids.npy", np.arange(1, 98, dtype=np.uint8))

    def make(packed=False):
        return Windows(
            TokenFile(tmp_path / "ids.npy"), SEGMENTS, seq_len=4, bos_id=0, packed=packed
        )

    return make


def rows(batch, count):
    return batch["targets"].view(count, -1).tolist()


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_goes_on_where_it_ended(windows, count, shuffle):
    loader = StreamLoader(windows(), count, shuffle=shuffle, seed=1)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-25 // count)
        seen = [t for b in batches for t in b["targets"].flatten().tolist() if t != IGNORE]
        assert sorted(seen) == list(range(1, 98))
        assert batches[0]["starts"].all()
        anew = sum(int(batch["starts"].sum()) for batch in batches)
        spare = len(batches) * count - 25  # rows of streams that are a window shorter
        assert anew in (count + spare, count + spare + 1)  # one where the text begins again
        for before, after in itertools.pairwise(batches):
            for i, (old, new) in enumerate(
                zip(rows(before, count), rows(after, count), strict=True)
            ):
                if not after["starts"][i]:
                    assert new[0] == old[-1] % 97 + 1
                    assert after["tokens"][i, 0] in (old[-1], 0)


def test_a_document_that_begins_a_row_begins_anew_only_where_states_are_reset(windows):
    for packed in (False, True):
        batches = list(StreamLoader(windows(packed), 1))
        starts = [int(b["targets"].flatten()[0]) for b in batches if b["starts"][0]]
        assert starts == ([1, 45] if packed else [1])  # 31 is inside a window


def test_streams_begin_elsewhere_each_epoch(windows):
    loader = StreamLoader(windows(), 3, shuffle=True)
    one, two = ([b["targets"].tolist() for b in loader] for _ in range(2))
    assert one[0] != two[0]
    again = StreamLoader(windows(), 3, shuffle=True, epoch=1)
    assert [b["targets"].tolist() for b in again] == two


def test_processes_share_the_streams(windows):
    whole = StreamLoader(windows(), 4, shuffle=True)
    parts = [StreamLoader(windows(), 2, shuffle=True, rank=r, world_size=2) for r in range(2)]
    for together, *apart in zip(whole, *parts, strict=True):
        for key in ("tokens", "targets", "starts"):
            assert torch.equal(together[key], torch.stack([b[key] for b in apart], 1).flatten(0, 1))


@pytest.mark.parametrize("stop", [1, 8, 9, 13])
def test_resumes_anywhere(windows, stop):
    loader = StreamLoader(windows(), 3, shuffle=True)
    want = [(b["targets"].tolist(), b["starts"].tolist()) for _ in range(2) for b in loader]
    first = StreamLoader(windows(), 3, shuffle=True)
    list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(first)), stop))
    second = StreamLoader(windows(), 3, shuffle=True)
    second.load_state_dict(first.state_dict())
    rest = [(b["targets"].tolist(), b["starts"].tolist()) for b in second]
    assert rest == want[stop : stop + len(rest)]


def test_too_few_windows(windows):
    with pytest.raises(ValueError, match="carry needs") as error:
        StreamLoader(windows(), 13)
    assert str(error.value) == (
        "carry needs at least 2 windows in each of 13 streams (batch_size times processes), the "
        "data has 25 windows: lower batch_size or seq_len, or add data."
    )


def test_validation_is_as_without(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"Line {i} says {i * i}.\n\n" for i in range(80)))
    carried, plain = (
        Text(str(tmp_path / "t.txt"), seq_len=16, batch_size=2, carry=x) for x in (True, False)
    )
    assert "starts" in next(iter(carried.train_dataloader()))
    for mine, other in zip(carried.val_dataloader(), plain.val_dataloader(), strict=True):
        assert mine.keys() == other.keys()
        assert torch.equal(mine["tokens"], other["tokens"])


def test_a_genome_says_what_fills_rows_up(tmp_path):
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 3000))
    (tmp_path / "g.fa").write_text(f">one\n{letters[:2000]}\n>two\n{letters[2000:]}\n")
    data = DNA(str(tmp_path / "g.fa"), seq_len=32, batch_size=2, carry=True)
    found = 0
    for batch in data.train_dataloader():
        real = batch["targets"] != IGNORE
        if not real.all():
            found += 1
            assert torch.equal(batch["attention_mask"][:, 1:] > 0, real[:, 1:])
    assert found


@pytest.mark.parametrize("own", [{"rc_augment": True}, {"objective": "masked"}])
def test_a_genome_is_carried_in_one_direction(own):
    with pytest.raises(ValueError, match="to carry a state along") as error:
        DNA(carry=True, **own)
    objective, turned = own.get("objective", "causal"), own.get("rc_augment", False)
    assert str(error.value) == (
        "DNA needs objective 'causal' and no rc_augment to carry a state along the sequence, got "
        f"{objective!r} and rc_augment={turned}: set carry to false, or these."
    )
