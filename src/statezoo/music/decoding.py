"""Sampling of music: what the grammar and the task allow, one token at a time, in several rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.datamodules.music.base import Ids, MusicTokenizer

__all__ = ["Row", "Rules", "Sampling", "open_model", "sample", "score", "state_after"]

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

DRUMS = -1
ONSETS = ("Pitch", "PitchDrum", "NoteOn", "DrumOn")
TIMES = ("Bar", "Position", "TimeShift")
ENDS = ("NoteOff", "DrumOff")
CROWD = 192
"""Tokens at one time after which time must go on, if it may."""


class Sampling(NamedTuple):
    """How a token is drawn.

    Attributes:
        temperature: 0 takes the likeliest, 1 draws from the model's probabilities.
        top_p: Draw from the likeliest tokens that have this much probability together.
        top_k: Draw from this many likeliest tokens; 0 from all.
        seed: The same seed gives the same tokens; row ``i`` does not depend on how many there are.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError where a number is out of range."""
        if min(self.temperature, self.top_k, self.seed) < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "sampling needs temperature, top_k and seed of at least 0 and top_p in (0, 1]; got "
                f"{self.temperature:g}, {self.top_k}, {self.seed}, {self.top_p:g}."
            )

    def weights(self, scores: Floats) -> Floats:
        """``[W]`` probabilities to draw from, of scores ``[W]`` of which some are ``-inf``."""
        best = int(scores.argmax())
        if self.temperature == 0:
            likeliest: Floats = (np.arange(len(scores)) == best).astype(np.float64)
            return likeliest
        weights: Floats = np.exp((scores - scores[best]) / self.temperature)
        weights /= weights.sum()
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        keep = (before < self.top_p) | (np.arange(len(order)) == 0)
        if self.top_k:
            keep[self.top_k :] = False
        weights[order[~keep]] = 0
        weights /= weights.sum()
        return weights


@dataclass
class Row:
    """One of the sequences that are sampled side by side.

    Attributes:
        number: Which one.
        state: Where the tokenizer's grammar stands; ``state.tick`` is the time reached.
        ids: Tokens after the prompt.
        log_probs: Of each of them: the model's, at temperature 1, among the tokens that were
            allowed.
        still: Tokens since time went on.
        mask: ``[W]`` what may come next, once it was found out.
    """

    number: int
    state: Any
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    still: int = 0
    mask: Mask | None = None

    @property
    def log_prob(self) -> float:
        """Of all tokens together, in nats."""
        return sum(self.log_probs)

    def after(self, token: int, state: Any, log_prob: float) -> Row:
        """The row with one more token."""
        still = self.still + 1 if state.tick == self.state.tick else 0
        ids, log_probs = [*self.ids, token], [*self.log_probs, log_prob]
        return Row(self.number, state, ids, log_probs, still)


class Rules:
    """What may come next: the grammar of the tokens, and what the task asks.

    Before ``start`` nothing begins; what sounds may end. The meter stays what it is. No token
    passes ``end``, unless the tokens' grid has no point left before it: the one that does is last.

    Args:
        tokenizer: Whose tokens.
        end: Tick at which the music ends.
        start: Tick from which notes may begin.
        programs: Instruments that may play, 0 to 127, -1 for drums; None for all.
        pitches: Lowest and highest pitch, drums apart; None for all.

    Raises:
        ValueError: If no token is left to write a note with.
    """

    def __init__(
        self,
        tokenizer: MusicTokenizer,
        *,
        end: int,
        start: int = 0,
        programs: Collection[int] | None = None,
        pitches: tuple[int, int] | None = None,
    ) -> None:
        self.tokenizer, self.start, self.end = tokenizer, start, end
        single = {name: token for token, name in enumerate(tokenizer.names) if "+" not in name}
        self._parts = [
            [single.get(part, token) for part in name.split("+")]
            for token, name in enumerate(tokenizer.names)
        ]
        kinds = np.array([name.partition("_")[0] for name in tokenizer.names])
        values = [name.split("+")[0].partition("_")[2] for name in tokenizer.names]
        merged = np.array([len(parts) > 1 for parts in self._parts])
        self._onset, self._end = (np.isin(kinds, names) & ~merged for names in (ONSETS, ENDS))
        self._hold = kinds == "Hold"
        self._place = kinds == "Position"
        self._time = np.isin(kinds, TIMES)
        self._walked = self._time | merged
        signature = kinds == "TimeSig"
        self._meter = {v: ~signature | (np.array(values) == v) for v in {*values}}
        quiet = (*TIMES, *ENDS, "TimeSig", "Rest", *(["Program"] if self._end.any() else []))
        self._before = np.isin(kinds, quiet)
        self._may = np.ones(len(kinds), dtype=bool)
        self._programs = None if programs is None else {*programs}
        self._program = {int(values[i]): int(i) for i in np.flatnonzero(kinds == "Program")
                         if not merged[i]}  # fmt: skip
        if self._programs is not None:
            self._check_programs()
            if not self._end.any():
                others = [i for p, i in self._program.items() if p not in self._programs]
                self._may[others] = False
        if pitches is not None:
            self._narrow(pitches, kinds, values)

    def _check_programs(self) -> None:
        wanted = self._programs or set()
        if not self._program:
            raise ValueError(
                "the model's tokens name no instruments, so programs cannot be chosen: train with "
                "--data.programs true, or leave programs out."
            )
        if not wanted or not wanted <= self._program.keys():
            raise ValueError(
                f"programs must be numbers of General MIDI, 0 to 127, or -1 for drums; got "
                f"{', '.join(map(str, sorted(wanted))) or 'none'}."
            )

    def _narrow(self, pitches: tuple[int, int], kinds: Any, values: Sequence[str]) -> None:
        low, high = pitches
        melodic = np.flatnonzero(np.isin(kinds, ("Pitch", "NoteOn")) & self._onset).tolist()
        inside = [low <= int(values[i]) <= high for i in melodic]
        self._may[np.array(melodic)[~np.array(inside)]] = False
        if not any(inside):
            known = sorted(int(values[i]) for i in melodic)
            raise ValueError(
                f"no pitch of the model's tokens, {known[0]} to {known[-1]}, is in the range {low} "
                f"to {high}."
            )

    def __call__(self, row: Row) -> Mask:
        """``[W]`` which tokens may come next in a row."""
        state = row.state
        now = self._now(state)
        mask: Mask = self.tokenizer.allowed(state) & (now | self._walked)
        over = np.zeros_like(mask)
        for token in np.flatnonzero(mask & self._walked).tolist():
            tick = self._walk(state, token, now)
            mask[token] = tick is not None
            over[token] = tick is not None and tick > self.end
        if (mask & self._time & ~over).any() or not (mask & self._time).any():
            mask &= ~over
        if row.still >= CROWD and (mask & self._time).any():
            mask &= self._time
        return mask

    def _now(self, state: Any) -> Mask:
        """Single events that fit here, wherever they lead."""
        mask = self._may.copy()
        if state.tick < self.start:
            mask &= self._before
        if state.tick == self.start:
            mask &= ~self._hold
        if state.tick >= self.end:
            mask &= ~self._onset
        if hasattr(state, "meter"):
            mask &= self._meter.get("{}/{}".format(*state.meter), True)
        if self._programs is not None and self._end.any():
            sounding = {program for program, _, _ in state.active}
            for program, token in self._program.items():
                mask[token] &= program in self._programs or program in sounding
            if state.program not in self._programs:
                mask &= ~self._onset
        return mask

    def _walk(self, state: Any, token: int, now: Mask) -> int | None:
        """Tick that a token leads to; None if one of its events does not fit."""
        for place, part in enumerate(self._parts[token]):
            if not (self._now(state) if place else now)[part]:
                return None
            state = self.tokenizer.advance(state, part)
            if self._place[part] and state.tick < self.start:
                return None
        return int(state.tick)


def open_model(source: Any, purpose: str, device: str = "cpu") -> tuple[Any, MusicTokenizer]:
    """Network and tokenizer of a checkpoint, a run's folder, an exported folder or a Hub name.

    Args:
        source: Where the model is, or a pair of network and tokenizer.
        purpose: What needs it, for the message.
        device: Where to run.

    Raises:
        ValueError: If it does not write music, or the device is not there.
    """
    from statezoo.arguments import find_weights
    from statezoo.generate import load

    net, tokenizer = load(find_weights(source)) if isinstance(source, str) else source
    if not isinstance(tokenizer, MusicTokenizer):
        raise ValueError(
            f"{purpose} needs a model of music, and this one was made with {tokenizer.kind} "
            "tokens: statezoo fit --data Music trains one."
        )
    if not net.can_generate():
        raise ValueError(f"{purpose} needs a causal model, got a {type(net).__name__}.")
    try:
        return net.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot run on device {device!r}: {error}") from error


def state_after(tokenizer: MusicTokenizer, ids: Iterable[int]) -> Any:
    """Where the grammar stands after ``ids``."""
    state = tokenizer.start()
    for token in ids:
        state = tokenizer.advance(state, int(token))
    return state


def sample(
    net: Any,
    tokenizer: MusicTokenizer,
    prompt: Ids | Sequence[int],
    *,
    rows: int,
    end: int,
    allowed: Callable[[Row], Mask],
    sampling: Sampling = Sampling(),  # noqa: B008  # immutable
    forced: Callable[[Row], int | None] | None = None,
) -> list[Row]:
    """Continue a prompt in several ways, each until time reaches ``end``.

    A token after which nothing would be allowed is not drawn.

    Args:
        net: Causal network, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: ``[T]`` ids that all rows begin with, without BOS.
        rows: Number of continuations.
        end: Tick at which a row is complete.
        allowed: ``[W]`` which tokens may come next in a row; usually ``Rules``.
        sampling: How to draw.
        forced: The token that comes next in a row whatever the model says, allowed or not, or None.

    Returns:
        The rows, in order.

    Raises:
        ValueError: If nothing is allowed, or a number is out of range.
    """
    import torch

    sampling.check()
    if rows < 1:
        raise ValueError(f"sampling needs at least one row, got {rows}.")
    state = state_after(tokenizer, prompt)
    found = [Row(number, state) for number in range(rows)]
    random = [np.random.default_rng([sampling.seed, number]) for number in range(rows)]
    with torch.inference_mode():
        ids = torch.tensor([[tokenizer.bos_id, *map(int, prompt)]], device=net.device)
        out = net(ids, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].expand(rows, -1)
        cache.batch_repeat_interleave(rows)
        alive = [number for number in range(rows) if state.tick < end]
        while alive:
            for number, scores in zip(alive, logits.double().cpu().numpy(), strict=True):
                token = None if forced is None else forced(found[number])
                draw = _Draw(tokenizer, end, allowed, sampling, random[number])
                found[number] = draw(found[number], scores, token)
            stay = [place for place, number in enumerate(alive) if found[number].state.tick < end]
            if len(stay) < len(alive):
                alive = [alive[place] for place in stay]
                if not alive:
                    break
                cache.batch_select_indices(torch.tensor(stay, device=net.device))
            last = torch.tensor([[found[number].ids[-1]] for number in alive], device=net.device)
            logits = net(last, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    return found


class _Draw(NamedTuple):
    """One token more for a row."""

    tokenizer: MusicTokenizer
    end: int
    allowed: Callable[[Row], Mask]
    sampling: Sampling
    random: np.random.Generator

    def __call__(self, row: Row, scores: Floats, forced: int | None) -> Row:
        mask = (self.allowed(row) if row.mask is None else row.mask).copy()
        if forced is not None:
            mask[forced] = True
            return self._extend(row, _log_probs(scores, mask), forced)
        if not mask.any():
            raise ValueError(
                f"nothing may follow at tick {row.state.tick} of row {row.number}: widen the pitch "
                "range or allow more programs."
            )
        log_probs = _log_probs(scores, mask)
        open_scores = log_probs.copy()
        while mask.any():
            weights = np.cumsum(self.sampling.weights(open_scores))
            place = np.searchsorted(weights, self.random.random() * weights[-1], side="right")
            token = int(place)
            new = self._extend(row, log_probs, token)
            new.mask = self.allowed(new) if new.state.tick < self.end else None
            if new.mask is None or new.mask.any():
                return new
            mask[token], open_scores[token] = False, -np.inf
        raise ValueError(f"every token at tick {row.state.tick} of row {row.number} leads nowhere.")

    def _extend(self, row: Row, log_probs: Floats, token: int) -> Row:
        state = self.tokenizer.advance(row.state, token)
        return row.after(token, state, float(log_probs[token]))


def _log_probs(scores: Floats, mask: Mask) -> Floats:
    """``[W]`` log-probabilities among the tokens of the mask, ``-inf`` outside."""
    masked = np.where(mask, scores, -np.inf)
    highest = masked.max()
    found: Floats = masked - highest - np.log(np.exp(masked - highest).sum())
    return found


def score(net: Any, tokenizer: MusicTokenizer, ids: Ids | Sequence[int]) -> Floats:
    """``[T]`` log-probability of each id after BOS and those before, without any mask."""
    import torch

    whole = torch.tensor([[tokenizer.bos_id, *map(int, ids)]], device=net.device)
    with torch.inference_mode():
        log_probs = net(whole[:, :-1]).logits.double().log_softmax(-1)
        found: Floats = log_probs.gather(-1, whole[:, 1:, None])[0, :, 0].cpu().numpy()
    return found
