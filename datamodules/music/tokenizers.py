"""Music to token ids and back: beat-based MIDI tokens, a four-voice grid, performance events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from statezoo.datamodules.music.base import GrammarState, MusicTokenizer
from statezoo.datamodules.music.midi import KINDS, MULTI_VOCABULARY, MidiState, MidiTokens
from statezoo.datamodules.music.performance import Performance, PerformanceState
from statezoo.datamodules.music.satb import SatbGrid, SatbState
from statezoo.datamodules.saved import TOKENS_FILE, place_of, read_state
from statezoo.datamodules.tokenizers import CONFIG_FILE, tokenizer_from_checkpoint
from statezoo.shipped import near, resolve

__all__ = [
    "ENCODINGS",
    "GrammarState",
    "MidiState",
    "MidiTokens",
    "MusicTokenizer",
    "Performance",
    "PerformanceState",
    "SatbGrid",
    "SatbState",
    "music_tokenizer",
    "music_tokenizer_from_state",
    "saved_music_tokenizer",
]

ENCODINGS = (*KINDS, SatbGrid.kind, Performance.kind)


def music_tokenizer(name: str, **settings: Any) -> MusicTokenizer:
    """The tokenizer of an encoding: ``remi``, ``tsd``, ``midilike``, ``satb`` or ``performance``.

    A folder with a saved tokenizer, the .ckpt of a run, or a model's name, gives that tokenizer.

    Args:
        name: What to make or load.
        settings: Those of ``MidiTokens`` or ``SatbGrid``.

    Raises:
        ValueError: If there is no such encoding, folder or checkpoint.
    """
    if name in KINDS or name.lower() in MULTI_VOCABULARY:
        return MidiTokens(name, **settings)
    if name == SatbGrid.kind:
        return SatbGrid(**settings)
    if name == Performance.kind:
        return Performance(**settings)
    path = Path(name)
    if path.suffix == ".ckpt" and path.is_file():
        found = tokenizer_from_checkpoint(path)
        if not isinstance(found, MusicTokenizer):
            raise ValueError(f"{path} was made with {found.kind} tokens, not with music.")
        return found
    place = resolve(name)
    if Path(place).is_dir() or place.count("/") == 1:
        try:
            file = place_of(place) / TOKENS_FILE
        except ValueError as error:
            raise ValueError(f"No music encoding {name!r}: {error}") from error
        if file.is_file():
            return music_tokenizer_from_state(read_state(file))
    raise ValueError(
        f"No music encoding {name!r}{near(name)}: use {', '.join(ENCODINGS)}, a folder with a "
        "saved tokenizer, the .ckpt of a run on music, or a model's name."
    )


def music_tokenizer_from_state(state: dict[str, str]) -> MusicTokenizer:
    """Rebuild a tokenizer from ``MusicTokenizer.state_dict()``.

    Raises:
        ValueError: If it is no music tokenizer, or its library would now give other ids.
    """
    found = saved_music_tokenizer(state)
    if found is None:
        kind = json.loads(state.get(CONFIG_FILE, "{}")).get("statezoo_kind")
        raise ValueError(
            f"The tokenizer is of kind {kind!r}, not one for music ({', '.join(ENCODINGS)})."
        )
    return found


def saved_music_tokenizer(state: dict[str, str]) -> MusicTokenizer | None:
    """The same, or None where it is no music tokenizer."""
    config = json.loads(state.get(CONFIG_FILE, "{}"))
    kind, settings = config.get("statezoo_kind"), config.get("statezoo_settings")
    if kind not in ENCODINGS or not isinstance(settings, dict):
        return None
    found = music_tokenizer(kind, **settings)
    found.check_names(state)
    return found
