import json
import tarfile

import numpy as np
import pytest
from tests.datamodules.music.shared import FULL, SHARED, band, chorale, rows

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.datamodules.music.readers import music_source, read_piece
from statezoo.datamodules.music.tokenizers import (
    MidiTokens,
    Performance,
    SatbGrid,
    music_tokenizer,
    music_tokenizer_from_state,
)

ALL = [
    pytest.param("satb", {}, id="satb"),
    pytest.param("satb", {"hold": True}, id="satb-hold"),
    pytest.param("performance", {}, id="performance"),
    pytest.param("remi", {}, id="remi"),
    pytest.param("tsd", {"velocities": 0}, id="tsd"),
    pytest.param("midilike", {}, id="midilike"),
    pytest.param("remi", {"programs": True, "tempos": 16}, id="remi-programs"),
    pytest.param("tsd", {"programs": True}, id="tsd-programs"),
    pytest.param("midilike", {"programs": True}, id="midilike-programs"),
]
BEATS = ("remi", "tsd", "midilike")


@pytest.fixture(scope="session")
def piano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("piano")
    with tarfile.open(SHARED / "piano_midi_de.tar.gz") as archive:
        names = [m for m in archive.getmembers() if m.name.endswith(".mid")][::30]
        archive.extractall(folder, members=names, filter="data")
    return [read_piece(path) for path in sorted(folder.rglob("*.mid"))]


@pytest.mark.parametrize("kind", BEATS)
def test_beat_tokens_keep_notes_programs_and_meters(kind):
    tokenizer = music_tokenizer(kind, programs=True)
    piece = band()
    back = tokenizer.decode_piece(tokenizer.encode_piece(piece))
    assert rows(back) == rows(piece)
    assert back.time_signatures == piece.time_signatures
    players = [(piece.tracks[n].program, piece.tracks[n].is_drum) for n in piece.track]
    found = [(back.tracks[n].program, back.tracks[n].is_drum) for n in back.track]
    mine = sorted((*row[:3], *p) for row, p in zip(piece.notes.tolist(), players, strict=True))
    its = sorted((*row[:3], *p) for row, p in zip(back.notes.tolist(), found, strict=True))
    assert mine == its


@pytest.mark.parametrize("kind", BEATS)
def test_beat_tokens_without_programs_leave_out_drums(kind):
    tokenizer = music_tokenizer(kind)
    back = tokenizer.decode_piece(tokenizer.encode_piece(band()))
    assert rows(back) == sorted(row for row in rows(band()) if row[1] != 120)
    drums = Piece((TrackInfo("", 0, True),), np.array([[0, 120, 36, 100, 0]]))
    with pytest.raises(ValueError, match="nothing but drums, which need tokens with programs"):
        tokenizer.encode_piece(drums)


@FULL
@pytest.mark.parametrize("kind", BEATS)
def test_beat_tokens_of_real_files_stay_within_half_a_grid_step(kind, piano):
    tokenizer = music_tokenizer(kind)
    close = total = 0
    for piece in piano:
        back = tokenizer.decode_piece(tokenizer.encode_piece(piece))
        assert len(back) == len(piece)
        ours, its = (p.notes[np.lexsort((p.onset, p.pitch))] for p in (piece, back))
        error = np.abs(ours[:, 0] - its[:, 0])
        # on the grid of 32nds: half a step, as pitches are sorted equally; 60 ticks is a 32nd
        close += int((error <= 30 + 1).sum())
        total += len(piece)
        assert np.median(error) == 0
        assert np.median(np.abs(ours[:, 1] - its[:, 1])) <= 30
    assert close / total > 0.98, f"{close} of {total} onsets"  # trills faster than the grid swap


@FULL
def test_performances_of_real_files_stay_within_a_step(piano):
    tokenizer = Performance()
    for piece in piano:
        back = tokenizer.decode_piece(tokenizer.encode_piece(piece))
        seconds = piece.seconds(piece.onset)
        again = tokenizer.encode_piece(back)
        np.testing.assert_array_equal(again, tokenizer.encode_piece(piece))
        assert len(piece) * 0.998 <= len(back) <= len(piece)
        for pitch in range(128):
            want, got = seconds[piece.pitch == pitch], back.onset[back.pitch == pitch] / 1000
            nearest = np.abs(want[:, None] - got[None]).min(axis=1, initial=9 if len(want) else 0)
            assert nearest.max(initial=0) <= 0.005 + 1e-9, pitch  # half a step of 10 ms


@FULL
def test_the_grid_of_real_chorales_is_exact():
    tokenizer = SatbGrid()
    path = SHARED / "jsb_16th_satb.json.gz"
    source = music_source(path)
    entries = list(source.entries([]))
    frames = [piece for pieces in source.pieces.values() for piece in pieces]
    for entry, want in zip(entries, frames, strict=True):
        ids = tokenizer.encode_piece(entry.piece)
        flat = np.array(want).reshape(-1)
        np.testing.assert_array_equal(ids, np.where(flat < 0, 0, flat - 35))
        np.testing.assert_array_equal(tokenizer.encode_piece(tokenizer.decode_piece(ids)), ids)


def test_the_grid_with_hold_keeps_repeated_notes():
    piece = chorale()
    tokenizer = SatbGrid(hold=True)
    assert rows(tokenizer.decode_piece(tokenizer.encode_piece(piece))) == rows(piece)
    plain = SatbGrid()
    assert len(plain.decode_piece(plain.encode_piece(piece))) < len(piece)
    assert tokenizer.vocab_size == 49
    assert plain.vocab_size == 48  # 46 pitches, rest, BOS


def test_hand_made_ids():
    notes = np.array([[0, 120, 60, 66, 0], [0, 240, 64, 66, 0]])
    piece = Piece((TrackInfo(),), notes, tempos=((0, 125.0),))  # 120 ms and 240 ms
    assert Performance().encode_piece(piece).tolist() == [
        356 + 16, 60, 64, 256 + 11, 128 + 60, 256 + 11, 128 + 64
    ]  # fmt: skip
    grid = SatbGrid().encode_piece(piece)
    assert grid.tolist() == [64 - 35, 60 - 35, 0, 0, 64 - 35, 0, 0, 0]
    names = [MidiTokens().names[i] for i in MidiTokens().encode_piece(piece)]
    assert names[:3] == ["Bar_None", "TimeSig_4/4", "Position_0"]
    assert names[3] == "Pitch_60"
    assert names[6] == "Pitch_64"


def test_voices_by_height_where_tracks_have_no_names():
    piece = chorale()
    shuffled = piece.notes.copy()
    shuffled[:, 4] = 3 - shuffled[:, 4]
    unnamed = Piece((TrackInfo(),) * 4, shuffled)
    np.testing.assert_array_equal(SatbGrid().encode_piece(unnamed), SatbGrid().encode_piece(piece))


@pytest.mark.parametrize(
    ("pitches", "message"),
    [
        ([50, 52, 54, 56, 58], "5 notes sound at once in quarter 1; the grid has four voices"),
        ([30], "pitch 30 is outside the grid's range 36 to 81"),
    ],
)
def test_what_the_grid_cannot_hold(pitches, message):
    rows = [(0, TPQ, pitch, 80, 0) for pitch in pitches]
    with pytest.raises(ValueError, match=message):
        SatbGrid().encode_piece(Piece((TrackInfo(),), np.array(rows)))


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_every_encoded_piece_is_in_its_grammar(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    for piece in (chorale(), chorale(seed=3)) if kind == "satb" else (chorale(seed=1), band()):
        state = tokenizer.start()
        ids = tokenizer.encode_piece(piece)
        for place, token in enumerate(ids.tolist()):
            before = [tokenizer.names[i] for i in ids[max(place - 5, 0) : place]]
            assert tokenizer.allowed(state)[token], (before, tokenizer.names[token])
            state = tokenizer.advance(state, token)
        assert state.tick <= -(-piece.length * 3 // 2)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_whatever_is_sampled_decodes_to_music(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    rng = np.random.default_rng(0)
    state, ids, ticks = tokenizer.start(), [], []
    for _ in range(400):
        allowed = np.flatnonzero(tokenizer.allowed(state))
        assert len(allowed), f"nothing may follow {tokenizer.names[ids[-1]]}"
        assert tokenizer.bos_id not in allowed
        ids.append(int(rng.choice(allowed)))
        state = tokenizer.advance(state, ids[-1])
        ticks.append(state.tick)
    assert (np.diff(ticks) >= 0).all()  # time does not run back
    piece = tokenizer.decode_piece(ids)
    assert (piece.duration > 0).all()
    assert ((piece.pitch >= 0) & (piece.pitch < 128)).all()
    if kind != "satb":  # there equal pitches in a row are one note
        onsets = int(tokenizer.counts[ids].sum())
        # the last note may lack its rest; in performances one may end where it began
        assert onsets - 1 <= len(piece) <= onsets
    else:
        np.testing.assert_array_equal(tokenizer.encode_piece(piece), ids)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_a_prefix_is_a_piece_too(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    ids = tokenizer.encode_piece(chorale(bars=1))
    for cut in range(0, len(ids), 1 if len(ids) < 80 else 3):
        assert len(tokenizer.decode_piece(ids[:cut])) <= 16


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_saved_folders_load_back_here_and_in_transformers(kind, settings, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = music_tokenizer(kind, **settings)
    tokenizer.save(tmp_path)
    back = music_tokenizer(str(tmp_path))
    assert back.fingerprint == tokenizer.fingerprint
    ids = tokenizer.encode_piece(chorale())
    np.testing.assert_array_equal(back.encode_piece(chorale()), ids)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.decode(ids)
    assert theirs(text)["input_ids"] == ids.tolist() == tokenizer.encode(text)
    assert theirs.bos_token_id == tokenizer.bos_id
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]


def test_settings_change_the_fingerprint():
    prints = {music_tokenizer(p.values[0], **p.values[1]).fingerprint for p in ALL}
    assert len(prints) == len(ALL)


def test_a_saved_tokenizer_of_another_library_is_refused():
    state = SatbGrid().state_dict()
    config = json.loads(state["tokenizer.json"])
    config["model"]["vocab"]["Pitch_36"] = 77
    state["tokenizer.json"] = json.dumps(config)
    with pytest.raises(ValueError, match="differ: install the miditok version it was made with"):
        music_tokenizer_from_state(state)


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_tables_transpose_exactly(kind, settings):
    tokenizer = music_tokenizer(kind, **settings)
    piece = chorale() if kind == "satb" else band()
    ids = tokenizer.encode_piece(piece)
    np.testing.assert_array_equal(
        tokenizer.table(semitones=-3)[ids], tokenizer.encode_piece(piece.transposed(-3))
    )
    np.testing.assert_array_equal(tokenizer.table()[ids], ids)


def test_tables_change_velocity_and_tempo():
    remi, performance = MidiTokens(tempos=16), Performance()
    for tokenizer in (remi, performance):
        louder = tokenizer.decode_piece(
            tokenizer.table(velocity=24)[tokenizer.encode_piece(chorale())]
        )
        before = tokenizer.decode_piece(tokenizer.encode_piece(chorale()))
        assert (louder.velocity - before.velocity == 24).all()
    ids = performance.encode_piece(chorale())
    faster = performance.decode_piece(performance.table(tempo=1.25)[ids])
    assert faster.length == round(performance.decode_piece(ids).length / 1.25)
    quick = Piece(chorale().tracks, chorale().notes, tempos=((0, 100.0),))
    moved = remi.decode_piece(remi.table(tempo=1.2)[remi.encode_piece(quick)])
    assert abs(moved.tempos[0][1] - 120) < 15  # to the nearest of 16 levels


def test_merged_tokens_are_shorter_and_obey_the_grammar():
    plain = MidiTokens("remi", velocities=0)
    pieces = [chorale(seed=n) for n in range(8)]
    merged = plain.train(pieces, plain.vocab_size + 100)
    ids = merged.encode_piece(pieces[0])
    assert len(ids) < 0.8 * len(plain.encode_piece(pieces[0]))
    assert rows(merged.decode_piece(ids)) == rows(plain.decode_piece(plain.encode_piece(pieces[0])))
    back = music_tokenizer_from_state(merged.state_dict())
    assert back.fingerprint == merged.fingerprint
    np.testing.assert_array_equal(back.encode_piece(pieces[0]), ids)
    assert int(merged.counts[ids].sum()) == len(pieces[0])
    state = merged.start()
    rng = np.random.default_rng(1)
    sampled = []
    for _ in range(60):
        sampled.append(int(rng.choice(np.flatnonzero(merged.allowed(state)))))
        state = merged.advance(state, sampled[-1])
    onsets = int(merged.counts[sampled].sum())
    assert onsets - 1 <= len(merged.decode_piece(sampled)) <= onsets
    with pytest.raises(ValueError, match="got one with merges"):
        merged.train(pieces, 5000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("octuple", "octuple has several vocabularies, one for each field of a note"),
        ("CPWord", "CPWord has several vocabularies"),
        ("MuMIDI", "use remi, tsd or midilike"),
        ("abc", "No music encoding 'abc': use remi, tsd, midilike, satb, performance, a folder"),
    ],
)
def test_other_encodings_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        music_tokenizer(name)
    with pytest.raises(ValueError, match=r"needs kind remi, tsd or midilike|several vocabularies"):
        MidiTokens(name)


def test_missing_extra_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'needs the package miditok: pip install "statezoo\[music\]"'
    ):
        MidiTokens()


def test_words_that_are_no_tokens():
    with pytest.raises(
        ValueError, match="'C4' is not a token of satb: write names such as Pitch_36"
    ):
        SatbGrid().encode("Rest_None C4")
