import mido
import numpy as np
import pytest
import symusic
from tests.datamodules.music.shared import band, rows

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.datamodules.music.readers import read_piece
from statezoo.datamodules.music.tokenizers import music_tokenizer


def test_midi_files_keep_everything_and_are_equal_byte_for_byte(tmp_path):
    piece = band()
    piece.save_midi(tmp_path / "new" / "a.mid")
    piece.save_midi(tmp_path / "b.mid")
    assert (tmp_path / "new" / "a.mid").read_bytes() == (tmp_path / "b.mid").read_bytes()
    back = Piece.from_score(symusic.Score(str(tmp_path / "b.mid")))
    assert rows(back, 4) == rows(piece, 4)
    assert back.time_signatures == piece.time_signatures
    assert {(t.program, t.is_drum) for t in back.tracks} == {(40, False), (0, False), (0, True)}
    found = mido.MidiFile(tmp_path / "b.mid")  # a second opinion on the file
    ons = sum(m.type == "note_on" and m.velocity > 0 for track in found.tracks for m in track)
    assert ons == len(piece)


@pytest.mark.parametrize("tpq", [96, 120, 384, 960])
def test_other_resolutions_become_480_ticks(tpq):
    score = symusic.Score(tpq)
    score.tracks.append(symusic.Track())
    score.tracks[0].notes.append(symusic.Note(tpq, tpq // 2, 60, 64))
    score.tracks[0].notes.append(symusic.Note(2 * tpq, 0, 60, 64))  # has no length
    assert rows(Piece.from_score(score)) == [(TPQ, TPQ // 2, 60)]


def test_bars_follow_the_meters():
    piece = band()
    assert piece.bars().tolist() == [0, 1440, 2880]
    assert piece.bars(2881).tolist() == [0, 1440, 2880, 4320]
    assert Piece((), np.zeros((0, 5))).bars(3 * TPQ).tolist() == [0, 4 * TPQ]


def test_seconds_follow_the_tempos():
    piece = Piece((), np.zeros((0, 5)), tempos=((0, 60.0), (480, 120.0)))
    found = piece.seconds(np.array([0, 480, 960, 1440]))
    np.testing.assert_allclose(found, [0, 1, 1.5, 2], atol=1e-12)  # rounding alone


def test_transposition_leaves_drums_alone():
    moved = band().transposed(2)
    change = moved.pitch - band().pitch
    assert (change[moved.drums] == 0).all()
    assert (change[~moved.drums] == 2).all()
    assert len(band().transposed(80)) < len(band())  # what leaves the range is dropped


def test_between_cuts_and_keeps_the_meter():
    part = band().between(1440, 2160)
    assert part.time_signatures == ((0, 6, 8),)
    assert part.length == 720
    assert rows(part)[0] == (0, 120, 36)
    assert band().between(0, 500).end.max() == 500


def test_notes_of_no_track_are_refused():
    with pytest.raises(ValueError, match="needs tracks numbered 0 to 0, got notes of tracks 1"):
        Piece((TrackInfo(),), np.array([[0, 1, 60, 64, 1]]))


def test_midi_files_of_the_wild(tmp_path):
    song = mido.MidiFile(charset="latin1", ticks_per_beat=96)
    track = mido.MidiTrack()
    song.tracks.append(track)
    track.append(mido.MetaMessage("track_name", name="Fl\xf6te"))
    track.append(mido.MetaMessage("time_signature", numerator=7, denominator=16))
    track.append(mido.Message("note_on", note=60, velocity=64))
    track.append(mido.Message("note_on", note=60, velocity=0, time=96))
    song.save(tmp_path / "a.MID")
    piece = read_piece(tmp_path / "a.MID")
    assert rows(piece) == [(0, 480, 60)]
    assert piece.time_signatures == ((0, 7, 16),)
    for kind in ("remi", "tsd", "midilike"):  # a meter without a token is left out in silence
        tokenizer = music_tokenizer(kind)
        assert rows(tokenizer.decode_piece(tokenizer.encode_piece(piece))) == rows(piece)
    data = bytearray((tmp_path / "a.MID").read_bytes())
    data[data.find(b"\xff\x58\x04") + 3] = 0
    (tmp_path / "a.MID").write_bytes(data)
    assert read_piece(tmp_path / "a.MID").time_signatures == ()  # no beats in a bar


@pytest.mark.parametrize(
    ("tempo", "onset", "message"),
    [(0, 0, "absurd tempo of inf"), (500_000, 1 << 27, "quarters, more than 100000")],
)
def test_midi_files_that_would_never_end(tmp_path, tempo, onset, message):
    song = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack()
    song.tracks.append(track)
    track.append(mido.MetaMessage("set_tempo", tempo=tempo))
    track.append(mido.Message("note_on", note=60, velocity=64, time=onset))
    track.append(mido.Message("note_off", note=60, time=96))
    song.save(tmp_path / "a.mid")
    with pytest.raises(ValueError, match=message):
        read_piece(tmp_path / "a.mid")


def test_bars_end_before_a_later_meter():
    piece = Piece((), np.zeros((0, 5)), time_signatures=((0, 4, 4), (4 * 1920, 3, 4)))
    assert piece.bars(2 * 1920).tolist() == [0, 1920, 2 * 1920]
    assert piece.bars(4 * 1920).tolist() == [1920 * i for i in range(5)]
    assert piece.bars(4 * 1920 + 1).tolist()[-2:] == [4 * 1920, 4 * 1920 + 1440]
