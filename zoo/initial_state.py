r"""Initial states that are learnt: what a net has in mind before it reads the first token.

They are weights like any other: the same for every sequence of a batch or a pack, and part of what
``save_pretrained`` writes, where ``config.initial_states`` is set. At first they change nothing: of
a matrix :math:`S_0 = \sum_r (c u_r) (c v_r)^\top` the ``v`` are zero, of a whole one,
:math:`S_0 = c P`, all is. States are larger than weights and fade as they are read, so that they
have to move far: ``c`` lets them do so at the rates that weights are trained with.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from statezoo.kernels._varlen import n_sequences
from statezoo.zoo.mixer import MIXERS, State, build_mixer, name_tensors

SCALE = 100.0
"""The factor ``c``."""


class InitialState(nn.Module):
    """The learnt state of one mixer before the first token.

    Every tensor ``[N .. a b]`` of the state that the mixer calls ``learnable`` is made of ``rank``
    outer products of ``[.. a]`` and ``[.. b]``, or is a parameter as it stands where that has no
    more numbers.

    Args:
        state: A state of the mixer, for its shapes.
        learnable: Parts of it that are learnt, as far as it has them.
        rank: Outer products; 0 for whole tensors.
    """

    def __init__(self, state: Any, learnable: tuple[str, ...], rank: int) -> None:
        super().__init__()
        self.kind: Any = type(state)
        self.several = {
            name: len(part)
            for name, part in zip(state._fields, state, strict=True)
            if isinstance(part, tuple) and name in learnable
        }
        for name, part in zip(state._fields, state, strict=True):
            if name in learnable:
                for full, x in name_tensors(part, name).items():
                    self._add(full.replace(".", "_"), x.shape[1:], rank)

    def _add(self, name: str, shape: torch.Size, rank: int) -> None:
        *outer, a, b = shape
        if not rank or rank * (a + b) >= a * b:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
            return
        self.register_parameter(f"{name}_u", nn.Parameter(torch.randn(*outer, a, rank) / SCALE))
        self.register_parameter(f"{name}_v", nn.Parameter(torch.zeros(*outer, rank, b)))

    def part(self, name: str) -> Tensor | None:
        """Return a tensor of the state of one sequence; ``None`` if it is not learnt."""
        own = self._parameters
        left, right, whole = (own.get(name + end) for end in ("_u", "_v", ""))
        if left is not None and right is not None:
            return (SCALE * left) @ (SCALE * right)
        return whole if whole is None else SCALE * whole

    def forward(self, n: int, rest: State = None) -> State:
        """Return the state of ``n`` sequences before their first token.

        Args:
            n: Sequences.
            rest: What the state is where it is not learnt; ``None`` leaves such parts out, which
                is as good as long as nobody goes on from the state that comes of it.
        """
        parts: list[Any] = []
        for i, field in enumerate(self.kind._fields):
            names = [f"{field}_{j}" for j in range(self.several.get(field, 0))]
            found = [self.part(name) for name in names or [field]]
            each = [None if x is None else x.expand(n, *x.shape) for x in found]
            if field in self.several:
                parts.append(tuple(each) if names else ())
            else:
                parts.append(rest[i] if each[0] is None and rest is not None else each[0])
        state: State = tuple.__new__(self.kind, parts)
        return state


def begin(learnt: InitialState | None, x: Tensor, cu_seqlens: Tensor | None) -> State:
    """Return the state before sequences ``x [B T ..]`` that nobody continues: learnt, or none."""
    return None if learnt is None else learnt(n_sequences(x, cu_seqlens))


def learnt_state(mixer: dict[str, Any], d_model: int, rank: int | None) -> InitialState | None:
    """Make what is learnt of a mixer's initial state; ``None`` if nothing is.

    Args:
        mixer: Its name and settings.
        d_model: Width of the stream.
        rank: As in :class:`InitialState`; ``None`` for nothing learnt.
    """
    if rank is None or not MIXERS[mixer["name"]].learnable:
        return None
    state, learnable = _example(json.dumps(mixer, sort_keys=True), d_model)
    if not name_tensors(tuple(getattr(state, name, None) for name in learnable)):
        return None
    return InitialState(state, learnable, rank)


@lru_cache(maxsize=64)
def _example(mixer: str, d_model: int) -> tuple[Any, tuple[str, ...]]:
    """Return a state as a mixer makes it: it alone knows the shapes."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        made = build_mixer(json.loads(mixer), d_model).float()
        return made(torch.zeros(1, 1, d_model, dtype=torch.float32))[1], made.learnable
