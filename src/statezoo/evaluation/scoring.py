"""Log-likelihoods of texts under a causal model: the numbers of ``score`` and ``evaluate``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from statezoo.datamodules.tokenizers import Encoded, Tokenizer
from statezoo.evaluation.documents import checked
from statezoo.generate import load

if TYPE_CHECKING:
    from statezoo.evaluation.knn import KNN

__all__ = ["Reading", "Score", "Scorer", "Stream", "open_scorer", "trained_length"]

TOKENS = 2048
"""Tokens of a batch that are worked on at once; the state goes from one piece to the next. Of 512
to 16,384 the fastest for small nets on a CPU core (GLA 17, Mamba-2 8 thousand tokens/s)."""
LOGITS = 1 << 25
"""Logits that are held at once."""
SHORTEST = 64  # tokens of a piece, however many symbols there are

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


class Stream:
    """Sequences that a causal network reads piece by piece, in memory that its state decides.

    Args:
        net: Causal network.
        first: The token before the first of each sequence, ``[B]``.
    """

    def __init__(self, net: Any, first: Tensor) -> None:
        self.net, self.last = net, first[:, None].to(net.device)
        self.cache = DynamicCache(config=net.config)
        most = min(LOGITS // int(net.config.vocab_size), tokens_at_once(net))
        self.step = max(most // len(first), SHORTEST)

    @torch.inference_mode()
    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read on.

        Args:
            ids: The next tokens ``[B T]``; ``T`` may differ from call to call.

        Returns:
            Log-probability of each, in nats, and whether it is the likeliest: ``[B T]`` on the CPU,
            at least float32.
        """
        log_probs, greedy = [], []
        for part in ids.to(self.last.device).split(self.step, 1):
            inputs = torch.cat([self.last, part[:, :-1]], 1)
            logits = self.net(inputs, past_key_values=self.cache).logits
            log_probs.append(_of_targets(logits, part).cpu())
            greedy.append((logits.argmax(-1) == part).cpu())
            self.last = part[:, -1:]
        return torch.cat(log_probs, 1), torch.cat(greedy, 1)


def grows(net: Any) -> bool:
    """Say whether the state of a causal network grows with what it has read."""
    return any(m.state_size(2) > m.state_size(1) for m in net.base_model.mixers())


def tokens_at_once(net: Any) -> int:
    """Return the tokens of a batch that are worked on at once; fewer where each sees all past."""
    return TOKENS // 4 if grows(net) else TOKENS


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
        knn: Settings and datastore of the neighbours that are mixed in, if any.
        notes: Sentences on these, for the user.

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
        self.knn: dict[str, Any] | None = None
        self.notes: list[str] = []
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
        (text,) = checked(self.tokenizer, [text])
        ids, sizes = self.tokenizer.encode_document(text)
        scored = self.scored(ids)
        return ids, scored, self.units(ids, sizes)

    def scored(self, ids: Ids) -> NDArray[np.bool_]:
        """Say which of ``ids``, in any shape, are scored: all but N of DNA."""
        if isinstance(self.tokenizer, DNATokenizer):
            return np.isin(ids, self.tokenizer.scored)
        return np.ones(ids.shape, dtype=np.bool_)

    def units(self, ids: Ids, sizes: NDArray[np.uint32] | None) -> int:
        """Count what the scored ones of ``ids [T]`` stand for, ``sizes [T]`` each or one."""
        scored = self.scored(ids)
        return int(scored.sum() if sizes is None else sizes[scored].sum(dtype=np.int64))

    def score_pieces(self, pieces: Iterable[Encoded]) -> Score:
        """Score one document of any length.

        Args:
            pieces: Its ids and units, piece by piece, see
                :func:`statezoo.evaluation.documents.encode`.
        """
        stream = Stream(self.net, torch.tensor([self.tokenizer.bos_id]))
        read, tokens, units, nats = 0, 0, 0, 0.0
        for ids, sizes in pieces:
            if not len(ids):
                continue
            log_probs, _ = stream.read(torch.from_numpy(ids.astype(np.int64))[None])
            scored = self.scored(ids)
            nats -= float(log_probs[0].numpy()[scored].sum(dtype=np.float64))
            read, tokens = read + len(ids), tokens + int(scored.sum())
            units += self.units(ids, sizes)
        self.longest = max(self.longest, read)
        return Score(tokens, units, nats)

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

    def _read_batch(self, rows: list[Ids]) -> Iterable[Reading]:
        tensors = [torch.from_numpy(np.asarray(row).astype(np.int64)) for row in rows]
        targets = pad_sequence(tensors, batch_first=True)  # padding comes after all that is scored
        if not targets.shape[1]:
            return [Reading(np.zeros(0, np.float32), np.zeros(0, np.bool_)) for _ in rows]
        stream = Stream(self.net, torch.full((len(rows),), self.tokenizer.bos_id))
        log_probs, greedy = stream.read(targets)
        return [
            Reading(x[: len(row)].float().numpy(), y[: len(row)].numpy())
            for x, y, row in zip(log_probs, greedy, rows, strict=True)
        ]


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats ``[B T]`` of ``targets`` under ``logits [B T W]``, in float32 or float64."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(2, targets[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)


def open_scorer(
    source: str, device: str = "cpu", batch_size: int = 8, knn: KNN | None = None
) -> Scorer:
    """Load a causal model with its tokenizer, for scoring.

    Args:
        source: Checkpoint, folder of a run, exported folder, or name of a model.
        device: Where to run: cpu, cuda, mps.
        batch_size: Texts at once.
        knn: Neighbours that are mixed into what the model says.

    Raises:
        ValueError: If there is no such model, it is not causal or has no tokenizer, the device is
            not there, or the neighbours' corpus cannot be used.
        FileNotFoundError: If there is no such corpus.
    """
    net, tokenizer = load(source)
    if not net.can_generate():
        raise ValueError(
            f"{source!r} is a {type(net).__name__}, which gives no likelihood of texts: scoring "
            "needs a causal model; statezoo test measures the others on their data."
        )
    try:
        scorer = Scorer(net.to(device), tokenizer, batch_size)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot run on device {device!r}: {error}") from error
    if knn is not None:
        from statezoo.evaluation.knn import attach

        scorer.knn, scorer.notes = attach(scorer, knn)
    return scorer


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
