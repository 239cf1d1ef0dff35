"""What a model writes, for its card: text, bases or music, drawn with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statezoo.card.run import Run

__all__ = ["write_sample"]

SEED = 0
TOKENS, BASES, PROMPT_BARS, BARS = 160, 300, 4, 12
PROMPTS, LONGEST_PROMPT = 3, 40


def write_sample(run: Run, folder: Path, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Write ``sample.txt``, ``sample.fa``, or ``sample.mid`` with its picture ``sample.png``.

    Args:
        run: Whose data says what is written, and where prompts come from.
        folder: The card, with its weights; samples are written beside them.
        prompts: Texts to continue, for text.

    Returns:
        How it was made: ``files``, ``seed``, and how much was written.
    """
    from statezoo.datamodules import DNA, Music

    if isinstance(run.data, DNA):
        return _bases(folder)
    if isinstance(run.data, Music):
        return _music(run, folder)
    return _text(folder, list(prompts) or _prompts(run))


def _text(folder: Path, prompts: Sequence[str]) -> dict[str, Any]:
    from statezoo.generate import continuations

    parts = []
    for prompt in prompts:
        (text,) = continuations(
            str(folder),
            prompt,
            max_new_tokens=TOKENS,
            seed=SEED,
            temperature=0.8,
            top_k=0,
            top_p=0.95,
            n=1,
            device="cpu",
        )
        parts.append(f"prompt: {prompt}\n\n{text}\n")
    (folder / "sample.txt").write_text(f"\n{'-' * 40}\n\n".join(parts), encoding="utf-8")
    made = {"temperature": 0.8, "top_p": 0.95, "new_tokens": TOKENS, "prompts": list(prompts)}
    return {"files": ["sample.txt"], "seed": SEED, **made}


def _prompts(run: Run) -> list[str]:
    """Return beginnings of lines of the held-out split, at several places."""
    raw = getattr(run.data, "raw", None)
    text = raw(run.split).decode("utf-8", "ignore") if raw else ""
    found = []
    for number in range(PROMPTS):
        place = text.find("\n", number * len(text) // PROMPTS) + 1
        words = text[place:].lstrip()[:LONGEST_PROMPT]
        found.append(words.split("\n")[0].rpartition(" ")[0] or words)
    return found


def _bases(folder: Path) -> dict[str, Any]:
    from statezoo.datamodules.tokenizers import load_tokenizer
    from statezoo.dna.sampling import generate

    per_token = getattr(load_tokenizer(str(folder)), "bases_per_token", 1)
    target = folder / "sample.fa"
    generate(str(folder), target, tokens=BASES // per_token, seed=SEED)
    Path(f"{target}.run.json").unlink()  # says how to resume, which nobody will
    return {"files": ["sample.fa"], "seed": SEED, "temperature": 1.0, "bases": BASES}


def _music(run: Run, folder: Path) -> dict[str, Any]:
    from dataclasses import replace

    from statezoo.datamodules.music.notes import TPQ, Piece
    from statezoo.music.continuation import continue_piece
    from statezoo.music.decoding import Sampling
    from statezoo.music.pianoroll import plot

    name, prompt = next(
        (name, piece)
        for name, piece in run.data.music(run.split)
        if len(piece.bars()) > PROMPT_BARS
    )
    settings = Sampling(0.95, 0.95, seed=SEED)
    (score,) = continue_piece(
        str(folder), prompt, prompt_bars=PROMPT_BARS, bars=BARS, sampling=settings
    )
    score.dump_midi(str(folder / "sample.mid"))
    piece = replace(Piece.from_score(score), length=score.end() * TPQ // score.tpq)
    title = f"{PROMPT_BARS} bars as given, {BARS} new ones (seed {SEED})"
    plot(piece, folder / "sample.png", prompt_bars=PROMPT_BARS, title=title)
    (folder / "sample.json").unlink()  # the numbers of the picture
    made = {"prompt": Path(name).name, "prompt_bars": PROMPT_BARS, "new_bars": BARS}
    return {"files": ["sample.mid", "sample.png"], "seed": SEED, "temperature": 0.95, **made}
