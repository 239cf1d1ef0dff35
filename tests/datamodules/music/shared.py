"""Small pieces and files for the tests of music."""

from pathlib import Path

import numpy as np
import pytest

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo

SHARED = Path(__file__).parents[3] / "../shared/data/music"
FULL = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/music")


def chorale(bars=4, seed=0, key=0):
    """Four voices in quarters, with some rests of the tenor and repeated notes."""
    rng = np.random.default_rng(seed)
    rows = []
    for voice, middle in enumerate((74, 66, 59, 48)):
        pitches = middle + key + rng.integers(-3, 4, size=4 * bars)
        for beat, pitch in enumerate(pitches.tolist()):
            if voice == 2 and beat % 7 == 3:
                continue
            rows.append((beat * TPQ, TPQ, pitch, 80, voice))
    tracks = [TrackInfo(name) for name in ("Soprano", "Alto", "Tenor", "Bass")]
    return Piece(tuple(tracks), np.array(rows))


def band():
    """Three instruments, one of them drums, with a change from 3/4 to 6/8."""
    tracks = (TrackInfo("violin", 40), TrackInfo("piano", 0), TrackInfo("drums", 0, True))
    rows = [
        (0, 480, 60, 80, 0), (480, 960, 64, 80, 0),
        (0, 240, 48, 90, 1), (240, 240, 50, 90, 1), (0, 960, 43, 90, 1),
        (0, 120, 36, 100, 2), (480, 120, 38, 100, 2), (960, 120, 36, 100, 2),
        (1440, 360, 72, 80, 0), (1800, 180, 71, 80, 0), (2160, 720, 69, 80, 0),
        (1440, 720, 48, 90, 1), (2160, 720, 43, 90, 1), (1440, 120, 36, 100, 2),
    ]  # fmt: skip
    return Piece(tracks, np.array(rows), time_signatures=((0, 3, 4), (1440, 6, 8)))


def rows(piece, columns=3):
    """Onset, duration, pitch ... of each note, sorted."""
    return sorted(map(tuple, piece.notes[:, :columns].tolist()))


def folder_of(path, count=6, **settings):
    """A folder with ``count`` different MIDI files."""
    for n in range(count):
        chorale(seed=n, **settings).save_midi(path / f"song{n}.mid")
    return path
