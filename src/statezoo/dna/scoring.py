"""What a model says of every base, and of alternative ends of sequences that begin alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import DNATokenizer, Nucleotides
from statezoo.zoo.cache import states_of

__all__ = [
    "Kind",
    "Model",
    "Prefix",
    "extend",
    "masked_log_probs",
    "nll",
    "open_model",
    "score_ends",
]

PIECE = 1 << 16
"""Tokens of a batch that are worked on at once; the state goes from one piece to the next."""

Kind = Literal["causal", "masked", "classifier"]


class Model(NamedTuple):
    """A trained network with the tokenizer it reads by.

    Attributes:
        net: Network in evaluation mode.
        tokenizer: Tokenizer of :mod:`statezoo.datamodules.dna`.
        kind: What it predicts: the next base, hidden bases, or a class.
    """

    net: Any
    tokenizer: Any
    kind: Kind

    @property
    def fingerprint(self) -> str:
        """Hash of weights and mixers."""
        found = hashlib.sha256(str(self.net.config.layer_mixers).encode())
        for name, x in self.net.state_dict().items():
            found.update(name.encode())
            found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def ids(self, bases: NDArray[np.uint8]) -> Tensor:
        """Return the tokens of ASCII bases, ``[T]``."""
        return torch.from_numpy(self.tokenizer.encode_array(bases)[0].astype(np.int64))

    def first(self, before: NDArray[np.uint8]) -> Tensor:
        """Return what is read first, ``[1]``: the base before a window, or ``[BOS]`` if none is."""
        return self.ids(before) if len(before) else torch.tensor([self.tokenizer.bos_id])

    @property
    def scored(self) -> Tensor:
        """Which tokens are bases, ``[W]`` bool."""
        found = torch.zeros(self.net.config.vocab_size, dtype=torch.bool)
        found[list(self.tokenizer.scored)] = True
        return found.to(self.net.device)


def open_model(
    source: str | Model,
    device: str = "cpu",
    command: str = "this",
    kinds: Sequence[Kind] = ("causal", "masked", "classifier"),
    single: bool = True,
) -> Model:
    """Load a model of DNA and say early where it cannot do what is asked.

    Args:
        source: Checkpoint, folder of a run, exported folder, or Hub id; or an opened model.
        device: Where to run.
        command: Who asks, for messages.
        kinds: Kinds of model that can answer.
        single: Whether a token must be a base.

    Raises:
        ValueError: If it is no model of DNA, or of another kind.
    """
    if isinstance(source, Model):
        model = source
    else:
        from statezoo.generate import load

        net, tokenizer = load(source)
        model = Model(net, tokenizer, _kind(net))
    name = "the model" if isinstance(source, Model) else repr(source)
    _check_alphabet(model.tokenizer, name, command, single)
    if model.kind not in kinds:
        raise ValueError(
            f"{command} needs a {' or '.join(kinds)} model; {name} is a {model.kind} one "
            f"({type(model.net).__name__})."
        )
    try:
        return model._replace(net=model.net.to(device).eval())
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot run on device {device!r}: {error}") from error


def _kind(net: Any) -> Kind:
    if isinstance(net, zoo.StateZooForMaskedLM):
        return "masked"
    return "classifier" if isinstance(net, zoo.StateZooForSequenceClassification) else "causal"


def _check_alphabet(tokenizer: Any, name: str, command: str, single: bool) -> None:
    kind = tokenizer.kind
    if not isinstance(tokenizer, DNATokenizer):
        raise ValueError(
            f"{command} needs a model of DNA; {name} was made with Text ({kind}): train one with "
            "statezoo fit --data DNA."
        )
    if single and not isinstance(tokenizer, Nucleotides):
        raise ValueError(
            f"{command} needs a model that reads single bases; {name} reads {kind} tokens, which "
            "have no likelihood per base: train one with --data.tokenizer characters."
        )


class Prefix(NamedTuple):
    """Sequences read so far.

    Attributes:
        cache: States after the last token.
        log_probs: Nats for the next token, ``[B W]``.
    """

    cache: Cache
    log_probs: Tensor


@torch.inference_mode()
def extend(model: Model, ids: Tensor, before: Prefix | None = None) -> Prefix:
    """Read tokens ``[B T]`` on from ``before``, which stays as it was.

    Logits are computed for the last token alone.
    """
    net = model.net
    cache = DynamicCache(config=net.config) if before is None else zoo.fork(before.cache)
    log_probs = None if before is None else before.log_probs
    for piece in _pieces(ids.to(net.device)):
        logits = net(piece, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        log_probs = logits.float().log_softmax(-1)
    if log_probs is None:
        raise ValueError("extend needs at least one token.")
    return Prefix(cache, log_probs)


@torch.inference_mode()
def score_ends(model: Model, prefix: Prefix, rows: Sequence[int], ends: list[Tensor]) -> Tensor:
    """Sum the log-likelihoods of several ends of sequences that begin alike.

    Ends run as one batch from copies of the state; what is no base is read but not scored.

    Args:
        model: Causal model.
        prefix: Beginnings, read once.
        rows: Which beginning each end belongs to.
        ends: Tokens of each end, of any lengths, also none.

    Returns:
        Nats of each end, float64 on the CPU.
    """
    device = model.net.device
    ids = pad_sequence(ends, batch_first=True).to(device)  # padding is after all that is scored
    lengths = torch.tensor([len(end) for end in ends], device=device)
    inside = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    at = torch.tensor(rows, device=device)
    start = Prefix(_select(prefix.cache, at), prefix.log_probs[at])
    found = token_log_probs(model, ids, start)
    return found.masked_fill(~(inside & model.scored[ids]), 0).cpu().double().sum(1)


@torch.inference_mode()
def token_log_probs(model: Model, ids: Tensor, before: Prefix) -> Tensor:
    """Return the nats of each of the tokens ``[B T]`` that follow ``before``, whose cache is used.

    Returns:
        ``[B T]`` float32, at most 0.
    """
    if not ids.shape[1]:
        return before.log_probs.new_zeros(ids.shape)
    found = [before.log_probs.gather(1, ids[:, :1])]
    for piece, targets in zip(_pieces(ids[:, :-1]), _pieces(ids[:, 1:]), strict=True):
        log_probs = model.net(piece, past_key_values=before.cache).logits.float().log_softmax(-1)
        found.append(log_probs.gather(2, targets[..., None])[..., 0])
    return torch.cat(found, 1)


def nll(
    model: Model,
    bases: Sequence[NDArray[np.uint8]],
    before: Sequence[NDArray[np.uint8]] | None = None,
) -> list[NDArray[np.float32]]:
    """Return the nats of every base given those before it, NaN where it is not A, C, G or T.

    Sequences run as one batch; a long one goes piece by piece with the state carried on, so that
    memory is bounded.

    Args:
        model: Causal model that reads single bases.
        bases: ASCII sequences, any case.
        before: The base before each, or none where a contig begins: then, and by default, ``[BOS]``
            is read first.
    """
    ids = [model.ids(x) for x in bases]
    none = np.zeros(0, dtype=np.uint8)
    start = torch.stack([model.first(x) for x in before or [none] * len(ids)])
    padded = pad_sequence(ids, batch_first=True).to(model.net.device)
    found = -token_log_probs(model, padded, extend(model, start))
    found = found.masked_fill(~model.scored[padded], torch.nan).cpu()
    return [x[: len(own)].numpy() for x, own in zip(found, ids, strict=True)]


@torch.inference_mode()
def masked_log_probs(model: Model, ids: list[Tensor], hidden: list[list[int]]) -> list[Tensor]:
    """Return the nats of every token at places that a masked model does not see.

    Args:
        model: Masked model.
        ids: Tokens of each sequence, of any lengths.
        hidden: Places of each that are hidden, all at once.

    Returns:
        ``[places W]`` of each sequence, float64 on the CPU.
    """
    rows = []
    for own, places in zip(ids, hidden, strict=True):
        row = own.clone()
        row[places] = model.tokenizer.mask_id
        rows.append(row)
    logits = model.net(**padded_batch(rows, model.net.device)).logits
    found = (x[places].cpu().double() for x, places in zip(logits, hidden, strict=True))
    return [x.log_softmax(-1) for x in found]


def padded_batch(ids: list[Tensor], device: Any) -> dict[str, Tensor]:
    """Stack tokens, padded on the right, with a mask where lengths differ."""
    lengths = [len(x) for x in ids]
    batch = {"input_ids": pad_sequence(ids, batch_first=True).to(device)}
    if len({*lengths}) > 1:
        batch["attention_mask"] = pad_sequence(
            [torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True
        ).to(device)
    return batch


def _pieces(ids: Tensor) -> list[Tensor]:
    """Cut tokens ``[B T]`` along time, to bound memory."""
    if not ids.shape[1]:
        return []
    return list(ids.split(max(PIECE // ids.shape[0], 1024), dim=1))


def _select(cache: Cache, rows: Tensor) -> Cache:
    """Copy the sequences ``rows`` of a cache."""
    twin = zoo.fork(cache)
    for layer in states_of(twin):
        layer.reorder_cache(rows)
    return twin
