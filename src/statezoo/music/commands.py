"""The ``statezoo music`` commands; they import torch only where they need it."""

from __future__ import annotations

from collections.abc import Callable

from statezoo.music.audio import render_file
from statezoo.music.bench import bench
from statezoo.music.evaluate import evaluate
from statezoo.music.pianoroll import plot_file
from statezoo.music.writing import continue_prompt, harmonise_melody, infill_song

__all__ = ["COMMANDS"]

COMMANDS: dict[str, Callable[..., None]] = {
    "music bench": bench,
    "music continue": continue_prompt,
    "music evaluate": evaluate,
    "music harmonise": harmonise_melody,
    "music infill": infill_song,
    "music plot": plot_file,
    "music render": render_file,
}
