"""Pictures of what a model does with an input: ``statezoo explain``; torch only where needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Input", "explain", "read_input"]

TEXT_PER_TOKEN = 64
"""Characters of a file that are read for each token that is shown."""
SHOWN = {"\n": "\u21b5", " ": "\u2423", "\t": "\u21e5", "\r": "\u240d"}
"""What stands for characters that cannot be seen."""


def explain(
    *,
    model: str,
    out: str,
    input: str | None = None,
    text: str | None = None,
    record: str | None = None,
    start: int = 0,
    end: int | None = None,
    max_positions: int = 512,
) -> None:
    """Draw decay, writes, memory length, routes and attention of a model on an input.

    Args:
        model: Checkpoint, folder of a run, exported folder, name on the Hub, or short name of a
            model that we ship.
        out: Folder to write: decay, write, memory, router and attention, as far as the model has
            them, each as .png with its numbers as .npz, and summary.csv.
        input: Text, music (.mid, .musicxml, .abc) or FASTA, whichever the model reads.
        text: The input itself, instead of a file: text, bases, or names of music tokens.
        record: Sequence of a FASTA; default the first.
        start: First base of it, counted from 0.
        end: One past its last base; default the end.
        max_positions: Show at most this many tokens, from the beginning.
    """
    import torch

    from statezoo.explain_pictures import save
    from statezoo.generate import load
    from statezoo.zoo.observe import observe

    if max_positions < 1:
        raise ValueError(f"explain needs max_positions of at least 1, got {max_positions}.")
    _check_source(input, text, record, start, end)
    net, tokenizer = load(model)
    found = read_input(tokenizer, input, text, (record, start, end), limit=max_positions)
    ids = found.ids
    if net.can_generate() and not start:
        ids = [tokenizer.bos_id, *ids]
    if len(ids) > max_positions:
        sys.stdout.write(
            f"showing the first {max_positions} tokens of the input; --max-positions N shows more\n"
        )
        ids = ids[:max_positions]
    with observe(net.eval()) as seen, torch.no_grad():
        net(torch.tensor([ids]))
    if not seen:
        names = sorted({mixer["name"] for mixer in net.config.layer_mixers})
        raise ValueError(
            f"{model!r} has nothing to show: {', '.join(names)} calls no recurrence or attention "
            "of statezoo.kernels."
        )
    sys.stdout.write(f"{found.name}: {len(ids)} tokens\n")
    for path in save(seen, symbols(tokenizer, ids), found.name, Path(out)):
        sys.stdout.write(f"wrote {path}\n")


class Input(NamedTuple):
    """What a model is to read.

    Attributes:
        ids: Its tokens, without BOS.
        name: What it is, for titles.
    """

    ids: list[int]
    name: str


def read_input(
    tokenizer: Any,
    path: str | None,
    text: str | None,
    region: tuple[str | None, int, int | None] = (None, 0, None),
    limit: int = 512,
) -> Input:
    """Turn a file, or a text itself, into tokens; little more of a large file is read than needed.

    Args:
        tokenizer: That of the model; what it reads decides which files fit.
        path: File.
        text: Text, instead of a file.
        region: Record of a FASTA, first base, and one past the last.
        limit: Tokens that are needed.

    Raises:
        ValueError: If the model does not read such a file, or there is no token in it.
        FileNotFoundError: If there is no such file.
    """
    from statezoo.datamodules.dna.fasta import is_fasta
    from statezoo.datamodules.dna.tokenizers import DNATokenizer
    from statezoo.datamodules.music.tokenizers import MusicTokenizer

    enough = TEXT_PER_TOKEN * limit
    if path is None:
        found = Input(tokenizer.encode((text or "")[:enough]), "text")
    elif is_fasta(Path(path)):
        if not isinstance(tokenizer, DNATokenizer):
            raise ValueError(f"{path} is DNA, but {_reads(tokenizer)}.")
        found = _read_fasta(tokenizer, path, region, enough)
    elif region != (None, 0, None):
        raise ValueError(f"--record, --start and --end choose bases of a FASTA; {path} is none.")
    elif _is_music(path):
        if not isinstance(tokenizer, MusicTokenizer):
            raise ValueError(f"{path} is music, but {_reads(tokenizer)}.")
        from statezoo.datamodules.music.readers import read_piece

        found = Input(tokenizer.encode_piece(read_piece(path)).tolist(), Path(path).name)
    else:
        try:
            with Path(path).open(encoding="utf-8") as file:
                content = file.read(enough)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason}).") from error
        found = Input(tokenizer.encode(content), Path(path).name)
    if not found.ids:
        raise ValueError(f"there is no token in the input ({found.name}).")
    return found


def symbols(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Write each token alone, so that it can be read at an axis; a tokenizer's own names if any."""
    names = getattr(tokenizer, "names", None)
    found = []
    for token in ids:
        written = names[token] if names else tokenizer.decode([token])
        if not written:
            written = "BOS" if token == tokenizer.bos_id else f"<{token}>"
        found.append("".join(SHOWN.get(c, c) for c in written))
    return found


def _check_source(
    path: str | None, text: str | None, record: str | None, start: int, end: int | None
) -> None:
    if (path is None) == (text is None):
        raise ValueError("explain needs --input FILE or --text TEXT, one of the two.")
    if text is not None and (record, start, end) != (None, 0, None):
        raise ValueError("--record, --start and --end choose bases of a FASTA: give --input.")


def _reads(tokenizer: Any) -> str:
    from statezoo.datamodules.dna.tokenizers import DNATokenizer
    from statezoo.datamodules.music.tokenizers import MusicTokenizer

    kind = "text"
    if isinstance(tokenizer, DNATokenizer):
        kind = "DNA"
    elif isinstance(tokenizer, MusicTokenizer):
        kind = "music"
    return f"the model reads {kind} ({tokenizer.kind})"


def _is_music(path: str) -> bool:
    from statezoo.datamodules.music.readers import SUFFIXES

    return Path(path).suffix.lower() in SUFFIXES


def _read_fasta(
    tokenizer: Any, path: str, region: tuple[str | None, int, int | None], enough: int
) -> Input:
    from statezoo.datamodules.dna.fasta import Genome

    genome = Genome(path)
    record, start, end = region
    name = genome.resolve(record) if record is not None else genome.names[0]
    end = genome.length(name) if end is None else end
    letters = genome.fetch(name, start, end if end < start else min(end, start + enough))
    return Input(tokenizer.encode_array(letters)[0].tolist(), f"{name} from base {start}")
