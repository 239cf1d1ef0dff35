"""What mixers do with their memories on a given input: decay, writes, routes, attention.

Mixers are asked nothing and compute nothing more: while :func:`observe` is on, the operations of
``kernels/`` that their files import by name are replaced by ones that note what they are given and
then do the same. So what is seen is what the memory got, whatever a mixer made it of. Operations
called through a helper in another file are not seen: they are not the mixer's own memory.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from statezoo.kernels.attention import attention
from statezoo.kernels.gated_delta_rule import gated_delta_rule
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.kernels.selective_scan import selective_scan
from statezoo.zoo.mixer import Mixer
from statezoo.zoo.model import StateZooModel
from statezoo.zoo.mom import MoM
from statezoo.zoo.routing import Route, Slots

FLOOR = -100.0
"""Log decay that stands for forgetting everything."""


@dataclass(frozen=True)
class Seen:
    r"""What one mixer did with one sequence, read in one direction.

    Positions are those of the input, whatever the direction. Heads are those of the recurrence: one
    per channel in Mamba, two per head in Mamba-3 (its two-point write), and those of all memories,
    one memory after the other, in MoM; a memory neither fades nor is written where a token is not
    sent to it.

    Attributes:
        layer: Which block, from 0.
        mixer: Name of the mixer.
        view: ``""``, or what is read: ``"backward"``, ``"other strand"``, or both.
        memories: How many memories the heads belong to.
        decay: Part of a head's memory that a token leaves, ``[H T]`` in [0, 1], mean over key
            channels; the size of decays that may be negative.
        memory: Tokens until what is written at a position has faded to 1/e, ``[H T]``, by
            :func:`lifetime`; median over key channels
            (the lower, of two). Only decays count, not what is overwritten.
        longest: The same of the slowest channel.
        write: How much a token writes, ``[H T]``, see ``write_is``.
        write_is: ``"beta"``, the part of the error that a delta rule corrects (mean over the writes
            of a token), or ``"norm"``, the norm of what is added to the memory: ``|k| |v|``, step
            sizes and input gates included.
        router: Weight of each memory that there is a choice of, ``[M T]``; sums to 1 over them.
        attention: Weight ``[H T T]`` that a position (row) gives to each that it sees.
    """

    layer: int
    mixer: str
    view: str = ""
    memories: int = 1
    decay: Tensor | None = None
    memory: Tensor | None = None
    longest: Tensor | None = None
    write: Tensor | None = None
    write_is: str = ""
    router: Tensor | None = None
    attention: Tensor | None = None


class Gates(NamedTuple):
    """What a call of a recurrence shows: log decays ``[B T H *channel]``, writes ``[B T H]``."""

    g: Tensor
    write: Tensor
    write_is: str


def _of_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> Gates:
    write = beta.float() if k.ndim == 4 else beta.float().mean(2)
    return Gates(torch.zeros_like(write) if g is None else g, write, "beta")


def _of_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Gates:
    shared = v.shape[2] // k.shape[2]
    write = k.float().norm(dim=-1).repeat_interleave(shared, 2) * v.float().norm(dim=-1)
    return Gates(torch.zeros_like(write) if g is None else g, write, "norm")


def _of_selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, negative_eigenvalues: bool
) -> Gates:
    g = dt.float()[..., None] * A.float()  # [B T E N]
    if negative_eigenvalues:
        g = (2 * g.exp() - 1).abs().log()
    write = (dt.float() * x.float()).abs() * B.float().norm(dim=-1, keepdim=True)
    return Gates(g, write, "norm")


def _of_attention(
    q: Tensor, k: Tensor, scale: float | None, window: int | None, sinks: int
) -> Tensor:
    """Return the weights ``[B H T T]`` of queries (rows) on keys."""
    T, K = q.shape[1], q.shape[-1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    score = torch.einsum("bthk,bshk->bhts", q.float(), k.float())
    score = score * (K**-0.5 if scale is None else scale)
    step = torch.arange(T, device=q.device)
    distance = step[:, None] - step
    visible = distance >= 0
    if window is not None:
        visible &= (distance < window) | (step < sinks)
    return score.masked_fill(~visible, -torch.inf).softmax(-1)


READERS: dict[Callable[..., Any], Callable[..., Any]] = {
    gated_delta_rule: _of_delta_rule,
    gated_linear_attention: _of_linear_attention,
    selective_scan: _of_selective_scan,
    attention: _of_attention,
}
"""The operations that are seen, and what is read from arguments of theirs, by the same names."""


@contextmanager
def observe(net: nn.Module) -> Iterator[list[Seen]]:
    """Note what the mixers of a net do in one forward pass.

    What the net computes stays the same to the last bit. Operations are replaced in the modules of
    mixers for as long as this is on, so use it in one thread at a time, on a net that is not
    compiled.

    Args:
        net: A :class:`~statezoo.zoo.model.StateZooModel` or a net that has one.

    Yields:
        A list, empty until the ``with`` ends, then by layer: first what was read forward, then the
        other views. A mixer without recurrence and attention is not in it.

    Raises:
        ValueError: If the input was not one whole sequence, or there was none.

    Example:
        >>> with observe(net) as seen:
        ...     net(ids)  # [1 T]
        >>> seen[0].decay.shape
        torch.Size([4, T])
    """
    model = next((m for m in net.modules() if isinstance(m, StateZooModel)), None)
    if model is None:
        raise ValueError(f"observe needs a net of statezoo, got {type(net).__name__}.")
    seen: list[Seen] = []
    with ExitStack() as undo:
        notes = [_Notes(mixer) for mixer in model.mixers()]
        watch = _Watch(undo)
        for note in notes:
            watch.attach(note)
        yield seen
    if not any(note.rows for note in notes):
        raise ValueError("observe saw no input: call the net on one sequence inside of it.")
    n = len(model.layers)
    for i, note in enumerate(notes):
        seen.extend(note.read(_views(model, back=i >= n)))
    seen.sort(key=lambda s: s.layer)


def _views(model: StateZooModel, back: bool) -> list[tuple[str, bool]]:
    """Name what the rows of a mixer's batch read, and say whether from the input's end on."""
    config = model.config
    tied = config.bidirectional and config.tie_directions
    ways = [""] * (not back) + ["backward"] * (back or tied)
    strands = ["", "other strand"] if config.complement is not None else [""]
    return [
        (", ".join(filter(None, (strand, way))), bool(way) != bool(strand))
        for way in ways
        for strand in strands
    ]


class _Notes:
    """What is noted of one mixer in a forward pass.

    Attributes:
        rows: Sequences in its batch; 0 before any.
        calls: What its recurrences and attentions were given.
        route: Where tokens go, if there are several memories.
        chosen: Memories and their weights ``[B*T k]``.
    """

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        self.rows = self.T = 0
        self.calls: list[Gates | Tensor] = []
        self.route: Route | None = None
        self.chosen: tuple[Tensor, ...] | None = None

    def begin(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, *_: Any
    ) -> None:
        if self.rows or state is not None or cu_seqlens is not None:
            raise ValueError(
                "observe reads one whole sequence: one forward pass, without cache, packing and "
                "padding."
            )
        self.rows, self.T = x.shape[:2]

    def read(self, views: list[tuple[str, bool]]) -> list[Seen]:
        """Sort what was noted by view."""
        if not self.rows:
            return []
        if self.rows != len(views):
            raise ValueError(
                f"observe reads one sequence, got {self.rows // len(views)}: call it for each."
            )
        gates = [self._dense(call) for call in self.calls if isinstance(call, Gates)]
        maps = [call for call in self.calls if not isinstance(call, Gates)]
        if not gates and not maps:
            return []
        found = []
        for row, (view, turned) in enumerate(views):
            parts: dict[str, Any] = {}
            if gates:
                each = [_read_gates(g.g[row], g.write[row]) for g in gates]
                joined = (torch.cat(part) for part in zip(*each, strict=True))
                parts |= dict(zip(("decay", "memory", "longest", "write"), joined, strict=True))
            if isinstance(self.mixer, MoM):
                parts["router"] = self._shares(self.mixer)[row]
            if maps:
                parts["attention"] = torch.cat([weights[row] for weights in maps])
            if turned:
                parts = {name: _turn(x, name) for name, x in parts.items()}
            memories = self.mixer.n if isinstance(self.mixer, MoM) else 1
            kind = gates[0].write_is if gates else ""
            place = (self.mixer.layer, self.mixer.name, view, memories)
            found.append(Seen(*place, write_is=kind, **parts))
        return found

    def _dense(self, gates: Gates) -> Gates:
        """Lay slots of memories out along time: ``[B T n*H *channel]`` of ``[1 slots H *]``."""
        if not isinstance(self.mixer, MoM):
            return gates
        route, n = cast(Route, self.route), self.mixer.n
        token = route.order // route.place.shape[1]

        def lay(y: Tensor) -> Tensor:
            full = y.new_zeros(self.rows * self.T, n, *y.shape[2:])
            full[token, route.memory] = y[0]
            return cast(Tensor, full.unflatten(0, (self.rows, self.T))).flatten(2, 3)

        return Gates(lay(gates.g), lay(gates.write), gates.write_is)

    def _shares(self, mixer: MoM) -> Tensor:
        """Return the weights ``[B M T]`` of the memories that there is a choice of."""
        memory, weight = cast(tuple[Tensor, ...], self.chosen)
        full = weight.new_zeros(len(weight), mixer.n).scatter(1, memory, weight)
        shares: Tensor = full[:, mixer.shared :].unflatten(0, (self.rows, self.T))
        return shares.transpose(1, 2)


class _Watch:
    """Notes calls for the mixer whose forward pass is on.

    Args:
        undo: Takes everything back.
    """

    def __init__(self, undo: ExitStack) -> None:
        self.undo, self.now = undo, cast(_Notes | None, None)
        self.patched: set[str] = set()

    def attach(self, notes: _Notes) -> None:
        """Watch a mixer, those inside of it, and the files that they are written in."""
        mixer = notes.mixer
        before = mixer.register_forward_pre_hook(
            lambda _, given, named: self._enter(notes, *given, **named), with_kwargs=True
        )
        after = mixer.register_forward_hook(lambda *_: self._leave(), always_call=True)
        self.undo.callback(before.remove)
        self.undo.callback(after.remove)
        if isinstance(mixer, MoM):
            self._replace(mixer, "choose", self._noting_choice(mixer.choose))
        for part in mixer.modules():
            if isinstance(part, Mixer) and part is not mixer:
                self._replace(part, "recur", self._noting_route(part.recur))
            if isinstance(part, Mixer):
                self._patch_files(type(part))

    def _enter(self, notes: _Notes, *given: Any, **named: Any) -> None:
        notes.begin(*given, **named)
        self.now = notes

    def _leave(self) -> None:
        self.now = None

    def _replace(self, owner: Any, name: str, new: Any) -> None:
        old, own = getattr(owner, name), name in vars(owner)
        setattr(owner, name, new)
        self.undo.callback(*((setattr, owner, name, old) if own else (delattr, owner, name)))

    def _patch_files(self, mixer: type) -> None:
        for cls in mixer.__mro__:
            module = sys.modules.get(cls.__module__)
            if module is None or module.__name__ in self.patched:
                continue
            self.patched.add(module.__name__)
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in READERS and module.__name__ != __name__:
                    self._replace(module, name, self._noting_call(value))

    def _noting_call(self, op: Callable[..., Any]) -> Callable[..., Any]:
        signature, reader = inspect.signature(op), READERS[op]
        wanted = inspect.signature(reader).parameters

        def noting(*given: Any, **named: Any) -> Any:
            if self.now is not None:
                bound = signature.bind(*given, **named)
                bound.apply_defaults()
                with torch.no_grad():
                    seen = reader(**{name: bound.arguments[name] for name in wanted})
                self.now.calls.append(seen)
            return op(*given, **named)

        return noting

    def _noting_choice(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        def noting(x: Tensor) -> Any:
            chosen = choose(x)
            if self.now is not None:
                self.now.chosen = tuple(x.detach() for x in chosen)
            return chosen

        return noting

    def _noting_route(self, recur: Callable[..., Any]) -> Callable[..., Any]:
        def noting(x: Any, *given: Any, **named: Any) -> Any:
            if self.now is not None and isinstance(x, Slots):
                self.now.route = x.route
            return recur(x, *given, **named)

        return noting


def _read_gates(g: Tensor, write: Tensor) -> tuple[Tensor, ...]:
    """Turn ``[T H *channel]`` and ``[T H]`` into decay, memory, longest and write, ``[H T]``."""
    g = g.unsqueeze(-1) if g.ndim == 2 else g
    each = lifetime(g)
    parts = (g.exp().mean(-1), each.median(-1).values, each.amax(-1), write)
    return tuple(part.float().T.contiguous() for part in parts)


def _turn(x: Tensor, name: str) -> Tensor:
    return x.flip(-1, -2) if name == "attention" else x.flip(-1)


def lifetime(g: Tensor) -> Tensor:
    r"""Count the tokens until what is written at a position has faded to 1/e.

    That is the ``n`` where :math:`g_{t+1} + \dots + g_{t+n} = -1`, with a straight line between
    whole tokens: ``1 / |g|`` for a constant decay, below 1 where the next token clears the memory,
    infinite where nothing fades. Where the input ends before, the rest is taken to fade at the mean
    rate over the input.

    Args:
        g: Log decays ``[T ...]``, at most 0.
    """
    T = g.shape[0]
    spent = g.double().clamp(min=FLOOR).abs().cumsum(0).flatten(1).T.contiguous()  # [n T]
    goal = spent + 1
    after = torch.searchsorted(spent, goal).clamp(max=T - 1)
    before = (after - 1).clamp(min=0)
    low, high = spent.gather(1, before), spent.gather(1, after)
    t = torch.arange(T, device=g.device)
    inside = before - t + (goal - low) / (high - low)
    beyond = (T - 1 - t) + (goal - spent[:, -1:]) / (spent[:, -1:] / T)
    n = torch.where(spent[:, -1:] >= goal, inside, beyond)
    return n.T.reshape(g.shape).to(g.dtype)
