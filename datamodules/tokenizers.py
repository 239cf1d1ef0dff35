"""Text to token ids and back: bytes, characters, or any ``tokenizers`` file.

Each tokenizer also says how many bytes every token stands for, with a sum that is exact, so that
models with different vocabularies compare in bits per byte. Saved folders are ordinary
``transformers`` tokenizers: ``AutoTokenizer.from_pretrained`` reads all three kinds.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.saved import TOKENS_FILE, fast_tokenizer, place_of, read_state
from statezoo.shipped import near

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = [
    "BPE",
    "TOKENS_FILE",
    "Bytes",
    "Characters",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_state",
    "train_bpe",
]

CONFIG_FILE = "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"

Encoded = tuple[NDArray[Any], NDArray[np.uint32] | None]


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: Name under which it is saved.
        vocab_size: Number of ids.
        bos_id: Id that a model reads before the first token of a document. It is never a target.
        dtype: Smallest unsigned type that holds every id.
    """

    kind: str
    vocab_size: int
    bos_id: int

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Type in which ids are stored."""
        sizes = ((1 << 8, np.uint8), (1 << 16, np.uint16))
        return next((kind for size, kind in sizes if self.vocab_size <= size), np.uint32)

    @property
    def fingerprint(self) -> str:
        """Hash that changes whenever some text would get other ids."""
        return hashlib.sha256(json.dumps(self.state_dict(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens."""
        ids: list[int] = self.encode_document(text.encode("utf-8", "surrogatepass"))[0].tolist()
        return ids

    @abstractmethod
    def encode_document(self, text: bytes) -> Encoded:
        """Ids of UTF-8 ``text`` and the bytes each stands for (None: one each)."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; what is no text becomes U+FFFD, ids out of range are left out."""

    @abstractmethod
    def backend(self) -> Backend:
        """The same mapping as a ``tokenizers`` object."""

    def state_dict(self) -> dict[str, str]:
        """Everything needed to rebuild it, as file names and JSON texts."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "statezoo_kind": self.kind}
        config |= {"clean_up_tokenization_spaces": False, **self._special()}  # type: ignore[dict-item]
        return {CONFIG_FILE: json.dumps(config, indent=2), TOKENS_FILE: self.backend().to_str()}

    def _special(self) -> dict[str, Any]:
        """Further entries of the saved configuration."""
        return {}

    def save(self, folder: str | Path) -> None:
        """Write the files that ``load_tokenizer`` and ``AutoTokenizer`` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.state_dict().items():
            (folder / name).write_text(text, encoding="utf-8")


def text_blocks(text: str, size: int = 1 << 20) -> Iterator[str]:
    """``text`` in parts of bounded length, ended where a line or at least a word does.

    The library needs some hundred bytes of memory per token while it encodes a part.
    """
    start = 0
    while len(text) - start > size:
        near, far = start + size // 2, start + size
        cut = text.rfind("\n", near, far) + 1 or max(text.rfind(" ", near, far), 0) or far
        yield text[start:cut]
        start = cut
    yield text[start:]


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in set(printable))
    symbols = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    return [symbols[b] for b in range(256)]


class Bytes(Tokenizer):
    """UTF-8 bytes as ids 0 to 255; a document begins as if after a line feed."""

    kind = "bytes"
    vocab_size = 256
    bos_id = 10

    def encode_document(self, text: bytes) -> Encoded:
        """Ids of UTF-8 ``text``; every token is one byte."""
        return np.frombuffer(text, dtype=np.uint8), None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; what is no UTF-8 becomes U+FFFD."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", "replace")

    def backend(self) -> Backend:
        """Byte-level BPE without merges, whose ids are the byte values."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        vocab = {symbol: value for value, symbol in enumerate(_byte_symbols())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return backend


class Characters(Tokenizer):
    """One id per distinct character; id 0 stands for all others and begins each document.

    Args:
        alphabet: The characters, in the order of their ids from 1 on.
    """

    kind = "characters"
    bos_id = 0
    unknown = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, alphabet: str) -> None:
        points = dict.fromkeys(alphabet.replace(self.unknown, ""))
        self.alphabet = "".join(points)
        self.vocab_size = 1 + len(points)
        self._sorted = np.sort(np.array([ord(c) for c in points], dtype=np.uint32))
        ids = {ord(c): n for n, c in enumerate(points, start=1)}
        self._ids = np.array([ids[point] for point in self._sorted.tolist()], dtype=self.dtype)

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> Characters:
        """The characters that occur in UTF-8 ``texts``, in code point order."""
        found: set[str] = set()
        for text in texts:
            found.update(text.decode("utf-8"))
        return cls("".join(sorted(found)))

    def encode_document(self, text: bytes) -> Encoded:
        """Ids of UTF-8 ``text`` and the length of each character in bytes."""
        decoded = text.decode("utf-8", "replace")
        points = np.frombuffer(decoded.encode("utf-32-le", "replace"), dtype=np.uint32)
        if not len(self._sorted):
            ids = np.zeros(len(points), dtype=self.dtype)
        else:
            at = np.minimum(np.searchsorted(self._sorted, points), len(self._sorted) - 1)
            ids = np.where(self._sorted[at] == points, self._ids[at], 0).astype(self.dtype)
        sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        return ids, sizes.astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; id 0 becomes U+FFFD, ids out of range are left out."""
        symbols = self.unknown + self.alphabet
        return "".join(symbols[i] for i in map(int, ids) if 0 <= i < len(symbols))

    def backend(self) -> Backend:
        """Characters as words, cut one by one."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        vocab = {c: n for n, c in enumerate(self.unknown + self.alphabet)}
        backend = Backend(models.WordLevel(vocab=vocab, unk_token=self.unknown))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return backend

    def _special(self) -> dict[str, Any]:
        return {"unk_token": self.unknown, "bos_token": self.unknown}


class BPE(Tokenizer):
    """Any tokenizer of the ``tokenizers`` library, whatever its model.

    Args:
        backend: The tokenizer. Its ids are used as they are; special tokens are not added.
        bos: Token read before a document; default the first of the usual names that it has, or
            id 0.
        special: Entries for the saved configuration, such as ``eos_token``.
    """

    kind = "tokenizers"

    def __init__(
        self, backend: Backend, bos: str | None = None, special: dict[str, Any] | None = None
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        self.vocab_size = highest + 1
        usual = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", END_OF_TEXT, "</s>", "[CLS]")
        names = [bos] if bos else usual
        known = (backend.token_to_id(name) for name in names)
        self.bos_id = next((i for i in known if i is not None), 0)
        self._entries = dict(special or {})

    def encode_document(self, text: bytes) -> Encoded:
        """Ids of UTF-8 ``text`` and their bytes; a part of a character counts with its first token.

        Bytes that no token covers (dropped white space, say) count with the token after them.
        """
        blocks = [
            self._encode_block(block) for block in text_blocks(text.decode("utf-8", "replace"))
        ]
        ids, lengths = zip(*blocks, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def _encode_block(self, decoded: str) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        encoding = self._backend.encode(decoded, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=self.dtype)
        if not len(ids):
            return ids, np.zeros(0, dtype=np.uint32)
        points = np.frombuffer(decoded.encode("utf-32-le", "replace"), dtype=np.uint32)
        sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        to_byte = np.concatenate([[0], np.cumsum(sizes)])
        ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        ends = np.maximum.accumulate(to_byte[np.minimum(ends, len(points))])
        ends[-1] = to_byte[-1]
        return ids, np.diff(ends, prepend=0).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids`` without special tokens; ids out of range are left out."""
        return str(self._backend.decode([i for i in map(int, ids) if 0 <= i < self.vocab_size]))

    def backend(self) -> Backend:
        """The tokenizer itself."""
        return self._backend

    def _special(self) -> dict[str, Any]:
        name = self._backend.id_to_token(self.bos_id)
        return {"bos_token": name, **self._entries}

    @classmethod
    def from_state(cls, state: dict[str, str]) -> BPE:
        """Rebuild from ``state_dict()``, or from the files of any fast tokenizer."""
        from tokenizers import Tokenizer as Backend

        config = json.loads(state.get(CONFIG_FILE, "{}"))
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {n: text for n in names if (text := _token_text(config.get(n))) is not None}
        return cls(Backend.from_str(state[TOKENS_FILE]), special.get("bos_token"), special)


def _token_text(entry: Any) -> str | None:
    """The token in an entry of a tokenizer configuration: text, or a dict with its content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def tokenizer_from_state(state: dict[str, str]) -> Tokenizer:
    """Rebuild a tokenizer from ``Tokenizer.state_dict()``."""
    from statezoo.datamodules.dna.tokenizers import dna_tokenizer_from_state as of_dna
    from statezoo.datamodules.music.tokenizers import saved_music_tokenizer as of_music

    if (found := of_dna(state) or of_music(state)) is not None:
        return found
    kind = json.loads(state.get(CONFIG_FILE, "{}")).get("statezoo_kind")
    if kind == Bytes.kind:
        return Bytes()
    if kind == Characters.kind:
        vocab = json.loads(state[TOKENS_FILE])["model"]["vocab"]
        return Characters("".join(sorted(vocab, key=lambda symbol: int(vocab[symbol]))))
    return BPE.from_state(state)


def tokenizer_from_checkpoint(path: str | Path) -> Tokenizer:
    """The tokenizer that a data module left in a checkpoint; ValueError where none did."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        parts = [checkpoint.get(name, {}) for name in ("Text", "DNA", "LabelledDNA", "Music")]
        state = next((part["tokenizer"] for part in parts if part.get("tokenizer")), None)
        found = tokenizer_from_state(state) if state else None
    except Exception as error:  # torch and the library raise many types, and name no file
        reason = str(error).strip().partition("\n")[0][:120]
        raise ValueError(f"{path} is no readable checkpoint with a tokenizer: {reason}") from error
    if found is None:
        raise ValueError(f"{path} holds no tokenizer: it was not made with Text, DNA or Music.")
    return found


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Tokenizer from ``"bytes"``, a ``tokenizer.json``, its folder, a run's .ckpt, or a Hub name.

    The short name of a model that statezoo ships gives the tokenizer of that model.

    Raises:
        ValueError: If ``source`` is none of them.
    """
    if source == Bytes.kind:
        return Bytes()
    path = Path(source)
    if path.suffix == ".ckpt" and path.is_file():
        return tokenizer_from_checkpoint(path)
    try:
        path = place_of(source)
        file = path / TOKENS_FILE if path.is_dir() else path
        state = read_state(file) if file.is_file() else None
        found = None if state else fast_tokenizer(path)
    except ValueError as error:
        raise ValueError(
            f"No tokenizer {str(source)!r}{near(source)}: give bytes, characters, a "
            f"tokenizer.json, a folder with one, the .ckpt of a run, a name on the Hub or one of "
            f"statezoo list --pretrained ({error})"
        ) from error
    if found is not None:
        special = {key: str(token) for key, token in found.special_tokens_map.items()}
        return BPE(found.backend_tokenizer, found.bos_token, special)
    try:
        return tokenizer_from_state(state or {})
    except Exception as error:  # the library raises bare Exception on a malformed file
        raise ValueError(f"{file} is not a file of the tokenizers library: {error}") from error


def train_bpe(paths: Sequence[str | Path], vocab_size: int, out: str | Path) -> BPE:
    """Train a byte-level BPE on text files or folders and save it.

    Args:
        paths: What ``Text`` reads: files or folders.
        vocab_size: Ids to make: ``<|endoftext|>``, 256 bytes, the rest merges.
        out: Folder to write.

    Raises:
        ValueError: If ``vocab_size`` is below 257 or nothing could be read.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from statezoo.datamodules.readers import source_for
    from statezoo.datamodules.records import Report

    if vocab_size < 257:
        raise ValueError(f"train_bpe needs vocab_size of at least 257, got {vocab_size}.")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources, report = [source_for(str(path)) for path in paths], Report()
    texts = (doc.text.decode() for source in sources for doc in source.documents(report))
    first = next(texts, None)
    if first is None:
        reasons = "".join(f"\n  {line}" for line in report[:10])
        raise ValueError(f"No text in {', '.join(map(str, paths))}: add some.{reasons}")
    backend.train_from_iterator(chain([first], texts), trainer)
    for line in report[:20]:
        logging.getLogger(__name__).warning(f"skipped {line}")
    tokenizer = BPE(backend, END_OF_TEXT, {"eos_token": END_OF_TEXT})
    tokenizer.save(out)
    return tokenizer
