r"""kNN-LM: what followed like contexts of a corpus, mixed into what a trained model says.

.. math::
    p(w) = \lambda\, p_{kNN}(w) + (1 - \lambda)\, p_{LM}(w), \qquad
    p_{kNN}(w) \propto \sum_{i \in N_k,\ v_i = w} e^{-\lVert q - f_i \rVert^2 / \tau}

A key :math:`f_i` is what the last block's channel mixer reads, after its norm, and the value
:math:`v_i` is the token that follows there. Of a last block without channel mixer, as in Mamba, it
is what its mixer reads: the next best of the places that the paper tries. Search is exact.

Source: Khandelwal et al., Generalization through Memorization, arXiv:1911.00172v2, eq. 2 and 3 and
table 5; Xu et al., Why do Nearest Neighbor Language Models Work?, arXiv:2301.02828, on temperature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from statezoo.datamodules.records import Report
from statezoo.evaluation.documents import documents, encode
from statezoo.evaluation.scoring import TOKENS, Scorer, Stream
from statezoo.zoo.padding import find_padding

__all__ = ["KNN", "Datastore", "Near", "Tuned", "asked", "attach", "interpolate", "mix", "tune"]

QUERIES, KEYS = 128, 1 << 17
"""Distances that are held at once, 64 MiB in float32."""
HELD_OUT, LEAST = 4096, 100
"""Tokens that settings are tuned on at most, and tokens of the smallest corpus that will do."""
WEIGHTS = (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS = range(-8, 4)  # powers of two of the mean distance, for temperatures


@dataclass(frozen=True)
class KNN:
    """How neighbours are found and mixed in.

    Args:
        corpus: What ``statezoo score`` reads: text; FASTA for DNA; MIDI, MusicXML, ABC for music.
        weight: Share of the neighbours, 0 to 1; None finds it on the last part of the corpus.
        temperature: What squared distances are divided by, above 0, ``inf`` counts neighbours; None
            finds it as well.
        neighbours: Most contexts that a prediction asks; fewer where the corpus has fewer.
        tokens: Most tokens of the corpus that are read, from its start; each takes 4 bytes times
            the width of the model, and a search compares with all.

    Raises:
        ValueError: If a number is out of range.
    """

    corpus: str
    weight: float | None = None
    temperature: float | None = None
    neighbours: int = 1024
    tokens: int = 250_000

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise ValueError(f"knn_weight must be from 0 to 1, got {self.weight:g}.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"knn_temperature must be above 0, got {self.temperature:g}.")
        for name, least in (("neighbours", self.neighbours), ("tokens", self.tokens)):
            if least < 1:
                raise ValueError(f"knn_{name} must be at least 1, got {least}.")


def asked(
    corpus: str | None,
    weight: float | None,
    temperature: float | None,
    neighbours: int | None,
    tokens: int | None,
) -> KNN | None:
    """Return what the options of a command ask for; None is a default, and no corpus no kNN.

    Raises:
        ValueError: If a number is out of range, or given without a corpus.
    """
    options = {
        "weight": weight, "temperature": temperature, "neighbours": neighbours, "tokens": tokens,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if corpus is not None:
        return KNN(corpus, **given)
    if given:
        raise ValueError(f"knn_{next(iter(given))} needs a corpus: give --knn CORPUS as well.")
    return None


class Near(NamedTuple):
    """The nearest contexts of ``N`` queries, in no order.

    Attributes:
        distances: Squared L2 distances ``[N k]``.
        values: Tokens that followed ``[N k]``.
    """

    distances: Tensor
    values: Tensor


class Datastore:
    """Contexts with the token that followed each, searched exactly.

    Args:
        keys: ``[n D]``, float32 or float64.
        values: ``[n]`` tokens.
        neighbours: Most neighbours of a query.
    """

    def __init__(self, keys: Tensor, values: Tensor, neighbours: int) -> None:
        self.keys, self.values = keys, values
        self.squares = keys.square().sum(1)
        self.k = min(neighbours, len(keys))

    def nearest(self, queries: Tensor) -> Near:
        """Find the nearest contexts of ``queries [N D]``; of equally far ones any."""
        parts = [self._nearest(part) for part in queries.to(self.keys.dtype).split(QUERIES)]
        return Near(*(torch.cat(found) for found in zip(*parts, strict=True)))

    def _nearest(self, queries: Tensor) -> Near:
        distances = queries.new_zeros(len(queries), 0)
        at = torch.zeros_like(distances, dtype=torch.long)
        for start in range(0, len(self.keys), KEYS):
            keys, squares = self.keys[start : start + KEYS], self.squares[start : start + KEYS]
            part = torch.addmm(squares[None], queries, keys.T, alpha=-2)  # |f|^2 - 2 q f
            part, index = part.topk(min(self.k, len(keys)), largest=False, sorted=False)
            distances, at = torch.cat([distances, part], 1), torch.cat([at, index + start], 1)
            if distances.shape[1] > self.k:
                distances, index = distances.topk(self.k, largest=False, sorted=False)
                at = at.gather(1, index)
        distances = (distances + queries.square().sum(1, keepdim=True)).clamp(min=0)
        return Near(distances, self.values[at])


def mix(logits: Tensor, near: Near, weight: float, temperature: float) -> Tensor:
    """Return the log-probabilities ``[N W]`` of ``logits [N W]`` and neighbours together.

    In float32 at least; minus infinity where both say that a token cannot follow.
    """
    logits = logits.to(torch.promote_types(logits.dtype, near.distances.dtype))
    shares = (near.distances / -temperature).softmax(1).to(logits.dtype)
    found = torch.zeros_like(logits).scatter_add_(1, near.values, shares)
    return _both(logits.log_softmax(1), found.log_(), weight)


def _both(model: Tensor, neighbours: Tensor, weight: float) -> Tensor:
    """Mix log-probabilities."""
    share = torch.tensor(weight, dtype=model.dtype, device=model.device)
    return torch.logaddexp(model + (-share).log1p(), neighbours + share.log())


class Tuned(NamedTuple):
    """Settings that were found, and what they are good for.

    Attributes:
        weight: Share of the neighbours.
        temperature: What squared distances are divided by.
        tokens: Tokens that were held out.
        model_nats: Nats per held-out token of the model alone.
        nats: The same with neighbours out of the corpus before.
    """

    weight: float
    temperature: float
    tokens: int
    model_nats: float
    nats: float


def tune(
    near: Near, targets: Tensor, log_probs: Tensor, weight: float | None, temperature: float | None
) -> Tuned:
    """Find the weight and the temperature, where they are None, at which targets cost least.

    Args:
        near: Neighbours of ``N`` contexts.
        targets: The tokens ``[N]`` that follow.
        log_probs: Their log-probabilities ``[N]`` under the model alone.
        weight: Share of the neighbours, or None to try :data:`WEIGHTS`.
        temperature: Temperature, or None to try powers of two of the mean distance.
    """
    distances, model = near.distances.cpu().double(), log_probs.cpu().double()
    scale = float(distances.mean()) or 1.0
    grid = [float(f"{scale * 2.0**step:.3g}") for step in STEPS]  # as short as they are told
    hits = (near.values == targets[:, None]).cpu()
    best = (math.inf, 0.0, 0.0)
    for tau in grid if temperature is None else [temperature]:
        shares = (distances / -tau).softmax(1)
        found = (shares * hits).sum(1).log()
        for share in WEIGHTS if weight is None else [weight]:
            nats = -float(_both(model, found, share).mean())
            if nats < best[0] or not best[2]:
                best = (nats, share, tau)
    return Tuned(best[1], best[2], len(targets), -float(model.mean()), best[0])


class _Keys:
    """Holds the keys of what a network reads, until they are taken."""

    def __init__(self, net: Any) -> None:
        block = net.base_model.layers[-1]
        part: nn.Module = block.mixer if block.channel is None else block.channel
        self.held: Tensor | None = None
        self.hook = part.register_forward_pre_hook(self._hold)

    def _hold(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        self.held = args[0]

    def take(self) -> Tensor:
        """Return the keys ``[B T D]`` of the last call; where it was padded, ``[1 n D]``."""
        if self.held is None:
            raise RuntimeError("the network has not run since its keys were taken.")
        found, self.held = self.held, None
        return found


def interpolate(net: Any, store: Datastore, weight: float, temperature: float) -> None:
    """Make a network's logits the log-probabilities of model and neighbours together.

    Whoever calls the network has these: scores, requests of the harness, generation. Weight 0
    leaves the network as it is.

    Args:
        net: Causal network.
        store: Contexts of the corpus.
        weight: Share of the neighbours.
        temperature: What squared distances are divided by.
    """
    if not weight:
        return
    read = _Keys(net)

    def mixed(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        ids = args[0] if args else kwargs["input_ids"]
        padding = find_padding(kwargs.get("attention_mask"), *ids.shape)
        keys = read.take() if padding is None else padding.unpack(read.take())
        B, T, _ = out.logits.shape  # those asked for, which are the last ones
        near = store.nearest(keys[:, -T:].flatten(0, 1))
        logits = mix(out.logits.flatten(0, 1), near, weight, temperature)
        out.logits = logits.unflatten(0, (B, T))
        return out

    net.register_forward_hook(mixed, with_kwargs=True)


class Corpus(NamedTuple):
    """What a model says of the tokens of a corpus, those that are scored.

    Attributes:
        keys: ``[n D]``.
        values: The tokens ``[n]``.
        log_probs: Their log-probabilities ``[n]`` under the model alone.
    """

    keys: Tensor
    values: Tensor
    log_probs: Tensor


def attach(scorer: Scorer, knn: KNN) -> tuple[dict[str, Any], list[str]]:
    """Mix neighbours into all that a scorer's network says from now on.

    Where weight or temperature is to be found, the last tenth of the corpus, at most
    :data:`HELD_OUT` tokens, is predicted with neighbours out of what stands before it; then all of
    the corpus is kept. That measures likeness within the corpus: a text that is less like it than
    the corpus is like itself would do with a lower weight.

    Args:
        scorer: Model and tokenizer.
        knn: Corpus and settings.

    Returns:
        What results depend on, for JSON, and sentences for the user.

    Raises:
        ValueError: If there is no text in the corpus, it is too short to tune on, or the model
            cannot read it.
        FileNotFoundError: If there is no such file.
    """
    report = Report()
    rows, more = _read(scorer, knn, report)
    if not any(map(len, rows)):
        raise ValueError("\n".join([f"there is no text in {knn.corpus} (--knn).", *report[:10]]))
    weight, temperature, tuned = knn.weight, knn.temperature, None
    least = LEAST if weight is None or temperature is None else 1
    n = int(sum(scorer.scored(row).sum() for row in rows))
    if n < least:
        raise ValueError(
            f"tuning needs at least {LEAST} tokens, a tenth of them held out, and {knn.corpus} "
            f"(--knn) has {n}: give a longer one, or --knn_weight and --knn_temperature."
            if n
            else f"{knn.corpus} (--knn) has no token that is scored: N of DNA are not."
        )
    corpus = _contexts(scorer, rows)
    notes = [f"skipped {line}" for line in report[:20]]
    if more:
        notes.append(
            f"kNN: the first {knn.tokens} tokens of {knn.corpus} are kept; --knn_tokens N keeps N."
        )
    if weight is None or temperature is None:
        tuned = _tune(corpus, knn)
        weight, temperature = tuned.weight, tuned.temperature
    store = Datastore(corpus.keys, corpus.values, knn.neighbours)
    interpolate(scorer.net, store, weight, temperature)
    facts = {
        "corpus": knn.corpus, "tokens": n, "neighbours": store.k, "weight": weight,
        "temperature": temperature, "tuned": None if tuned is None else tuned._asdict(),
    }  # fmt: skip
    return facts, [*notes, _sentence(knn, n, tuned)]


def _sentence(knn: KNN, n: int, tuned: Tuned | None) -> str:
    """Say what is mixed in, and how to have it again."""
    text = f"kNN: {n} tokens of {knn.corpus}"
    if tuned is None:
        return f"{text}, weight {knn.weight:g}, temperature {knn.temperature:g}."
    return (
        f"{text}; tuned on the last {tuned.tokens} of them, held out: {tuned.model_nats:.4f} nats "
        f"per token without neighbours, {tuned.nats:.4f} with --knn_weight {tuned.weight:g} "
        f"--knn_temperature {tuned.temperature:g}, which is used; giving these skips the tuning."
    )


def _tune(corpus: Corpus, knn: KNN) -> Tuned:
    """Predict the last part of a corpus with neighbours out of the part before."""
    cut = len(corpus.values) - min(len(corpus.values) // 10, HELD_OUT)
    before = Datastore(corpus.keys[:cut], corpus.values[:cut], knn.neighbours)
    near = before.nearest(corpus.keys[cut:])
    return tune(near, corpus.values[cut:], corpus.log_probs[cut:], knn.weight, knn.temperature)


def _read(scorer: Scorer, knn: KNN, report: Report) -> tuple[list[NDArray[Any]], bool]:
    """Return the ids of each document, ``knn.tokens`` in all, and whether there are more."""
    rows: list[NDArray[Any]] = []
    left = knn.tokens
    for parts in documents(knn.corpus, scorer.tokenizer, report):
        pieces = []
        for ids, _ in encode(scorer.tokenizer, parts):
            pieces.append(ids[:left])
            left -= len(ids)
            if left < 0:
                return [*rows, np.concatenate(pieces)], True
        if pieces:
            rows.append(np.concatenate(pieces))
    return rows, False


@torch.inference_mode()
def _contexts(scorer: Scorer, rows: Sequence[NDArray[Any]]) -> Corpus:
    """Read every document once, long ones piece by piece with the state carried on."""
    net = scorer.net
    starts = np.cumsum([0, *map(len, rows)])
    n, dtype = int(starts[-1]), torch.promote_types(net.dtype, torch.float32)
    keys = torch.empty(n, net.config.d_model, dtype=dtype, device=net.device)
    log_probs = torch.empty(n, dtype=dtype)
    values = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    held = _Keys(net)
    for batch in _batches(rows, scorer.batch_size):
        padded = pad_sequence([values[starts[i] : starts[i + 1]] for i in batch], batch_first=True)
        stream = Stream(net, torch.full((len(batch),), scorer.tokenizer.bos_id))
        done = 0
        for piece in padded.split(stream.step, 1):
            said, found = stream.read(piece)[0], held.take()
            for row, i in enumerate(batch):
                real = min(piece.shape[1], len(rows[i]) - done)
                if real > 0:
                    at = slice(int(starts[i]) + done, int(starts[i]) + done + real)
                    keys[at], log_probs[at] = found[row, :real], said[row, :real]
            done += piece.shape[1]
    held.hook.remove()
    scored = torch.from_numpy(scorer.scored(values.numpy()))
    if not scored.all():
        keys, values, log_probs = keys[scored.to(net.device)], values[scored], log_probs[scored]
    return Corpus(keys, values.to(net.device), log_probs.to(net.device))


def _batches(rows: Sequence[NDArray[Any]], size: int) -> Iterator[list[int]]:
    """Put documents of like length together; long ones run alone."""
    order = sorted((i for i, row in enumerate(rows) if len(row)), key=lambda i: -len(rows[i]))
    while order:
        together = 1 if len(rows[order[0]]) > TOKENS else size
        yield order[:together]
        order = order[together:]
