"""Where sequences begin and end along ``T``."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from statezoo.kernels._varlen import check_bounds, segment_ids


class Known:
    """Bounds that are known to Python: one batch of equal lengths, or ``cu_seqlens`` on CPU."""

    def __init__(self, T: int, cu: Tensor | None) -> None:
        bounds: list[tuple[int, int, Any]] = [(0, T, slice(None))]
        if cu is not None:
            bounds = [(a, b, slice(i, i + 1)) for i, (a, b) in enumerate(pairwise(cu.tolist()))]
        self.at_start = {a: where for a, b, where in bounds if b > a}
        self.at_end = {b - 1: where for a, b, where in bounds if b > a}

    def pick(self, start: bool, t: int, running: Tensor, states: Tensor) -> Tensor:
        """Return the sequence's own of ``states [N *]`` at its edge, elsewhere ``running``."""
        where = (self.at_start if start else self.at_end).get(t)
        return running if where is None else states[where]

    def note(self, start: bool, t: int, value: Tensor, states: Tensor) -> None:
        """Store ``value`` in ``states`` at a sequence's edge."""
        where = (self.at_start if start else self.at_end).get(t)
        if where is not None:
            states[where] = value


class Flagged:
    """Bounds on a GPU, never read by Python; otherwise as :class:`Known`."""

    def __init__(self, T: int, cu: Tensor) -> None:
        self.number = segment_ids(cu, T)
        t = torch.arange(T, device=cu.device)
        self.at_start, self.at_end = t == cu[self.number], t == cu[self.number + 1] - 1

    def pick(self, start: bool, t: int, running: Tensor, states: Tensor) -> Tensor:
        """Return the sequence's own of ``states [N *]`` at its edge, elsewhere ``running``."""
        own = states.index_select(0, self.number[t : t + 1])
        return torch.where((self.at_start if start else self.at_end)[t], own, running)

    def note(self, start: bool, t: int, value: Tensor, states: Tensor) -> None:
        """Store ``value`` in ``states`` at a sequence's edge."""
        at = self.number[t : t + 1]
        here = (self.at_start if start else self.at_end)[t]
        states.index_copy_(0, at, torch.where(here, value, states.index_select(0, at)))


def edges(T: int, cu: Tensor | None) -> Known | Flagged:
    """Choose by where the bounds are."""
    if cu is None or cu.device.type == "cpu":
        if cu is not None:
            check_bounds(cu, T)
        return Known(T, cu)
    return Flagged(T, cu)
