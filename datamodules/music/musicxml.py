"""MusicXML, plain or packed (.mxl), read with the standard library alone.

Repeats are not played out, grace and cue notes are left out, ties are joined.
"""

from __future__ import annotations

import io
import zipfile
from math import gcd
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo

__all__ = ["read_musicxml", "unpack"]

LARGEST = 1 << 26  # bytes of one score; a larger one is a packed bomb
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
LEFT_OUT = {"grace", "cue"}
LOUDNESS = 80


class _Note(NamedTuple):
    measure: int
    offset: float  # ticks from the begin of the measure
    size: float
    pitch: int
    begins_tie: bool
    ends_tie: bool


class _Part:
    """One part of the score, measure by measure."""

    def __init__(self, element: ElementTree.Element) -> None:
        self.notes: list[_Note] = []
        self.lengths: list[float] = []
        self.meters: list[tuple[int, int] | None] = []
        self.tempos: list[tuple[int, float, float]] = []
        self.divisions, self.transpose = 1.0, 0
        for number, measure in enumerate(element.iter("measure")):
            self.meters.append(None)
            self.lengths.append(self._measure(number, measure))

    def _measure(self, number: int, measure: ElementTree.Element) -> float:
        place = start = furthest = 0.0
        for child in measure:
            tag = child.tag
            if tag == "note":
                inside = {item.tag: item for item in child}
                size = self._ticks(child)
                if "chord" not in inside:
                    start, place = place, place + size
                if size > 0 and "pitch" in inside and inside.keys().isdisjoint(LEFT_OUT):
                    ties = [t.get("type") for t in child if t.tag == "tie"]
                    key = self._key(inside["pitch"])
                    if 0 <= key < 128:
                        at = (number, start, size)
                        self.notes.append(_Note(*at, key, "start" in ties, "stop" in ties))
            elif tag == "backup":
                place -= self._ticks(child)
            elif tag == "forward":
                place += self._ticks(child)
            elif tag == "attributes":
                self._attributes(child)
            elif tag in ("direction", "sound"):
                sound = child if tag == "sound" else child.find("sound")
                if sound is not None and sound.get("tempo"):
                    self.tempos.append((number, place, float(sound.get("tempo", ""))))
            furthest = max(furthest, place)
        return furthest

    def _ticks(self, element: ElementTree.Element) -> float:
        text = element.findtext("duration")
        return float(text) * TPQ / self.divisions if text else 0.0

    def _key(self, pitch: ElementTree.Element) -> int:
        octave = int(pitch.findtext("octave", "4"))
        alter = round(float(pitch.findtext("alter") or 0))
        return 12 * (octave + 1) + STEPS[pitch.findtext("step", "C")] + alter + self.transpose

    def _attributes(self, element: ElementTree.Element) -> None:
        divisions = element.findtext("divisions")
        if divisions:
            self.divisions = float(divisions)
        beats, unit = element.findtext("time/beats"), element.findtext("time/beat-type")
        if beats and unit:
            self.meters[-1] = (sum(int(part) for part in beats.split("+")), int(unit))
        transpose = element.find("transpose")
        if transpose is not None:
            octaves = int(transpose.findtext("octave-change") or 0)
            self.transpose = int(float(transpose.findtext("chromatic") or 0)) + 12 * octaves

    def rows(self, starts: list[float], track: int) -> list[list[int]]:
        """Onset, duration, pitch, velocity and track of each note, ties joined."""
        found: list[list[float]] = []
        tied: dict[int, int] = {}
        for note in self.notes:
            begin = starts[note.measure] + note.offset
            before = tied.pop(note.pitch, None) if note.ends_tie else None
            if before is not None and abs(sum(found[before][:2]) - begin) < 1:
                found[before][1] += note.size
            else:
                before = len(found)
                found.append([begin, note.size, note.pitch])
            if note.begins_tie:
                tied[note.pitch] = before
        rows = []
        for begin, size, pitch in found:
            onset, end = round(begin), round(begin + size)
            rows.append([onset, max(end - onset, 1), int(pitch), LOUDNESS, track])
        return rows


def unpack(data: bytes) -> bytes:
    """The score in an .mxl file.

    Raises:
        ValueError: If there is none, or it is larger than 64 MiB.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            inside = [name for name in names if not name.startswith("META-INF")]
            scores = [name for name in inside if name.lower().endswith((".xml", ".musicxml"))]
            if "META-INF/container.xml" in names:
                container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
                paths = [e.get("full-path", "") for e in container.iter() if e.get("full-path")]
                scores = [path for path in paths if path in names][:1] or scores
            if not scores:
                raise ValueError("a packed file without a score")
            if archive.getinfo(scores[0]).file_size > LARGEST:
                raise ValueError(f"its score is larger than {LARGEST >> 20} MiB")
            return archive.read(scores[0])
    except (zipfile.BadZipFile, ElementTree.ParseError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"not a whole .mxl file ({error})") from error


def read_musicxml(data: bytes) -> Piece:
    """The piece in a partwise MusicXML score; one track for each part.

    Raises:
        ValueError: If it is not one.
    """
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML ({error})") from error
    if root.tag != "score-partwise":
        raise ValueError(f"not a partwise MusicXML score: its root is <{root.tag}>")
    try:
        parts = [_Part(element) for element in root.findall("part")]
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"its MusicXML has a value that cannot be read ({error})") from error
    count = max((len(part.lengths) for part in parts), default=0)
    lengths = [
        max(part.lengths[n] if n < len(part.lengths) else 0.0 for part in parts)
        for n in range(count)
    ]
    starts = np.concatenate([[0.0], np.cumsum(lengths)]).tolist()
    infos = _players(root)
    tracks: list[TrackInfo] = []
    rows: list[list[int]] = []
    for element, part in zip(root.findall("part"), parts, strict=True):
        found = part.rows(starts, len(tracks))
        if found:
            tracks.append(infos.get(element.get("id", ""), TrackInfo()))
            rows += found
    tempos = sorted({round(starts[n] + at): qpm for p in parts for n, at, qpm in p.tempos}.items())
    return Piece(
        tuple(tracks),
        np.array(rows, dtype=np.int64).reshape(-1, 5),
        tuple(tempos),
        _meters(parts, lengths, starts),
        length=round(starts[-1]),
    )


def _players(root: ElementTree.Element) -> dict[str, TrackInfo]:
    """Name and program of each part."""
    found = {}
    for part in root.iter("score-part"):
        program = part.findtext("midi-instrument/midi-program")
        number = min(max(int(program) - 1, 0), 127) if program and program.isdigit() else 0
        name = " ".join(part.findtext("part-name", "").split())
        found[part.get("id", "")] = TrackInfo(name, number)
    return found


def _meters(
    parts: list[_Part], lengths: list[float], starts: list[float]
) -> tuple[tuple[int, int, int], ...]:
    """Time signatures, with one of their own for upbeats and other bars of another length.

    A bar that is cut in two, as at a repeat in its middle, stays one bar.
    """
    meter = (4, 4)
    found: list[tuple[int, int, int]] = []
    halves = False
    for n, length in enumerate(lengths):
        written = next((p.meters[n] for p in parts if n < len(p.meters) and p.meters[n]), None)
        meter = written or meter
        full = 4 * TPQ * meter[0] / meter[1]
        here = meter
        if halves:
            halves = False
        elif 0 < length < full and n and n + 1 < len(lengths) and length + lengths[n + 1] == full:
            halves = True
        elif 0 < length != full and length * 4 % TPQ == 0 and n + 1 < len(lengths):
            sixteenths = int(length * 4 / TPQ)
            part = gcd(sixteenths, 16 // max(meter[1], 4))
            here = (sixteenths // part, 16 // part)
        if not found or found[-1][1:] != here:
            found.append((round(starts[n]), *here))
    return tuple(found)
