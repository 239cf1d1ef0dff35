"""``statezoo music continue``, ``statezoo music infill`` and ``statezoo music harmonise``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

__all__ = ["continue_prompt", "harmonise_melody", "infill_song"]


def continue_prompt(
    *,
    model: str,
    prompt: str,
    out_dir: str,
    prompt_bars: int = 4,
    bars: int = 16,
    n: int = 4,
    seed: int = 0,
    temperature: float = 0.95,
    top_p: float = 0.95,
    programs: str = "",
    pitch_range: str = "",
    wav: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Write bars that go on from the first bars of a file: 1.mid, 1.png and so on.

    Args:
        model: Checkpoint, folder of a run, exported folder, Hub or short name, trained on Music.
        prompt: MIDI, MusicXML or ABC file; its notes are kept as they are.
        out_dir: Folder for the .mid files, piano rolls and their numbers.
        prompt_bars: Bars of the file to go on from.
        bars: Bars to add.
        n: Number of continuations.
        seed: The same seed gives the same files.
        temperature: 0 takes the likeliest token, 1 draws from the model's probabilities.
        top_p: Draw from the likeliest tokens that have this much probability together.
        programs: Instruments that may play on, such as 0,32; -1 are drums. Default: those
            of the bars that are kept.
        pitch_range: Lowest and highest new pitch, such as 36:84. Default: all.
        wav: Write sound, too.
        overwrite: Replace files that are there.
        device: Where to run: cpu, cuda, mps.
    """
    allowed = _numbers(programs, ",", "programs", "0,32")
    pitches = _numbers(pitch_range, ":", "pitch_range", "36:84")
    if pitches is not None and (len(pitches) != 2 or pitches[0] > pitches[1]):
        raise ValueError(f"pitch_range is written 36:84, lowest first, got {pitch_range!r}.")
    endings = ["mid", "png", "json", *(["wav"] if wav else [])]
    names = [f"{number}.{ending}" for number in range(1, n + 1) for ending in endings]
    folder = _prepare(out_dir, names, overwrite)
    from statezoo.datamodules.music.notes import TPQ, Piece
    from statezoo.music.audio import render
    from statezoo.music.continuation import continue_piece
    from statezoo.music.decoding import Sampling
    from statezoo.music.pianoroll import plot

    scores = continue_piece(
        model,
        prompt,
        prompt_bars=prompt_bars,
        bars=bars,
        n=n,
        sampling=Sampling(temperature, top_p, seed=seed),
        programs=allowed,
        pitch_range=None if pitches is None else (pitches[0], pitches[1]),
        device=device,
    )
    for number, score in enumerate(scores, start=1):
        file = folder / f"{number}.mid"
        score.dump_midi(str(file))
        title = f"{Path(prompt).name}: {prompt_bars} bars, and {bars} new ones (seed {seed})"
        piece = replace(Piece.from_score(score), length=score.end() * TPQ // score.tpq)
        drawn = plot(piece, file.with_suffix(".png"), prompt_bars=prompt_bars, title=title)
        if wav:
            render(piece, file.with_suffix(".wav"))
        new = sum(drawn["per_bar"][prompt_bars:])
        sys.stdout.write(f"wrote {file}: {new} new notes in {bars} bars\n")


def _numbers(text: str, separator: str, name: str, example: str) -> list[int] | None:
    """Whole numbers, as users list them; None for nothing."""
    try:
        return [int(part) for part in text.split(separator)] if text.strip() else None
    except ValueError as error:
        raise ValueError(f"{name} is written {example}, got {text!r}.") from error


def _prepare(out_dir: str, names: Sequence[str], overwrite: bool) -> Path:
    """Make a folder that can be written; ValueError where files would be lost."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {out_dir}: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write to the folder {out_dir}.")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"{out_dir} has {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}: choose "
            "another --out-dir, or pass --overwrite."
        )
    return folder


def harmonise_melody(
    *,
    model: str,
    melody: str = "",
    out: str = "",
    voices: str = "SATB",
    n: int = 8,
    seed: int = 0,
    temperature: float = 0.95,
    top_p: float = 0.95,
    evaluate: str = "",
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Write alto, tenor and bass below a melody, or measure how well a model does.

    Args:
        model: Checkpoint, folder of a run, exported folder, Hub or short name, with satb tokens.
        melody: MIDI, MusicXML or ABC file with the soprano alone; kept as it is.
        out: MIDI file to write.
        voices: SATB, the four voices that these models know.
        n: Settings to draw; the likeliest is written.
        seed: The same seed gives the same file.
        temperature: 0 takes the likeliest token, 1 draws from the model's probabilities.
        top_p: Draw from the likeliest tokens that have this much probability together.
        evaluate: Instead: chorales, as --data.path of Music takes them. Prints nats per token of
            alto, tenor and bass in the test split (else the validation split) beside what
            frequencies and Markov chains of the training split need.
        overwrite: Replace a file that is there.
        device: Where to run: cpu, cuda, mps.
    """
    if voices.upper() != "SATB":
        raise ValueError(f"voices can be SATB alone, which these models know; got {voices!r}.")
    if bool(evaluate) == bool(melody) or bool(melody) != bool(out):
        raise ValueError("music harmonise needs --melody and --out, or --evaluate.")
    from statezoo.music.decoding import Sampling
    from statezoo.music.harmony import evaluate_harmony, harmonise

    if evaluate:
        scores = evaluate_harmony(model, evaluate, device=device)
        sys.stdout.write(
            "nats per token of alto, tenor and bass given the soprano, "
            f"{scores['pieces']} pieces of {scores['split']}\n"
        )
        for name in ("model", "unigram", "markov"):
            sys.stdout.write(f"  {name:8} {scores[name]:.4f}\n")
        return
    _check_out(out, overwrite)
    sampling = Sampling(temperature, top_p, seed=seed)
    found = harmonise(model, melody, n=n, sampling=sampling, device=device)
    found.dump_midi(out)
    sys.stdout.write(f"wrote {out}: {sum(len(track.notes) for track in found.tracks)} notes\n")


def _check_out(out: str, overwrite: bool) -> None:
    """ValueError where a file would be lost, or there is no folder for it."""
    place = Path(out)
    if place.exists() and not overwrite:
        raise ValueError(f"{out} is there already: choose another --out, or pass --overwrite.")
    if not place.parent.is_dir():
        raise ValueError(f"there is no folder {place.parent} to write {place.name} to.")


def infill_song(
    *,
    model: str,
    input: str,
    tracks: str,
    bars: str,
    out: str,
    n: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 0.95,
    overwrite: bool = False,
    device: str = "cpu",
) -> None:
    """Write some bars of some tracks anew; all other notes stay as they are in the file.

    Args:
        model: Checkpoint, folder of a run, exported folder, Hub or short name, trained on Music.
        input: MIDI, MusicXML or ABC file; four voices for a model with satb tokens.
        tracks: Tracks to write, by number from 1 or by name, such as 1,Bass.
        bars: First and last bar to write, counted from 1, such as 9:12.
        out: MIDI file to write.
        n: Candidates to draw; the likeliest is written.
        seed: The same seed gives the same file.
        temperature: 0 takes the likeliest token, 1 draws from the model's probabilities.
        top_p: Draw from the likeliest tokens that have this much probability together.
        overwrite: Replace a file that is there.
        device: Where to run: cpu, cuda, mps.
    """
    _check_out(out, overwrite)
    from statezoo.music.continuation import open_score
    from statezoo.music.decoding import Sampling
    from statezoo.music.infilling import infill

    sampling = Sampling(temperature, top_p, seed=seed)
    given = open_score(input)
    found = infill(model, given, tracks=tracks, bars=bars, n=n, sampling=sampling, device=device)
    found.dump_midi(out)
    before, after = (sum(len(track.notes) for track in s.tracks) for s in (given, found))
    sys.stdout.write(f"wrote {out}: {after} notes, {before} before\n")
