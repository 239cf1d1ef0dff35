"""Piano rolls show what the piece has, and say it in numbers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo
from statezoo.music.pianoroll import plot, plot_file
from statezoo.music.spans import bar_span

pytest.importorskip("pretty_midi")
BAR = 4 * TPQ


@pytest.fixture
def piece():
    """Three bars: piano in all, one note ringing into the second; a violin; a drum."""
    notes = [
        (0, TPQ, 60, 80, 0), (3 * TPQ, 2 * TPQ, 64, 80, 0), (BAR, TPQ, 67, 80, 0),
        (2 * BAR, TPQ, 72, 80, 0), (BAR, BAR, 76, 90, 1), (0, TPQ, 36, 100, 2),
    ]  # fmt: skip
    tracks = (TrackInfo("a", 0), TrackInfo("b", 40), TrackInfo("c", 0, is_drum=True))
    return Piece(tracks, np.array(notes))


def test_numbers_are_those_of_the_notes(piece, tmp_path):
    shown = plot(piece, tmp_path / "new" / "a.png", prompt_bars=1, title="x")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == shown
    assert (shown["notes"], shown["bars"], shown["prompt_bars"]) == (6, 3, 1)
    assert shown["per_bar"] == [3, 2, 1]
    assert shown["pitch_range"] == [36, 76]
    assert shown["bar_ticks"] == [0, BAR, 2 * BAR, 3 * BAR]
    of = {key: (row["name"], row["per_bar"]) for key, row in shown["programs"].items()}
    assert of == {
        "0": ("Acoustic Grand Piano", [2, 1, 1]),
        "40": ("Violin", [0, 1, 0]),
        "drums": ("Drums", [1, 0, 0]),
    }
    assert len({row["colour"] for row in shown["programs"].values()}) == 3


def test_bars_are_cut_out(piece, tmp_path):
    shown = plot(piece, tmp_path / "a.png", bars=(2, 2))
    assert (shown["notes"], shown["first_bar"], shown["sounding_before"]) == (2, 2, 1)
    with pytest.raises(ValueError, match="a first and a last of 1 to 3"):
        plot(piece, tmp_path / "b.png", bars=(2, 4))
    assert not (tmp_path / "b.png").exists()


def test_a_picture_is_drawn_and_the_prompt_shaded(piece, tmp_path):
    from matplotlib.image import imread

    pictures = []
    for given in (0, 2):
        plot(piece, tmp_path / f"{given}.png", prompt_bars=given)
        pictures.append(imread(tmp_path / f"{given}.png")[..., :3])
    assert pictures[0].shape[1] > 300
    sand = np.array([0xF6, 0xEC, 0xC9]) / 255
    parts = [np.isclose(x, sand, atol=0.01).all(-1).mean() for x in pictures]
    assert parts[0] < 0.02 < 0.2 < parts[1]
    plot(piece, tmp_path / "again.png", prompt_bars=2)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_the_command_reads_files(piece, tmp_path, capsys):
    piece.save_midi(tmp_path / "a.mid")
    plot_file(str(tmp_path / "a.mid"), out=str(tmp_path / "a.svg"), bars="2:3")
    assert "3 notes in 2 bars" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match=r"out must end in .*got 'roll.gif'"):
        plot_file("missing.mid", out="roll.gif")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="the piece has no notes"):
        plot(Piece((), np.zeros((0, 5))), tmp_path / "a.png")


@pytest.mark.parametrize(
    ("text", "want"), [("2", (2, 2)), ("2:4", (2, 4)), (":3", (1, 3)), ("3:", (3, 9))]
)
def test_spans_of_bars(text, want):
    assert bar_span(text, 9) == want


@pytest.mark.parametrize("text", ["", "a", "0", "4:3", "10", "1:10"])
def test_wrong_spans(text):
    with pytest.raises(ValueError, match="bars"):
        bar_span(text, 9)


def test_the_commands_are_light():
    heavy = "('torch', 'lightning', 'matplotlib', 'symusic', 'music21', 'miditok')"
    script = f"import statezoo.music.commands, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
