"""Measures by hand: what each must be on pieces small enough to count."""

import numpy as np
import pytest

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.music import measures

SIXTEENTH = TPQ // 4


def piece(*notes, drums=(), meter=None, length=0):
    """Notes as (onset, duration, pitch) in sixteenths."""
    rows = [[on * SIXTEENTH, size * SIXTEENTH, pitch, 80, 0] for on, size, pitch in notes]
    rows += [[on * SIXTEENTH, size * SIXTEENTH, pitch, 80, 1] for on, size, pitch in drums]
    tracks = (TrackInfo("a"), TrackInfo("d", is_drum=True))
    signatures = ((0, *meter),) if meter else ()
    return Piece(tracks, np.array(rows), time_signatures=signatures, length=length * SIXTEENTH)


def sheet(*notes, **more):
    return measures.sheet(piece(*notes, **more))


BAR = [(0, 4, 60), (4, 4, 64), (8, 4, 67), (12, 4, 64)]


def bars(*contents):
    return [(16 * i + on, size, pitch) for i, bar in enumerate(contents) for on, size, pitch in bar]


def test_bars_end_with_the_music():
    full = sheet(*BAR)
    assert full.bars.tolist() == [0, 16]
    assert sheet(*BAR, length=64).bars.tolist() == [0, 16]
    assert sheet(*BAR, (16, 1, 60)).bars.tolist() == [0, 16, 32]
    assert sheet((0, 4, 60), (12, 4, 60), meter=(3, 4)).bars.tolist() == [0, 12, 24]


def test_notes_off_the_grid_go_to_the_nearest_sixteenth():
    rows = np.array(
        [[SIXTEENTH - 10, 5, 60, 80, 0], [SIXTEENTH * 2 + 55, 2 * SIXTEENTH, 62, 80, 0]]
    )
    found = measures.sheet(Piece((TrackInfo("a"),), rows))
    assert found.onset.tolist() == [1, 2]
    assert found.duration.tolist() == [1, 2]


def test_histograms_by_hand():
    x = sheet((0, 4, 60), (4, 40, 72), (4, 2, 64), (8, 1, 59), drums=[(0, 1, 36)])
    assert measures.pitch_classes(x).tolist() == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    sizes = measures.durations(x)
    assert {i + 1: n for i, n in enumerate(sizes) if n} == {1: 2, 2: 1, 4: 1, 32: 1}
    steps = measures.intervals(x)
    assert {i + 1: n for i, n in enumerate(steps) if n} == {4: 2}


def test_overlap_is_the_common_area():
    one, other = np.array([2.0, 2.0, 0.0]), np.array([0.0, 1.0, 3.0])
    assert measures.overlap(one, one * 7) == pytest.approx(1)
    assert measures.overlap(one, other) == pytest.approx(0.25)
    assert np.isnan(measures.overlap(one, one * 0))


def test_entropy_polyphony_and_scale_by_hand():
    x = sheet((0, 4, 60), (0, 2, 64), (8, 2, 61), (12, 2, 62))
    assert measures.entropy(x) == pytest.approx(2.0)  # four classes, equally often
    # sounding: 2 pitches for 2 steps, 1 for 2, silence for 4, 1 for 2, silence, 1 for 2
    assert measures.polyphony(x) == pytest.approx(10 / 8)
    assert measures.scale_consistency(x) == pytest.approx(0.75)  # C D E fit, C sharp does not
    scale = sheet(*((i, 1, 62 + p) for i, p in enumerate((0, 2, 4, 5, 7, 9, 11))))
    assert measures.scale_consistency(scale) == 1


def test_the_same_key_twice_sounds_once():
    assert measures.polyphony(sheet((0, 4, 60), (0, 4, 60))) == 1


def test_repetition_counts_bars_with_notes():
    other = [(0, 16, 50)]
    x = sheet(*bars(BAR, BAR, other, BAR, [], other))
    # after 1 bar: bars 2 to 6, the empty one does not count: yes, no, no, no
    assert measures.repetition(1)(x) == pytest.approx(1 / 4)
    # after 2: other vs BAR no, BAR vs BAR yes, other vs BAR no
    assert measures.repetition(2)(x) == pytest.approx(1 / 3)
    assert measures.repetition(4)(x) == 0
    assert np.isnan(measures.repetition(8)(x))


def test_empty_bars_are_those_in_which_nothing_sounds():
    assert measures.empty_bars(sheet(*bars(BAR, [], BAR, []))) == pytest.approx(1 / 3)
    assert measures.empty_bars(sheet((0, 40, 60))) == 0  # held over three bars
    assert measures.empty_bars(sheet((16, 4, 60))) == pytest.approx(1 / 2)


def test_equal_bars_have_groove_one():
    """Without the empty bar after the end that halves it elsewhere (muspy issue 73)."""
    assert measures.groove(sheet(*bars(BAR, BAR))) == 1
    assert measures.groove(sheet(*bars(BAR, BAR), length=48)) == 1
    assert measures.groove(sheet(*bars([], BAR, BAR))) == 1
    assert np.isnan(measures.groove(sheet(*BAR)))


def test_groove_by_hand():
    x = sheet(*bars([(0, 4, 60), (8, 4, 60)], [(0, 4, 60), (4, 4, 60)], [(0, 4, 60), (4, 4, 60)]))
    assert measures.groove(x) == pytest.approx((14 / 16 + 1) / 2)
    changed = Piece(
        (TrackInfo("a"),),
        np.array([[0, 10, 60, 80, 0], [4 * TPQ, 10, 60, 80, 0], [7 * TPQ, 10, 60, 80, 0]]),
        time_signatures=((4 * TPQ, 3, 4),),
    )
    assert measures.groove(measures.sheet(changed)) == 1  # only the two bars of 3/4 compare


def random_sheets(n, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        bar = [
            (int(on), 2, int(p))
            for on, p in zip(range(0, 16, 4), rng.integers(55, 75, 4), strict=True)
        ]
        found.append(sheet(*bars(*[bar] * 6)))
    return found


def test_identical_sets():
    pieces = random_sheets(6)
    found = measures.compare(pieces, pieces)
    for name in measures.HISTOGRAMS:
        assert found[name]["score"] == pytest.approx(1), name
        assert found[name]["ceiling_low"] <= found[name]["ceiling"] <= 1, name
    for name in measures.SCALARS:
        assert found[name]["score"] == pytest.approx(0), name
        assert found[name]["generated"] == found[name]["reference"], name
    assert found["groove"]["reference"] == 1
    assert found["repetition after 1 bar"]["reference"] == 1
    assert found["repetition after 1 bar"]["shuffled"] < 0.5
    assert found["pitch classes"]["chance"] < 0.95


def test_far_sets_are_farther_than_the_reference_from_itself():
    reference = random_sheets(8)
    generated = [sheet(*((16 * i, 16, 60) for i in range(6))) for _ in range(3)]
    found = measures.compare(generated, reference)
    assert found["durations"]["score"] == 0
    assert found["durations"]["ceiling"] == 1
    assert found["pitch classes"]["score"] < found["pitch classes"]["ceiling_low"]
    assert found["pitch-class entropy (bits)"]["score"] > 1


def test_one_piece_of_reference_has_no_ceiling():
    (one,) = random_sheets(1)
    found = measures.compare([one], [one])
    assert found["groove"]["ceiling"] is None
    assert found["groove"]["score"] == 0


def test_the_seed_decides():
    pieces = random_sheets(5)
    assert measures.compare(pieces, pieces, seed=3) == measures.compare(pieces, pieces, seed=3)
    assert measures.compare(pieces, pieces, seed=3) != measures.compare(pieces, pieces, seed=4)


def test_dealt_bars_are_the_same_bars():
    pieces = random_sheets(4)
    dealt = measures.dealt_bars(pieces, np.random.default_rng(0))

    def content(sheets):
        return sorted(tuple(sorted(bar)) for x in sheets for bar in x.bar_notes())

    assert content(dealt) == content(pieces)
    assert [len(x.bars) for x in dealt] == [len(x.bars) for x in pieces]
    assert any(len(set(x.bar_notes())) > 1 for x in dealt)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="got 0 generated and 1 of the reference"):
        measures.compare([], random_sheets(1))
