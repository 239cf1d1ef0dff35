"""Sound of a piece by sine waves: no sound font, no download."""

from __future__ import annotations

import sys
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from statezoo.datamodules.music.notes import Piece

__all__ = ["render", "render_file"]

PEAK = 0.9
"""Of full scale."""
LONGEST = 4 * 3600
"""Seconds; longer files are held to be mistakes."""


def render_file(file: str, *, out: str, sample_rate: int = 22050) -> None:
    """Make a file of music heard: a 16-bit WAV of sine waves, with no sound font to download.

    Args:
        file: MIDI, MusicXML or ABC.
        out: WAV to write.
        sample_rate: Samples per second.

    Raises:
        ValueError: If the file cannot be used, or has nothing but drums.
    """
    from statezoo.datamodules.music.readers import read_piece

    _check(out, sample_rate)
    numbers = render(read_piece(file), out, sample_rate=sample_rate)
    sys.stdout.write(f"wrote {out}: {numbers['seconds']:.1f} seconds, rms {numbers['rms']:.3f}\n")


def render(piece: Piece, out: str | Path, *, sample_rate: int = 22050) -> dict[str, float]:
    """Write a piece as a 16-bit mono WAV, one sine per note, through ``pretty_midi``.

    It lasts as long as the piece, with rests at its end. Drums have no pitch and stay silent; notes
    shorter than three samples, and those above half the sample rate, are left out.

    Args:
        piece: The music, at the tempos it names.
        out: File to write, ``.wav``; its folder is made.
        sample_rate: Samples per second; the highest piano key sounds at 4186 Hz.

    Returns:
        ``seconds``, ``sample_rate``, ``notes`` (heard) and ``rms``, the mean loudness with full
        scale 1.

    Raises:
        ValueError: If there is nothing to hear, a number is out of range, or
            pretty_midi is missing.
    """
    from statezoo.datamodules.music.notes import require

    out = Path(out)
    _check(out, sample_rate)
    require("pretty_midi", "Sound")
    import pretty_midi  # type: ignore[import-untyped]

    times = piece.seconds(np.stack([piece.onset, piece.end]))
    hertz = 440 * 2 ** ((piece.pitch - 69) / 12)
    heard = ~piece.drums & (hertz < sample_rate / 2)
    heard &= np.diff(times, axis=0)[0] * sample_rate >= 3  # the first and last sample are 0
    if not heard.any():
        raise ValueError(
            "there is nothing to hear: the piece has no notes other than drums, or they are too "
            f"short or too high for {sample_rate} samples per second."
        )
    lasts = float(piece.seconds(np.array([piece.length]))[0])
    if lasts > LONGEST:
        raise ValueError(
            f"the piece lasts {lasts / 3600:.1f} hours, at most {LONGEST // 3600} are "
            "written: check its tempos, or cut it."
        )
    midi = pretty_midi.PrettyMIDI()
    part = pretty_midi.Instrument(program=0)
    part.notes = [
        pretty_midi.Note(int(velocity), int(pitch), float(begin), float(end))
        for begin, end, pitch, velocity in zip(
            *times[:, heard], piece.pitch[heard], piece.velocity[heard], strict=True
        )
    ]
    midi.instruments.append(part)
    made = midi.synthesize(fs=sample_rate, wave=np.sin) * PEAK  # its peak is 1
    sound = np.zeros(max(round(lasts * sample_rate), 1))  # pretty_midi adds a second of silence
    sound[: len(made)] = made[: len(sound)]
    samples = np.round(sound * 32767).astype("<i2")
    out.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(out), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.tobytes())
    return {
        "seconds": len(samples) / sample_rate,
        "sample_rate": float(sample_rate),
        "notes": float(heard.sum()),
        "rms": float(np.sqrt(np.mean(sound**2))),
    }


def _check(out: str | Path, sample_rate: int) -> None:
    """ValueError where settings cannot be used."""
    if Path(out).suffix.lower() != ".wav":
        raise ValueError(f"out must end in .wav, got {str(out)!r}.")
    if not 8000 <= sample_rate <= 192000:
        raise ValueError(f"sample_rate must be between 8000 and 192000, got {sample_rate}.")
