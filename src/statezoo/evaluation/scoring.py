"""Log-likelihoods of texts under a causal model: the numbers of ``score`` and ``evaluate``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml  # type: ignore[import-untyped,unused-ignore]
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from statezoo import shipped
from statezoo.arguments import find_checkpoint
from statezoo.datamodules.dna.tokenizers import DNATokenizer
from statezoo.datamodules.music.base import MusicTokenizer
from statezoo.datamodules.tokenizers import Tokenizer
from statezoo.generate import load

__all__ = ["Reading", "Score", "Scorer", "open_scorer", "trained_length"]

LOGITS = 1 << 25
"""Logits that are held at once; the state goes from one piece of a text to the next."""
SHORTEST = 64  # tokens of a piece, however many symbols there are
NO_BASES = re.compile(r"[^ACGTN\s]", re.IGNORECASE)

Ids = NDArray[Any]


class Reading(NamedTuple):
    """What a model says of each token of a text, given those before it.

    Attributes:
        log_probs: ``[T]`` float32 nats, at most 0.
        greedy: ``[T]`` whether it is the token that the model finds likeliest.
    """

    log_probs: NDArray[np.float32]
    greedy: NDArray[np.bool_]


class Score(NamedTuple):
    """How surprising a text is.

    Attributes:
        tokens: Tokens that are scored: all but N of DNA.
        units: What they stand for: bytes of UTF-8, bases, or tokens of music.
        nats: Minus the log-likelihood of all of them.
    """

    tokens: int
    units: int
    nats: float

    @property
    def bits(self) -> float:
        """Bits per unit; NaN where nothing was scored."""
        return self.nats / math.log(2) / self.units if self.units else math.nan


class Scorer:
    """Scores texts with a causal network; every text begins as training texts did, with ``bos_id``.

    Texts run as batches, long ones piece by piece with the state carried on, so that the memory of
    a recurrent net does not depend on their length.

    Args:
        net: Causal network.
        tokenizer: The tokenizer that it was trained with.
        batch_size: Texts at once; it changes results by rounding alone.

    Attributes:
        unit: What :attr:`Score.units` counts: ``byte``, ``base`` or ``token``.
        longest: Tokens of the longest text so far.

    Raises:
        ValueError: If ``batch_size`` is below 1 or the network has fewer symbols than the
            tokenizer.

    Example:
        >>> scorer = open_scorer("runs/gla")
        >>> scorer.score(["Once upon a time"])[0].bits
        2.41
    """

    def __init__(self, net: Any, tokenizer: Tokenizer, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if tokenizer.vocab_size > net.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} symbols, the model "
                f"{net.config.vocab_size}: give the model the tokenizer that it was trained with."
            )
        self.net, self.tokenizer, self.batch_size = net.eval(), tokenizer, batch_size
        self.longest = 0
        self.unit = "byte"
        if isinstance(tokenizer, DNATokenizer):
            self.unit = "base"
        elif isinstance(tokenizer, MusicTokenizer):
            self.unit = "token"

    def encode(self, text: bytes) -> tuple[Ids, NDArray[np.bool_], int]:
        """Return the ids of UTF-8 ``text``, which of them are scored, and the units of those.

        Raises:
            ValueError: If the model cannot read such text.
        """
        if isinstance(self.tokenizer, DNATokenizer):
            _check_bases(text)
        ids, sizes = self.tokenizer.encode_document(text)
        scored = np.ones(len(ids), dtype=np.bool_)
        if isinstance(self.tokenizer, DNATokenizer):
            scored = np.isin(ids, self.tokenizer.scored)
        units = int(scored.sum() if sizes is None else sizes[scored].sum(dtype=np.int64))
        return ids, scored, units

    def score(self, texts: Sequence[str | bytes]) -> list[Score]:
        """Score texts, each by itself.

        Raises:
            ValueError: If the model cannot read such text.
        """
        raw = (x.encode("utf-8", "surrogatepass") if isinstance(x, str) else x for x in texts)
        encoded = [self.encode(text) for text in raw]
        readings = self.read([ids for ids, _, _ in encoded])
        return [
            Score(int(scored.sum()), units, -float(said.log_probs[scored].sum(dtype=np.float64)))
            for (_, scored, units), said in zip(encoded, readings, strict=True)
        ]

    def read(self, rows: Sequence[Ids]) -> list[Reading]:
        """Read tokens; ``bos_id`` before the first is added here.

        Args:
            rows: Ids of each text, of any lengths, also none.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list[Reading | None] = [None] * len(rows)
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            for i, reading in zip(chosen, self._read_batch([rows[i] for i in chosen]), strict=True):
                found[i] = reading
        self.longest = max([self.longest, *map(len, rows)])
        return [reading for reading in found if reading is not None]

    @torch.inference_mode()
    def _read_batch(self, rows: list[Ids]) -> Iterable[Reading]:
        tensors = [torch.from_numpy(np.asarray(row).astype(np.int64)) for row in rows]
        targets = pad_sequence(tensors, batch_first=True)  # padding comes after all that is scored
        bos = torch.full((len(rows), 1), self.tokenizer.bos_id)
        inputs = torch.cat([bos, targets], 1)[:, :-1]
        B, T = targets.shape
        step = max(LOGITS // (B * int(self.net.config.vocab_size)), SHORTEST)
        cache = DynamicCache(config=self.net.config) if step < T else None
        log_probs, greedy = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.bool)
        for start in range(0, T, step):
            part = slice(start, start + step)
            own = targets[:, part].to(self.net.device)
            logits = self.net(inputs[:, part].to(own.device), past_key_values=cache).logits
            log_probs[:, part] = _of_targets(logits, own)
            greedy[:, part] = logits.argmax(-1) == own
        return [
            Reading(x[: len(row)].numpy(), y[: len(row)].numpy())
            for x, y, row in zip(log_probs, greedy, rows, strict=True)
        ]


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats ``[B T]`` of ``targets`` under ``logits [B T W]``, in float32."""
    logits = logits.float()
    chosen = logits.gather(2, targets[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)


def _check_bases(text: bytes) -> None:
    found = NO_BASES.search(text.decode("utf-8", "replace"))
    if found:
        raise ValueError(
            f"the model reads DNA, and the text has {found[0]!r} at character {found.start()}: "
            "give it A, C, G, T and N alone (of the shipped tasks, statezoo_promoter)."
        )


def open_scorer(source: str, device: str = "cpu", batch_size: int = 8) -> Scorer:
    """Load a causal model with its tokenizer, for scoring.

    Args:
        source: Checkpoint, folder of a run, exported folder, or name of a model.
        device: Where to run: cpu, cuda, mps.
        batch_size: Texts at once.

    Raises:
        ValueError: If there is no such model, it is not causal or has no tokenizer, or the device
            is not there.
    """
    net, tokenizer = load(source)
    if not net.can_generate():
        raise ValueError(
            f"{source!r} is a {type(net).__name__}, which gives no likelihood of texts: scoring "
            "needs a causal model; statezoo test measures the others on their data."
        )
    try:
        return Scorer(net.to(device), tokenizer, batch_size)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot run on device {device!r}: {error}") from error


def trained_length(source: str) -> int | None:
    """Return the tokens per window that a model was trained on, or None where that is not known.

    It stands in ``metrics.json`` of a shipped or published folder, and in ``config.yaml`` of a run.
    """
    place = Path(shipped.resolve(source))
    if place.is_dir() and not (place / "config.json").is_file():
        place = find_checkpoint(place)
    folder = place if place.is_dir() else place.parent
    if (folder / "metrics.json").is_file():
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        length = (found.get("model") or {}).get("trained_length")
        if isinstance(length, int):
            return length
    for config in (folder / "config.yaml", folder.parent / "config.yaml"):
        if config.is_file() and place.exists():
            data = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data") or {}
            length = (data.get("init_args") or {}).get("seq_len")
            return length if isinstance(length, int) else None
    return None
