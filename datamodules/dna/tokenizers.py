"""Bases, k-mers or learnt pieces of DNA as token ids.

Ids 0 to 7 mean the same to all of them: ``[PAD] [BOS] [MASK] A C G T N``. Upper and lower case are
alike, every other letter is N, white space is dropped, and N is never part of a longer token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.dna.sequence import to_codes
from statezoo.datamodules.tokenizers import BPE, CONFIG_FILE, TOKENS_FILE, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["DNATokenizer", "KMers", "Nucleotides", "Pieces", "dna_tokenizer", "train_dna_bpe"]

PAD, BOS, MASK = 0, 1, 2
SPECIAL = ("[PAD]", "[BOS]", "[MASK]")
FIRST = 3  # id of A
N = 7
LETTERS = "ACGTN"
SINGLE = 8  # ids that every tokenizer has
_TABLE = (to_codes(np.arange(256, dtype=np.uint8)) + FIRST).astype(np.uint8)
_BLANK = b" \t\r\n\v\f"
_LARGEST_K = 8


class DNATokenizer(Tokenizer):
    """What the tokenizers of DNA share.

    Attributes:
        pad_id: Fills short sequences; never read before a scored base.
        bos_id: Read before the first base of a contig.
        mask_id: Stands for a base that a masked model must find.
        n_id: N and all other letters that are no base; never scored.
        scored: Ids that stand for real bases alone.
        replacements: Ids from which masked training draws random tokens.
        bases_per_token: How many bases a token stands for, at most or (``Pieces``) about.
        complement: ``[vocab_size]`` id of the reverse complement of each token, None where the
            vocabulary is not closed under it.
    """

    pad_id, bos_id, mask_id, n_id = PAD, BOS, MASK, N
    bases_per_token = 1
    complement: list[int] | None = None

    @property
    def scored(self) -> tuple[int, ...]:
        """Ids that stand for real bases."""
        return tuple(i for i in range(FIRST, self.vocab_size) if i != N)

    @property
    def replacements(self) -> tuple[int, ...]:
        """Ids from which masked training draws random tokens."""
        return tuple(range(SINGLE, self.vocab_size))

    def encode_document(self, text: bytes) -> tuple[NDArray[Any], NDArray[np.uint32] | None]:
        """Ids of ASCII letters and the bases that each stands for (None: one each)."""
        letters = text.translate(None, _BLANK)
        return self.encode_array(np.frombuffer(letters, dtype=np.uint8))

    def encode_array(
        self, letters: NDArray[np.uint8]
    ) -> tuple[NDArray[Any], NDArray[np.uint32] | None]:
        """The same for a ``[T]`` array of ASCII letters without white space."""
        raise NotImplementedError

    def _symbols(self) -> list[str]:
        """Text of each id."""
        return [*SPECIAL, *LETTERS]

    def decode(self, ids: Iterable[int]) -> str:
        """Letters A C G T N of ``ids``; special ids and those out of range are left out."""
        symbols = self._symbols()
        return "".join(symbols[i] for i in map(int, ids) if FIRST <= i < len(symbols))

    def _special(self) -> dict[str, Any]:
        return dict(zip(("pad_token", "bos_token", "mask_token"), SPECIAL, strict=True))

    def _words(self, pattern: str) -> Backend:
        """Backend that takes what ``pattern`` matches as words and unknown ones as N."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        vocab = {symbol: i for i, symbol in enumerate(self._symbols())}
        backend = Backend(models.WordLevel(vocab=vocab, unk_token="N"))
        backend.normalizer = _normalizer()
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(SPECIAL))
        return backend


def _normalizer() -> Any:
    """Drop white space, write A C G T in upper case and all other letters as N."""
    from tokenizers import Regex
    from tokenizers.normalizers import Replace
    from tokenizers.normalizers import Sequence as Steps

    case = [Replace(base.lower(), base) for base in "ACGT"]
    return Steps([Replace(Regex(r"\s"), ""), *case, Replace(Regex("[^ACGT]"), "N")])


class Nucleotides(DNATokenizer):
    """One id per base: A C G T N are 3 to 7.

    Attributes:
        table: ``[256]`` uint8, the id of each ASCII letter: ``table[letters]`` is the encoding.
    """

    kind = "nucleotides"
    vocab_size = SINGLE
    complement = [PAD, BOS, MASK, 6, 5, 4, 3, N]  # noqa: RUF012  # as the configuration has it
    table = _TABLE

    @property
    def replacements(self) -> tuple[int, ...]:
        """A, C, G and T."""
        return self.scored

    def encode_array(
        self, letters: NDArray[np.uint8]
    ) -> tuple[NDArray[Any], NDArray[np.uint32] | None]:
        """Ids of letters, one each."""
        return self.table[letters], None

    def backend(self) -> Backend:
        """Letters as words."""
        return self._words(r"[\s\S]")


class KMers(DNATokenizer):
    """Words of ``k`` bases that do not overlap; the id of a word is 8 plus its base-4 number.

    Runs of A C G T are cut into words from their beginning. What is left of a run, and N, are
    single letters.

    Args:
        k: Bases per word, 2 to 8.

    Source: Dalla-Torre et al., Nucleotide Transformer, Nature Methods 2025 (k = 6, 4,104 ids with
    other special tokens).
    """

    kind = "kmers"

    def __init__(self, k: int) -> None:
        if not 2 <= k <= _LARGEST_K:
            raise ValueError(f"KMers needs k from 2 to {_LARGEST_K}, got {k}.")
        self.k = self.bases_per_token = k
        self.vocab_size = SINGLE + 4**k
        self._names = super()._symbols() + ["".join(word) for word in product("ACGT", repeat=k)]
        words = np.arange(4**k)
        other = np.zeros_like(words)
        for i in range(k):
            other = other << 2 | (3 - (words >> 2 * i & 3))
        self.complement = [*Nucleotides.complement, *(SINGLE + other).tolist()]

    def encode_array(
        self, letters: NDArray[np.uint8]
    ) -> tuple[NDArray[Any], NDArray[np.uint32] | None]:
        """Ids of words and single letters, and the bases of each."""
        codes = to_codes(letters).astype(np.int64)
        size, k = len(codes), self.k
        place, real = np.arange(size), codes < 4
        edge = np.diff(real, prepend=not real[0] if size else False)
        start = np.maximum.accumulate(np.where(edge, place, 0))  # of the run that holds the base
        end = np.append(np.flatnonzero(edge)[1:], size)[np.cumsum(edge) - 1]
        word = real & (place - start < (end - start) // k * k)
        first = ~word | ((place - start) % k == 0)
        at = place[first]
        ids = codes[at] + FIRST
        full = at[word[at]]
        number = np.zeros(len(full), dtype=np.int64)
        for i in range(k):
            number = 4 * number + codes[full + i]
        ids[word[at]] = SINGLE + number
        return ids.astype(self.dtype), np.diff(at, append=size).astype(np.uint32)

    def _symbols(self) -> list[str]:
        return self._names

    def backend(self) -> Backend:
        """Words and single letters, cut by a pattern."""
        return self._words(rf"[ACGT]{{{self.k}}}|[\s\S]")

    def _special(self) -> dict[str, Any]:
        return {**super()._special(), "statezoo_k": self.k}


class Pieces(DNATokenizer):
    """Pieces of DNA that byte-pair encoding has found, made by ``train_dna_bpe``.

    Args:
        backend: Tokenizer of the ``tokenizers`` library with the first 8 ids of this module.
    """

    kind = "dna_bpe"

    def __init__(self, backend: Backend) -> None:
        self._bpe = BPE(backend)
        self.vocab_size = self._bpe.vocab_size
        names = backend.get_vocab(with_added_tokens=True)
        ids = {i: name for name, i in names.items()}
        if [ids.get(i) for i in range(SINGLE)] != [*SPECIAL, *LETTERS]:
            raise ValueError(
                f"Pieces needs a tokenizer whose first ids are {' '.join((*SPECIAL, *LETTERS))}: "
                "train one with train_dna_bpe."
            )
        self._names = [ids.get(i, "") for i in range(self.vocab_size)]
        sizes = [len(name) for name in self._names[SINGLE:]] or [1]
        self.bases_per_token = max(1, round(float(np.mean(sizes))))

    @property
    def replacements(self) -> tuple[int, ...]:
        """All pieces, or the bases where none was learnt."""
        return super().replacements or self.scored

    def encode_array(
        self, letters: NDArray[np.uint8]
    ) -> tuple[NDArray[Any], NDArray[np.uint32] | None]:
        """Ids of pieces and the bases of each."""
        text = np.frombuffer(b"ACGTN", dtype=np.uint8)[to_codes(letters)]
        return self._bpe.encode_document(text.tobytes())

    def _symbols(self) -> list[str]:
        return self._names

    def backend(self) -> Backend:
        """The tokenizer itself."""
        return self._bpe.backend()


def dna_tokenizer(source: str | Path) -> DNATokenizer:
    """Tokenizer from ``"characters"``, ``"kmer6"`` (or ``"kmer:K"``), a model or a checkpoint.

    Raises:
        ValueError: If ``source`` is none of them, or a tokenizer for text.
    """
    name = str(source)
    if name == "characters":
        return Nucleotides()
    if found := re.fullmatch(r"kmer:?(\d+)", name):
        return KMers(int(found[1]))
    from statezoo.datamodules.tokenizers import load_tokenizer
    from statezoo.shipped import near, resolve

    if not Path(resolve(name)).exists() and resolve(name).count("/") != 1:
        raise ValueError(
            f"No tokenizer {name!r} for DNA{near(name)}: give characters, kmer6, kmer:K, the "
            "folder of a trained one, the .ckpt of a run, or a model's name."
        )
    tokenizer = load_tokenizer(source)
    if not isinstance(tokenizer, DNATokenizer):
        raise ValueError(
            f"{name} is a tokenizer for text ({tokenizer.kind}): give characters, kmer6, or one "
            "that was trained on DNA."
        )
    return tokenizer


def dna_tokenizer_from_state(state: dict[str, str]) -> DNATokenizer | None:
    """Rebuild from ``state_dict()``; None where it is no tokenizer of DNA."""
    config = json.loads(state.get(CONFIG_FILE, "{}"))
    kind = config.get("statezoo_kind")
    if kind == Nucleotides.kind:
        return Nucleotides()
    if kind == KMers.kind:
        return KMers(int(config["statezoo_k"]))
    if kind == Pieces.kind:
        from tokenizers import Tokenizer as Backend

        return Pieces(Backend.from_str(state[TOKENS_FILE]))
    return None


def train_dna_bpe(
    paths: Sequence[str | Path], vocab_size: int, out: str | Path, max_bases: int = 50_000_000
) -> Pieces:
    """Train byte-pair encoding on FASTA files and save it.

    Args:
        paths: FASTA files or folders.
        vocab_size: Ids to make, at least 9: the 8 that all have, the rest pieces.
        out: Folder to write.
        max_bases: Stop reading after so many bases.

    Raises:
        ValueError: If ``vocab_size`` is below 9 or a file cannot be read.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size <= SINGLE:
        raise ValueError(f"train_dna_bpe needs vocab_size of at least 9, got {vocab_size}.")
    backend = Backend(models.BPE())
    backend.normalizer = _normalizer()
    # Pieces of at most 512 bases: the library needs time quadratic in their length.
    cut = [(r"N", "isolated"), (r"[ACGT]{512}", "isolated")]
    steps = [pre_tokenizers.Split(Regex(pattern), how) for pattern, how in cut]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *LETTERS],  # in this order, so that the ids are ours
        show_progress=False,
    )
    backend.train_from_iterator(_texts(paths, max_bases), trainer)
    backend = _plain_letters(backend)
    tokenizer = Pieces(backend)
    tokenizer.save(out)
    return tokenizer


def _plain_letters(backend: Backend) -> Backend:
    """The tokenizer with letters as ordinary tokens: special ones would be cut out of the text."""
    from tokenizers import Tokenizer as Backend

    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    return Backend.from_str(json.dumps(state))


def _texts(paths: Sequence[str | Path], max_bases: int, size: int = 1 << 16) -> Iterator[str]:
    """The sequences in parts."""
    from statezoo.datamodules.dna.fasta import Genome

    for path in paths:
        genome = Genome(path)
        for name in genome.names:
            for start in range(0, genome.length(name), size):
                if max_bases <= 0:
                    return
                letters = genome.fetch(name, start, min(start + size, genome.length(name)))
                max_bases -= len(letters)
                yield letters.tobytes().decode("ascii")
