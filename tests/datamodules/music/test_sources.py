import gzip
import io
import json
import zipfile

import numpy as np
import pytest
from tests.datamodules.music.shared import FULL, SHARED, band, chorale, folder_of, rows

from statezoo.datamodules.music import bach
from statezoo.datamodules.music.musicxml import read_musicxml, unpack
from statezoo.datamodules.music.notes import TPQ, Piece
from statezoo.datamodules.music.readers import Bach, music_source, read_piece

TUNES = "X:1\nT:One\nM:4/4\nL:1/8\nK:C\nCDEF GABc|\n\nX:2\nT:Two\nM:3/4\nL:1/4\nK:G\nGAB|\n"


def note(step, octave, duration, *extra, alter=""):
    alter = f"<alter>{alter}</alter>" if alter else ""
    pitch = f"<pitch><step>{step}</step>{alter}<octave>{octave}</octave></pitch>"
    front = "".join(e for e in extra if "chord" in e or "grace" in e)
    back = "".join(e for e in extra if e not in front)
    length = f"<duration>{duration}</duration>" if duration else ""
    return f"<note>{front}{pitch}{length}{back}</note>"


TIE, STOP = '<tie type="start"/>', '<tie type="stop"/>'


def score(*measures, parts=1):
    body = "".join(f'<measure number="{n}">{m}</measure>' for n, m in enumerate(measures))
    listed = "".join(
        f'<score-part id="P{n}"><part-name>Part {n}</part-name></score-part>' for n in range(parts)
    )
    music = "".join(f'<part id="P{n}">{body}</part>' for n in range(parts))
    text = f"<score-partwise><part-list>{listed}</part-list>{music}</score-partwise>"
    return text.encode()


FOUR = "<attributes><divisions>2</divisions><time><beats>4</beats><beat-type>4</beat-type></time>"
FOUR += "</attributes>"


def test_musicxml_chords_voices_grace_notes_and_ties():
    data = score(
        FOUR
        + note("C", 4, 2)
        + note("E", 4, 2, "<chord/>")
        + note("D", 5, 0, "<grace/>")
        + note("F", 4, 6, TIE, alter="1")
        + "<backup><duration>8</duration></backup><forward><duration>4</duration></forward>"
        + note("C", 3, 4),
        note("F", 4, 2, STOP, alter="1") + note("G", 4, 6),
    )
    piece = read_musicxml(data)
    assert rows(piece) == [
        (0, 480, 60), (0, 480, 64), (480, 1440 + 480, 66), (960, 960, 48), (2400, 1440, 67)
    ]  # fmt: skip
    assert piece.tracks[0].name == "Part 0"
    assert piece.time_signatures == ((0, 4, 4),)
    assert piece.length == 8 * TPQ


def test_musicxml_upbeats_and_bars_cut_in_two_keep_the_bar_lines():
    whole = note("C", 4, 8)
    data = score(FOUR + note("C", 4, 2), whole, note("D", 4, 6), note("D", 4, 2), whole)
    piece = read_musicxml(data)
    assert piece.time_signatures == ((0, 1, 4), (480, 4, 4))
    assert piece.bars().tolist() == [0, 480, 2400, 4320, 6240]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<score", "not XML"),
        (b"<html/>", "not a partwise MusicXML score: its root is <html>"),
        (score(FOUR + note("H", 4, 2)), "a value that cannot be read"),
        (score("<attributes><divisions>0</divisions></attributes>" + note("C", 4, 2)), "cannot"),
    ],
)
def test_what_is_no_musicxml(data, message):
    with pytest.raises(ValueError, match=message):
        read_musicxml(data)


def test_packed_musicxml(tmp_path):
    plain = score(FOUR + note("C", 4, 8))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("META-INF/container.xml", '<c><rootfile full-path="deep/x.xml"/></c>')
        archive.writestr("deep/x.xml", plain)
        archive.writestr("other.xml", "<html/>")
    assert unpack(packed.getvalue()) == plain
    (tmp_path / "a.mxl").write_bytes(packed.getvalue())
    (tmp_path / "b.musicxml").write_bytes(plain)
    assert read_piece(tmp_path / "a.mxl") == read_piece(tmp_path / "b.musicxml")
    with pytest.raises(ValueError, match=r"not a whole \.mxl file"):
        unpack(packed.getvalue()[:-30])


def test_abc_books_are_read_tune_by_tune_and_in_silence(tmp_path, capfd):
    path = tmp_path / "book.abc"
    path.write_text(TUNES.replace("GAB|", "GAB| !strange! %%odd"))
    entries = list(music_source(path).entries([]))
    assert [entry.name.rpartition("#")[2] for entry in entries] == ["1", "2"]
    assert entries[0].piece.pitch.tolist() == [60, 62, 64, 65, 67, 69, 71, 72]
    assert capfd.readouterr() == ("", "")


def bad_files(folder):
    good = folder / "song0.mid"
    data = good.read_bytes()
    (folder / "a_empty.mid").write_bytes(b"")
    (folder / "b_cut.mid").write_bytes(data[: len(data) // 2])
    (folder / "c_text.mid").write_text("this is no music, " * 10)
    Piece((), np.zeros((0, 5))).save_midi(folder / "d_nothing.mid")
    fast = Piece(chorale().tracks, chorale().notes, tempos=((0, 60_000.0),))
    fast.save_midi(folder / "e_fast.mid")
    (folder / "f.xml").write_text("<html></html>")
    return {
        "a_empty.mid": "empty file",
        "b_cut.mid": "a damaged MIDI file",
        "c_text.mid": "not a MIDI file: it does not begin with MThd",
        "d_nothing.mid": "no notes of more than zero length",
        "e_fast.mid": "absurd tempo of 60000 quarters per minute, outside 5 to 1000",
        "f.xml": "not a partwise MusicXML score: its root is <html>",
    }


def test_bad_files_are_left_out_with_reasons(tmp_path):
    folder_of(tmp_path, 2)
    reasons = bad_files(tmp_path)
    skipped = []
    entries = list(music_source(tmp_path).entries(skipped))
    assert len(entries) == 2
    assert [row.name.rpartition("/")[2] for row in skipped] == list(reasons)
    for row, reason in zip(skipped, reasons.values(), strict=True):
        assert row.reason.startswith(reason)
    with pytest.raises(ValueError, match=r"c_text\.mid cannot be used: not a MIDI file"):
        read_piece(tmp_path / "c_text.mid")


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_midi_cut_anywhere_is_no_piece(fraction, tmp_path):
    band().save_midi(tmp_path / "a.mid")
    data = (tmp_path / "a.mid").read_bytes()
    (tmp_path / "a.mid").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=r"a\.mid cannot be used"):
        read_piece(tmp_path / "a.mid")


def test_splits_by_folder(tmp_path):
    for name in ("train", "Valid", "test"):
        folder_of(tmp_path / name, 2)
    found = [(e.name.rpartition("/")[2], e.split) for e in music_source(tmp_path).entries([])]
    assert sorted({split for _, split in found}) == ["test", "train", "val"]


@pytest.mark.parametrize("column", ["midi_filename", "file", "name"])
def test_splits_by_list(tmp_path, column):
    folder_of(tmp_path / "2004", 4)
    lines = [f"composer,{column},split"]
    lines += [f"X,2004/song{n}.mid,{s}" for n, s in enumerate(("train", "validation", "test"))]
    (tmp_path / "maestro.csv").write_text("\n".join(lines))
    skipped = []
    found = [entry.split for entry in music_source(tmp_path).entries(skipped)]
    assert found == ["train", "val", "test"]
    assert [row.reason for row in skipped] == ["not in the folder's list of splits"]
    (tmp_path / "maestro.csv").write_text("\n".join([*lines, "X,2004/song3.mid,half"]))
    with pytest.raises(ValueError, match=r"maestro\.csv, line 5: split 'half' is not one of"):
        music_source(tmp_path)


def test_the_same_music_in_another_key_is_one_group(tmp_path):
    chorale(seed=1).save_midi(tmp_path / "a.mid")
    chorale(seed=1, key=3).save_midi(tmp_path / "b.mid")
    chorale(seed=2).save_midi(tmp_path / "c.mid")
    groups = [entry.group for entry in music_source(tmp_path).entries([])]
    assert groups[0] == groups[1] != groups[2]


def test_names_and_contents_make_the_fingerprint(tmp_path):
    folder_of(tmp_path, 2)
    first = music_source(tmp_path).fingerprint()
    assert music_source(tmp_path).fingerprint() == first
    chorale(seed=9).save_midi(tmp_path / "song1.mid")
    assert music_source(tmp_path).fingerprint() != first


def test_json_of_chorales(tmp_path):
    voices = {"train": [[[60, 55, 52, 48]] * 4 + [[62, -1, 52, 48]]], "valid": [], "test": []}
    path = tmp_path / "Jsb16thSeparated.json.gz"
    path.write_bytes(gzip.compress(json.dumps(voices).encode()))
    (entry,) = music_source(path).entries([])
    assert entry.split == "train"
    assert rows(entry.piece) == [
        (0, 480, 55), (0, 480, 60), (0, 600, 48), (0, 600, 52), (480, 120, 62)
    ]  # fmt: skip
    roll = tmp_path / "jsb_quarter.json"
    roll.write_text(json.dumps({"test": [[[60], [60, 64], [], [64]]], "train": [[[300]]]}))
    skipped = []
    (entry,) = music_source(roll).entries(skipped)
    assert rows(entry.piece) == [(0, 960, 60), (480, 480, 64), (1440, 480, 64)]
    assert entry.piece.length == 4 * TPQ
    assert skipped[0].reason == "a pitch outside 0 to 127 in frame 0"


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1", "is not JSON"), ("[1]", "is not a list of chorales"), ('{"a": 1}', "needs train")],
)
def test_other_json(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        music_source(tmp_path / "a.json")


def test_places_without_music(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file or folder .*nowhere.* exists\): give a"):
        music_source(tmp_path / "nowhere")
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found \.wav, accepted are \.mid, \.midi, \.musicxml"):
        music_source(tmp_path)


def test_related_pieces_share_windows_in_any_key():
    one, other = chorale(bars=8, seed=1), chorale(bars=8, seed=2)
    half = one.notes[one.onset < 16 * 480 + 4 * 480]
    prints = [bach.fingerprint(p) for p in (one, other, one.transposed(2), one.with_notes(half))]
    assert bach.related(prints, 0.1) == [0, 1, 0, 0]
    assert bach.related(prints[:2], 0.0) == [0, 1]


@pytest.mark.slow
def test_the_embedded_chorales():
    pytest.importorskip("music21")
    skipped = []
    entries = list(Bach().entries(skipped))
    assert 340 <= len(entries) <= 364
    assert all(len(entry.piece.tracks) == 4 for entry in entries)
    aligned = [entry.piece.onset % 120 == 0 for entry in entries]
    assert np.concatenate(aligned).mean() > 0.999
    assert all(row.reason.startswith("the same music as") for row in skipped)


@FULL
@pytest.mark.slow
def test_most_of_the_jsb_test_set_is_in_the_embedded_corpus():
    pytest.importorskip("music21")
    ours = frozenset().union(*(bach.fingerprint(e.piece) for e in Bach().entries([])))
    theirs = music_source(SHARED / "jsb_16th_satb.json.gz").entries([])
    shares = []
    for entry in theirs:
        if entry.split == "test":
            windows = bach.fingerprint(entry.piece)
            shares.append(len(windows & ours) / len(windows))
    assert 60 <= sum(share > 0.1 for share in shares) <= 77
