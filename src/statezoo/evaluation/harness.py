"""A causal model as lm-evaluation-harness asks it: likelihoods, and texts up to a stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from statezoo.datamodules.tokenizers import CONFIG_FILE, Tokenizer
from statezoo.evaluation.scoring import Reading, Scorer

__all__ = ["Answers", "language_model"]

NEW_TOKENS = 256
"""Tokens that a task which does not say lets a model write, as the harness has it."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Tell = Callable[[int, int], None]


class Answers:
    """What the harness asks of a model, answered by a :class:`Scorer`.

    Every context begins with the tokenizer's ``bos_id``, as texts did in training. A continuation
    is scored on the tokens of context and continuation written together, from the first one that
    the context alone does not have: so a token that spans both counts, and no text is scored that
    would never be tokenised so. Requests of any length are read whole.

    Args:
        scorer: Model, tokenizer and batch size.
        tell: Called with the requests answered and those there are.
    """

    def __init__(self, scorer: Scorer, tell: Tell | None = None) -> None:
        super().__init__()
        self.scorer, self.tell = scorer, tell or (lambda done, of: None)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the nats of each continuation, and whether greedy decoding would write it."""
        pairs = [_pair(*request.args[:2]) for request in requests]
        contexts = {context: self._encode(context)[0] for context, _ in pairs}
        rows = [self._encode(context + more) for context, more in pairs]
        starts = [_common(contexts[c], ids) for (c, _), (ids, _) in zip(pairs, rows, strict=True)]
        return [
            (_sum(said, scored, start), bool((said.greedy | ~scored)[start:].all()))
            for (_, scored), said, start in zip(rows, self._read(rows), starts, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the nats of each text, from its first token on."""
        rows = [self._encode(request.args[0]) for request in requests]
        return [
            _sum(said, scored) for (_, scored), said in zip(rows, self._read(rows), strict=True)
        ]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each prompt until one of its stops, which is not part of the answer."""
        groups: dict[str, list[int]] = {}
        prompts = [self._encode(request.args[0])[0] for request in requests]
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        found, done = [""] * len(requests), 0
        for settings, members in groups.items():
            members.sort(key=lambda i: -len(prompts[i]))
            for at in range(0, len(members), self.scorer.batch_size):
                chosen = members[at : at + self.scorer.batch_size]
                texts = self._continue([prompts[i] for i in chosen], json.loads(settings))
                for i, text in zip(chosen, texts, strict=True):
                    found[i] = text
                done += len(chosen)
                self.tell(done, len(requests))
        return found

    def _encode(self, text: str) -> tuple[Any, Any]:
        ids, scored, _ = self.scorer.encode(text.encode("utf-8", "surrogatepass"))
        return ids, scored

    def _read(self, rows: Sequence[tuple[Any, Any]]) -> list[Reading]:
        """Read all rows, in groups of similar length."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: dict[int, Reading] = {}
        for at in range(0, len(order), self.scorer.batch_size):
            chosen = order[at : at + self.scorer.batch_size]
            readings = self.scorer.read([rows[i][0] for i in chosen])
            found.update(zip(chosen, readings, strict=True))
            self.tell(len(found), len(rows))
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _continue(self, prompts: Sequence[Any], asked: Mapping[str, Any]) -> list[str]:
        """Continue prompts, as one batch padded on the left."""
        net, tokenizer = self.scorer.net, self.scorer.tokenizer
        settings, stops = _settings(asked)
        longest = max(map(len, prompts)) + 1
        self.scorer.longest = max(self.scorer.longest, longest - 1)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, real) in enumerate(zip(prompts, mask, strict=True)):
            start = longest - len(prompt) - 1
            real[start:] = 1
            ids[row, start] = tokenizer.bos_id
            ids[row, start + 1 :] = torch.from_numpy(np.asarray(prompt).astype(np.int64))
        end = end_of_text(net, tokenizer)
        written = net.generate(
            ids.to(net.device),
            attention_mask=mask.to(net.device),
            pad_token_id=0,
            eos_token_id=end or None,
            stopping_criteria=StoppingCriteriaList([_Stops(stops, tokenizer, longest)]),
            **settings,
        )
        return [_cut(row.tolist(), tokenizer, end, stops) for row in written[:, longest:]]


def language_model(scorer: Scorer, tell: Tell | None = None) -> Any:
    """Return :class:`Answers` as a model of lm-evaluation-harness, for its ``simple_evaluate``."""
    from lm_eval.api.model import LM  # type: ignore[import-untyped,unused-ignore]

    class Model(Answers, LM):  # type: ignore[misc,unused-ignore]
        """The same, of the harness's class."""

    return Model(scorer, tell)


def _pair(context: str, continuation: str) -> tuple[str, str]:
    """Give the space between both to the continuation, as the harness does."""
    end = len(context.rstrip())
    return context[:end], context[end:] + continuation


def _common(one: Any, other: Any) -> int:
    """Return how many tokens two sequences have in common before they part."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differ[0]) if len(differ) else n


def _sum(said: Reading, scored: Any, start: int = 0) -> float:
    return float(said.log_probs[start:][scored[start:]].sum(dtype=np.float64))


def _settings(asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a task asks for as settings of ``generate``, and its stops."""
    settings = dict(asked)
    until = settings.pop("until", None) or []
    lengths = [settings.pop(name) for name in LENGTHS if name in settings]
    settings["max_new_tokens"] = int(lengths[0]) if lengths else NEW_TOKENS
    if not settings.setdefault("do_sample", False):
        for name in ("temperature", "top_p", "top_k"):
            settings.pop(name, None)
    return settings, [x for x in ([until] if isinstance(until, str) else until) if x]


def end_of_text(net: Any, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text, where the model or its tokenizer says so."""
    said = net.generation_config.eos_token_id
    found = [] if said is None else said if isinstance(said, list) else [said]
    name = json.loads(tokenizer.state_dict()[CONFIG_FILE]).get("eos_token")
    own = tokenizer.backend().token_to_id(name) if isinstance(name, str) else None
    return sorted({*found, *([] if own is None else [own])})


class _Stops(StoppingCriteria):
    """Stops each sequence where one of the texts has come up.

    Args:
        stops: The texts.
        tokenizer: Writes what was generated.
        start: Column of the first generated token.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer, start: int) -> None:
        self.stops, self.tokenizer, self.start = stops, tokenizer, start
        self.reach = 4 + max([len(stop.encode()) for stop in stops], default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say which sequences are done; a stop has no more tokens than bytes."""
        ends = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :].tolist()
        texts = [self.tokenizer.decode(end) for end in ends]
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _cut(ids: list[int], tokenizer: Tokenizer, end: Sequence[int], stops: Sequence[str]) -> str:
    """Return the text of ``ids`` before the first token that ends it, and before the stops."""
    length = next((i for i, token in enumerate(ids) if token in end), len(ids))
    text = tokenizer.decode(ids[:length])
    for stop in stops:
        text = text.partition(stop)[0]
    return text
