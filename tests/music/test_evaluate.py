"""``statezoo music evaluate``: table, JSON, picture; few files, bad files, none."""

import json

import numpy as np
import pytest

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.music.evaluate import evaluate
from statezoo.music.measures import HISTOGRAMS, SCALARS

pytest.importorskip("symusic")


def write(folder, count, seed=0):
    """MIDI of random tunes in C major."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pitches = rng.choice([60, 62, 64, 65, 67, 69, 71], 48)
        rows = [[i * TPQ // 2, TPQ // 2, pitch, 80, 0] for i, pitch in enumerate(pitches)]
        Piece((TrackInfo("a"),), np.array(rows)).save_midi(folder / f"{number}.mid")
    return str(folder)


@pytest.fixture
def no_picture(monkeypatch):
    """Save the second or so that a picture takes."""
    monkeypatch.setattr("statezoo.music.evaluate.draw", lambda report, target: None)


def test_music_against_itself(tmp_path, capsys):
    folder = write(tmp_path / "a", 4)
    evaluate(generated=folder, reference=folder, out=str(tmp_path / "new/metrics.json"))
    report = json.loads((tmp_path / "new/metrics.json").read_text())
    measures = report["measures"]
    assert set(measures) == {*HISTOGRAMS, *SCALARS}
    assert all(measures[name]["score"] == pytest.approx(1) for name in HISTOGRAMS)
    assert all(measures[name]["score"] == pytest.approx(0) for name in SCALARS)
    assert report["generated"]["pieces"] == 4
    assert report["generated"]["notes"] == report["reference"]["notes"] == 192
    assert report["generated"]["bars"] == 24
    assert sum(report["pitch_classes"]["generated"]) == 192
    assert measures["scale consistency"]["reference"] == 1
    assert measures["groove"]["reference"] == 1
    assert (tmp_path / "new/metrics.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for name in measures:
        assert name in shown
    assert f"wrote {tmp_path / 'new/metrics.json'}" in shown


def test_the_same_call_writes_the_same_numbers(no_picture, tmp_path):
    one, other = write(tmp_path / "a", 2), write(tmp_path / "b", 2, seed=1)
    texts = []
    for name in ("x.json", "y.json"):
        evaluate(generated=one, reference=other, out=str(tmp_path / name), seed=5)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]


def test_one_file_is_enough_and_has_no_ceiling(no_picture, tmp_path, capsys):
    folder = write(tmp_path / "a", 1)
    evaluate(generated=folder, reference=f"{folder}/0.mid", out=str(tmp_path / "m.json"))
    measures = json.loads((tmp_path / "m.json").read_text())["measures"]
    assert measures["pitch classes"]["ceiling"] is None
    assert "One piece of reference has no halves: no ceiling; give more." in capsys.readouterr().out


def test_bad_files_are_left_out_and_named(no_picture, tmp_path, capsys):
    folder = write(tmp_path / "a", 2)
    (tmp_path / "a/bad.mid").write_text("no music")
    evaluate(generated=folder, reference=folder, out=str(tmp_path / "m.json"))
    report = json.loads((tmp_path / "m.json").read_text())
    (reason,) = report["generated"]["skipped"].values()
    assert reason == "not a MIDI file: it does not begin with MThd"
    assert "generated: 2 pieces, 12 bars, 96 notes; 1 skipped" in capsys.readouterr().out


def test_no_music_at_all(tmp_path):
    folder = write(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/bad.mid").write_text("no music")
    with pytest.raises(ValueError, match=r"--generated .*b has no usable music \(.*bad\.mid: not"):
        evaluate(generated=str(tmp_path / "b"), reference=folder, out=str(tmp_path / "m.json"))
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="holds no music that can be read: found no file at all"):
        evaluate(generated=folder, reference=str(tmp_path / "c"), out=str(tmp_path / "m.json"))
    with pytest.raises(FileNotFoundError, match="No file or folder 'nowhere'"):
        evaluate(generated="nowhere", reference=folder, out=str(tmp_path / "m.json"))
    assert not (tmp_path / "m.json").exists()


def test_out_is_json(tmp_path):
    with pytest.raises(ValueError, match=r"out must end in \.json, got 'm\.txt'\."):
        evaluate(generated="a", reference="b", out="m.txt")
