"""What all music tokenizers share: names of tokens, saving, augmentation tables, a grammar."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.notes import Piece
from statezoo.datamodules.tokenizers import CONFIG_FILE, TOKENS_FILE, Encoded, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["BOS", "GrammarState", "Ids", "MusicTokenizer"]

BOS = "BOS_None"

Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


class GrammarState(Protocol):
    """Where a sequence of tokens stands; immutable, so that it can be kept and forked."""

    @property
    def tick(self) -> int:
        """Time reached, in ticks of a ``Piece``."""


class MusicTokenizer(Tokenizer):
    """Pieces to ids and back, one sequence per piece.

    As text, a sequence is the names of its tokens with spaces between: so a saved folder is an
    ordinary word-level tokenizer for ``transformers``.

    The grammar tells which tokens may come next, so that whatever is sampled under ``allowed``
    decodes to a piece of music::

        state = tokenizer.start()
        for _ in range(n):
            token = sample(logits.masked_fill(~tokenizer.allowed(state), -inf))
            state = tokenizer.advance(state, token)

    A piece may end after any token: ``decode_piece`` leaves out a note that is not complete.

    Attributes:
        names: Name of each id.
        unit: What the model's bits are counted per besides tokens: ``note`` or ``token``.
        pitch_of: ``[W]`` pitch of the tokens that transposition moves, -1 for all others.
        counts: ``[W]`` how many units each token stands for.
    """

    names: list[str]
    unit: str
    pitch_of: Ids
    counts: Ids

    @abstractmethod
    def encode_piece(self, piece: Piece) -> Ids:
        """``[T]`` ids of a piece, without BOS.

        Raises:
            ValueError: If the piece cannot be written in these tokens, with the reason.
        """

    @abstractmethod
    def decode_piece(self, ids: Iterable[int]) -> Piece:
        """The piece that ``ids`` stand for; BOS and what is not complete is left out."""

    @abstractmethod
    def start(self) -> Any:
        """The state before the first token of a piece."""

    @abstractmethod
    def advance(self, state: Any, token: int) -> Any:
        """The state after one more token, whether ``allowed`` or not."""

    @abstractmethod
    def allowed(self, state: Any) -> Mask:
        """``[W]`` which ids may come next; at least one."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments that rebuild the tokenizer, as JSON."""

    def table(self, semitones: int = 0, velocity: int = 0, tempo: float = 1.0) -> Ids:
        """``[W]`` the id that each id becomes in an augmented piece; drums stay what they are.

        Args:
            semitones: Transposition. A pitch that would leave the range stays: choose it so that
                none does.
            velocity: Change of velocity, in MIDI units; clipped to the range.
            tempo: The piece becomes so many times faster, as far as the tokens know of tempo.
        """
        found = np.arange(self.vocab_size)
        if semitones:
            for ids in self._pitch_tokens().values():
                places = {int(self.pitch_of[i]): int(i) for i in ids}
                for pitch, token in places.items():
                    found[token] = places.get(pitch + semitones, token)
        if velocity:
            self._change_velocity(found, velocity)
        if tempo != 1:
            self._change_tempo(found, tempo)
        return found

    def _pitch_tokens(self) -> dict[str, list[int]]:
        """The ids that transposition moves, by the kind of their event."""
        found: dict[str, list[int]] = {}
        for token in np.flatnonzero(self.pitch_of >= 0).tolist():
            found.setdefault(self.names[token].split("_")[0], []).append(token)
        return found

    def _change_velocity(self, table: Ids, velocity: int) -> None:
        """Enter the louder or softer tokens into ``table``."""

    def _change_tempo(self, table: Ids, tempo: float) -> None:
        """Enter the faster or slower tokens into ``table``."""

    def pitch_range(self, ids: Ids) -> tuple[int, int] | None:
        """Lowest and highest pitch that transposition moves; None where there is none."""
        pitches = self.pitch_of[ids]
        pitches = pitches[pitches >= 0]
        return (int(pitches.min()), int(pitches.max())) if len(pitches) else None

    def encode_document(self, text: bytes) -> Encoded:
        """Ids of names with spaces between.

        Raises:
            ValueError: If a word is not the name of a token.
        """
        known = {name: token for token, name in enumerate(self.names)}
        words = text.decode("utf-8").split()
        unknown = next((word for word in words if word not in known), None)
        if unknown is not None:
            raise ValueError(
                f"{unknown!r} is not a token of {self.kind}: write names such as "
                f"{' '.join(self.names[1:4])}, or give a .mid file."
            )
        return np.array([known[word] for word in words], dtype=self.dtype), None

    def decode(self, ids: Iterable[int]) -> str:
        """The names of ``ids`` with spaces between; ids out of range are left out."""
        return " ".join(self.names[i] for i in map(int, ids) if 0 <= i < len(self.names))

    def backend(self) -> Backend:
        """Names as words."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers

        vocab = {name: token for token, name in enumerate(self.names)}
        backend = Backend(models.WordLevel(vocab=vocab, unk_token=self.names[self.bos_id]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return backend

    def _special(self) -> dict[str, Any]:
        name = self.names[self.bos_id]
        return {"bos_token": name, "unk_token": name, "statezoo_settings": self.settings()}

    def check_names(self, state: dict[str, str]) -> None:
        """Check that the ids are those of a saved tokenizer.

        Raises:
            ValueError: If they are not, because the tokenizer's library changed.
        """
        vocab = json.loads(state[TOKENS_FILE])["model"]["vocab"]
        if vocab != {name: token for token, name in enumerate(self.names)}:
            raise ValueError(
                f"The saved tokenizer ({self.kind}, {len(vocab)} ids) and the one that this "
                f"installation makes of its settings ({self.vocab_size} ids) differ: install the "
                f"miditok version it was made with ({CONFIG_FILE})."
            )
