"""A piece is heard: as long as it lasts, at its pitches, and nothing where it is silent."""

import wave

import numpy as np
import pytest

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.music.audio import render, render_file

pytest.importorskip("pretty_midi")
RATE = 16000


def tone(*notes, drum=False):
    return Piece((TrackInfo(is_drum=drum),), np.array(notes), tempos=((0, 60.0),))


def samples(path):
    with wave.open(str(path)) as file:
        assert (file.getsampwidth(), file.getnchannels(), file.getframerate()) == (2, 1, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767


def test_pitch_length_and_silence(tmp_path):
    piece = tone((0, TPQ, 69, 100, 0), (2 * TPQ, TPQ, 81, 100, 0))  # A for a second, rest, A'
    numbers = render(piece, tmp_path / "new" / "a.wav", sample_rate=RATE)
    sound = samples(tmp_path / "new" / "a.wav")
    assert len(sound) == round(numbers["seconds"] * RATE) == 3 * RATE
    assert numbers["notes"] == 2
    assert numbers["rms"] == pytest.approx(np.sqrt(np.mean(sound**2)), abs=1e-3)
    assert 0.1 < np.abs(sound).max() <= 0.91
    for second, hertz in ((0, 440), (2, 880)):
        part = sound[second * RATE : (second + 1) * RATE]
        assert np.abs(np.fft.rfft(part)).argmax() == pytest.approx(hertz, abs=2)
    assert np.abs(sound[int(1.5 * RATE) : 2 * RATE]).max() < 0.01


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    tone((0, 4 * TPQ, 60, 100, 0)).save_midi(tmp_path / "a.mid")
    render_file(str(tmp_path / "a.mid"), out=str(tmp_path / "a.wav"), sample_rate=RATE)
    assert "4.0 seconds" in capsys.readouterr().out
    assert np.abs(samples(tmp_path / "a.wav")).max() > 0.1


@pytest.mark.parametrize(
    ("piece", "settings", "message"),
    [
        (tone((0, TPQ, 36, 100, 0), drum=True), {}, "no notes other than drums"),
        (Piece((), np.zeros((0, 5))), {}, "nothing to hear"),
        (tone((0, 20000 * TPQ, 60, 100, 0)), {}, "lasts 5.6 hours, at most 4"),
        (tone((0, TPQ, 60, 100, 0)), {"sample_rate": 10}, "between 8000 and 192000, got 10"),
    ],
)
def test_mistakes(piece, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        render(piece, tmp_path / "a.wav", **settings)
    assert not (tmp_path / "a.wav").exists()


def test_the_name_must_be_that_of_a_wav():
    with pytest.raises(ValueError, match=r"must end in \.wav, got 'a.mp3'"):
        render_file("missing.mid", out="a.mp3")
