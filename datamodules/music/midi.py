"""Beat-based MIDI tokens of the miditok library: REMI, TSD and MIDI-Like."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from statezoo.datamodules.music.base import BOS, Ids, Mask, MusicTokenizer
from statezoo.datamodules.music.notes import TPQ, Piece, TrackInfo, quiet, require

__all__ = ["KINDS", "MULTI_VOCABULARY", "MidiState", "MidiTokens"]

KINDS = {"remi": "REMI", "tsd": "TSD", "midilike": "MIDILike"}
MULTI_VOCABULARY = ("octuple", "cpword", "cp_word", "mumidi")
METERS = {2: [2, 3, 4], 4: [1, 2, 3, 4, 5, 6, 7], 8: [1, 2, 3, 4, 5, 6, 7, 9, 12]}
ONSETS = ("Pitch", "PitchDrum", "NoteOn", "DrumOn")
ENDS = {"NoteOff": "NoteOn", "DrumOff": "DrumOn"}


class MidiState(NamedTuple):
    """Where a sequence stands.

    Attributes:
        last: Kind of the token before: ``Bar``, ``Pitch``, ...; empty at the beginning.
        tick: Time reached.
        bar: Bars begun (REMI).
        bar_tick: Begin of this bar (REMI).
        place: Position in this bar, -1 before the first (REMI).
        meter: Numerator and denominator of the last time signature.
        program: Last program, -1 for drums.
        pitch: Last pitch that began at this time in this program, -1 if none.
        active: Program, pitch and begin of the notes that sound (MIDI-Like).
    """

    last: str = ""
    tick: int = 0
    bar: int = 0
    bar_tick: int = 0
    place: int = -1
    meter: tuple[int, int] = (4, 4)
    program: int = 0
    pitch: int = -1
    active: tuple[tuple[int, int, int], ...] = ()


class MidiTokens(MusicTokenizer):
    """A piece as one sequence of miditok's events, with time signatures, on a grid of 32nds.

    Args:
        kind: ``remi``, ``tsd`` or ``midilike``.
        programs: Name the instrument before each note, drums with events of their own. Otherwise
            all tracks become one and drums are left out.
        velocities: Levels of loudness, 0 to leave it out.
        tempos: Levels of tempo, 0 to leave it out; a decoded piece then has 120 quarters a minute.
        bpe: What ``train`` learnt, as ``settings`` gives it.

    Raises:
        ValueError: If the kind is another one, or miditok is missing.

    Source: Fradet et al., MidiTok, arXiv:2310.17202; REMI: Huang and Yang, arXiv:2002.00212.
    """

    unit = "note"

    def __init__(
        self,
        kind: str = "remi",
        *,
        programs: bool = False,
        velocities: int = 16,
        tempos: int = 0,
        bpe: dict[str, Any] | None = None,
    ) -> None:
        if kind.lower() in MULTI_VOCABULARY:
            raise ValueError(
                f"{kind} has several vocabularies, one for each field of a note, and the models "
                "here have one head: use remi, tsd or midilike."
            )
        if kind not in KINDS:
            raise ValueError(f"MidiTokens needs kind remi, tsd or midilike, got {kind!r}.")
        require("miditok", f"The encoding {kind}")
        self.kind, self.programs = kind, programs
        self.velocities, self.tempos = velocities, tempos
        self.bpe = bpe
        self._miditok = _miditok(KINDS[kind], programs, velocities, tempos, bpe)
        self._per_quarter = int(self._miditok.time_division)
        base = self._miditok.vocab
        self._base = sorted(base, key=lambda name: int(base[name]))
        self._type = [name.partition("_")[0] for name in self._base]
        self._value = [name.partition("_")[2] for name in self._base]
        self._parts = self._expand()
        joined = ("+".join(self._base[i] for i in parts) for parts in self._parts)
        self.names = [name or f"Unused_{token}" for token, name in enumerate(joined)]
        self.vocab_size = len(self.names)
        self.bos_id = self._base.index(BOS)
        moves = [kind in ("Pitch", "NoteOn", "NoteOff") for kind in self._type]
        pitches = [int(v) if move else -1 for v, move in zip(self._value, moves, strict=True)]
        self.pitch_of = np.full(self.vocab_size, -1)
        if bpe is None:
            self.pitch_of[:] = pitches
        onset = [kind in ONSETS for kind in self._type]
        self.counts = np.array([sum(onset[i] for i in parts) for parts in self._parts])
        self._prepare_grammar()

    def settings(self) -> dict[str, Any]:
        """Arguments that rebuild it."""
        fixed = {"programs": self.programs, "velocities": self.velocities, "tempos": self.tempos}
        return fixed | ({} if self.bpe is None else {"bpe": self.bpe})

    def train(self, pieces: Sequence[Piece], vocab_size: int) -> MidiTokens:
        """The same tokens with frequent sequences of them merged (byte-pair encoding).

        Raises:
            ValueError: If ``vocab_size`` leaves no room for merges, or there are merges already.
        """
        if self.bpe is not None or vocab_size <= self.vocab_size:
            raise ValueError(
                f"Training needs a tokenizer without merges and a vocab_size above its "
                f"{self.vocab_size} ids, got {'one with' if self.bpe else 'one without'} merges "
                f"and vocab_size={vocab_size}."
            )
        plain = _miditok(KINDS[self.kind], self.programs, self.velocities, self.tempos, None)
        chars = {i: plain._vocab_base_id_to_byte[i] for i in range(len(self._base))}
        texts = ["".join(chars[i] for i in self.encode_piece(piece).tolist()) for piece in pieces]
        with quiet():
            plain.train(vocab_size=vocab_size, model="BPE", iterator=[[text] for text in texts])
        found = plain.to_dict()
        bpe = {key: found[key] for key in ("_vocab_base", "_model", "_vocab_base_byte_to_token")}
        return MidiTokens(
            self.kind,
            programs=self.programs,
            velocities=self.velocities,
            tempos=self.tempos,
            bpe=bpe,
        )

    def encode_piece(self, piece: Piece) -> Ids:
        """``[T]`` ids; times go to the nearest point of the grid.

        Raises:
            ValueError: If nothing is left without drums, where programs are left out.
        """
        notes = piece.notes.copy() if self.programs else piece.notes[~piece.drums].copy()
        if not len(notes):
            raise ValueError("has nothing but drums, which need tokens with programs")
        players = [(t.is_drum, 0 if t.is_drum else t.program) for t in piece.tracks]
        players = players if self.programs else [(False, 0)] * len(players)
        distinct = sorted(set(players))
        notes[:, 4] = np.array([distinct.index(player) for player in players])[notes[:, 4]]
        tracks = tuple(TrackInfo("", program, drum) for drum, program in distinct)
        merged = Piece(tracks, notes, piece.tempos, piece.time_signatures)
        found = self._miditok.encode(merged.to_score())
        sequence = found if self.programs else found[0]
        return np.array(sequence.ids, dtype=np.int64)

    def decode_piece(self, ids: Iterable[int]) -> Piece:
        """One track for each program; notes that are not ended last to the end."""
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i != self.bos_id]
        if not known:
            return Piece((), np.zeros((0, 5), dtype=np.int64))
        base = list(chain.from_iterable(self._parts[i] for i in known))
        if self.kind == "midilike":
            base += self._closing(base)
        sequence = base if self.programs else [base]
        return Piece.from_score(self._decode(sequence))

    def _decode(self, ids: list[Any]) -> Any:
        from miditok import TokSequence  # type: ignore[import-untyped]

        rows = [ids] if self.programs else ids
        names = [TokSequence(tokens=[self._base[i] for i in row], ids=row) for row in rows]
        return self._miditok._tokens_to_score(names[0] if self.programs else names)

    def _closing(self, ids: list[int]) -> list[int]:
        """Note-offs, after the shortest shift, for what still sounds."""
        state = self.start()
        for token in ids:
            state = self._step(state, token)
        if not state.active:
            return []
        found = [self._type.index("TimeShift")]
        for program, pitch, _ in state.active:
            found += [self._base.index(f"Program_{program}")] if self.programs else []
            kind = "DrumOff" if program == -1 and self.programs else "NoteOff"
            found.append(self._base.index(f"{kind}_{pitch}"))
        return found

    def _expand(self) -> list[list[int]]:
        """The events that each id stands for; one each without merges."""
        if self.bpe is None:
            return [[i] for i in range(len(self._base))]
        from miditok import TokSequence

        parts = []
        for token in range(len(self._miditok)):
            sequence = TokSequence(ids=[token], are_ids_encoded=True)
            self._miditok.decode_token_ids(sequence)
            parts.append(list(sequence.ids))
        return parts

    # The grammar: miditok's graph of token kinds, narrowed by time, pitch order and what sounds.

    def _prepare_grammar(self) -> None:
        graph = {kind: set(after) for kind, after in self._miditok.tokens_types_graph.items()}
        graph[""] = {"Bar"} if self.kind == "remi" else {"TimeSig"}
        if self.kind == "remi":
            graph["TimeSig"] = {"Bar", "Position"}
        kinds = np.array(self._type)
        self._after = {
            kind: np.isin(kinds, sorted(after - {"PAD", "BOS"})) for kind, after in graph.items()
        }
        self._after["Rest"] = self._after.get("TimeShift", self._after[""])
        self._of = {kind: np.flatnonzero(kinds == kind) for kind in set(self._type)}
        self._number = np.array([int(v) if v.lstrip("-").isdigit() else 0 for v in self._value])

    def start(self) -> MidiState:
        """The state before the first token."""
        return MidiState()

    def advance(self, state: MidiState, token: int) -> MidiState:
        """The state after one more token."""
        for part in self._parts[token]:
            state = self._step(state, part)
        return state

    def _step(self, state: MidiState, token: int) -> MidiState:
        kind, value = self._type[token], self._value[token]
        new = state._replace(last=kind)
        if kind == "Bar":
            start = state.bar_tick + self._bar(state.meter) if state.bar else 0
            return new._replace(tick=start, bar=state.bar + 1, bar_tick=start, place=-1, pitch=-1)
        if kind == "TimeSig":
            numerator, _, denominator = value.partition("/")
            return new._replace(meter=(int(numerator), int(denominator)))
        if kind == "Position":
            tick = state.bar_tick + int(value) * self._unit(state.meter)
            return new._replace(tick=tick, place=int(value), pitch=-1)
        if kind == "TimeShift":
            return new._replace(tick=state.tick + self._ticks(value, state.meter), pitch=-1)
        if kind == "Program":
            pitch = state.pitch if int(value) == state.program else -1
            return new._replace(program=int(value), pitch=pitch)
        if kind in ("Pitch", "PitchDrum"):
            return new._replace(pitch=int(value))
        if kind in ("NoteOn", "DrumOn"):
            note = (state.program, int(value), state.tick)
            return new._replace(pitch=int(value), active=(*state.active, note))
        if kind in ENDS:
            key = (state.program, int(value))
            ended = next((n for n in state.active if n[:2] == key), None)
            return new._replace(active=tuple(n for n in state.active if n is not ended))
        return state if kind in ("BOS", "PAD") else new

    def _unit(self, meter: tuple[int, int]) -> int:
        """Ticks per position."""
        return 4 * TPQ // meter[1] // int(self._miditok.config.max_num_pos_per_beat)

    def _bar(self, meter: tuple[int, int]) -> int:
        """Ticks per bar."""
        return 4 * TPQ * meter[0] // meter[1]

    def _ticks(self, value: str, meter: tuple[int, int]) -> int:
        """Ticks of a duration, which miditok writes as beats, positions and their resolution."""
        per_beat = self._miditok._tpb_per_ts[meter[1]]
        found: int = self._miditok._tpb_tokens_to_ticks[per_beat][value]
        return found * TPQ // self._per_quarter

    def allowed(self, state: MidiState) -> Mask:
        """Tokens in the order of miditok's, notes of one time and program from low to high."""
        base = self._allowed(state)
        if self.bpe is None:
            return base
        mask = np.zeros(self.vocab_size, dtype=bool)
        for token, parts in enumerate(self._parts):
            here = state
            if not parts or not base[parts[0]]:
                continue
            for part, after in zip(parts, [*parts[1:], None], strict=True):
                here = self._step(here, part)
                if after is None:
                    mask[token] = True
                elif not self._allowed(here)[after]:
                    break
        return mask

    def _allowed(self, state: MidiState) -> Mask:
        mask = self._after[state.last].copy()
        if self.kind == "remi" and state.last != "":
            positions = self._of["Position"]
            count = self._bar(state.meter) // self._unit(state.meter)
            place = self._number[positions]
            mask[positions] &= (place > state.place) & (place < count)
        if state.last in ("Velocity", "Duration", *ONSETS):
            self._order_notes(mask, state)
        if state.last == "Program":
            for kind in ("Pitch", "NoteOn", "NoteOff"):
                self._only(mask, kind, state.program >= 0)
            for kind in ("PitchDrum", "DrumOn", "DrumOff"):
                self._only(mask, kind, state.program == -1)
            self._order_notes(mask, state)
        if self.kind != "remi" and state.last and "TimeSig" in self._of:
            signatures = self._of["TimeSig"]
            same = [self._value[i] == f"{state.meter[0]}/{state.meter[1]}" for i in signatures]
            mask[signatures] &= (state.last == "TimeShift") & ~np.array(same)
        if self.kind == "midilike":
            self._end_only_what_sounds(mask, state)
        return mask

    def _only(self, mask: Mask, kind: str, condition: bool) -> None:
        if kind in self._of:
            mask[self._of[kind]] &= condition

    def _order_notes(self, mask: Mask, state: MidiState) -> None:
        for kind in ONSETS:
            if kind in self._of:
                ids = self._of[kind]
                mask[ids] &= self._number[ids] > state.pitch

    def _end_only_what_sounds(self, mask: Mask, state: MidiState) -> None:
        mine = [(p, tick) for program, p, tick in state.active if program == state.program]
        free = np.ones(128, dtype=bool)
        free[[pitch for pitch, _ in mine]] = False
        ending = np.zeros(128, dtype=bool)
        ending[[pitch for pitch, tick in mine if tick < state.tick]] = True
        if self.programs and state.last != "Program":
            ending[:] = False  # the program comes first
        for end, begin in ENDS.items():
            if end in self._of:
                mask[self._of[end]] &= ending[self._number[self._of[end]]]
                mask[self._of[begin]] &= free[self._number[self._of[begin]]]

    def _change_velocity(self, table: Ids, velocity: int) -> None:
        self._move(table, "Velocity", lambda level: level + velocity)

    def _change_tempo(self, table: Ids, tempo: float) -> None:
        self._move(table, "Tempo", lambda level: level * tempo)

    def _move(self, table: Ids, kind: str, change: Any) -> None:
        """Send each token of ``kind`` to the one nearest to its changed value."""
        if self.bpe is not None or kind not in self._of:
            return
        ids = self._of[kind]
        values = np.array([float(self._value[i]) for i in ids])
        table[ids] = ids[np.abs(change(values)[:, None] - values).argmin(axis=1)]


def _miditok(name: str, programs: bool, velocities: int, tempos: int, bpe: Any) -> Any:
    """The library's own tokenizer, all tracks in one sequence."""
    import miditok

    config = miditok.TokenizerConfig(
        pitch_range=(0, 127),
        drums_pitch_range=(0, 127),
        num_velocities=max(velocities, 1),
        special_tokens=["BOS"],
        encode_ids_split="no",
        use_velocities=velocities > 0,
        use_tempos=tempos > 0,
        num_tempos=max(tempos, 1),
        use_time_signatures=True,
        time_signature_range=METERS,
        use_programs=programs,
        one_token_stream_for_programs=programs,
        use_pitchdrum_tokens=programs,
    )
    kind = getattr(miditok, name)
    if bpe is None:
        return kind(config)
    params = kind(config).to_dict() | bpe
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps(params), encoding="utf-8")
        return kind(params=file)
