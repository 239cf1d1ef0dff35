"""Tokens sent to several memories: a slot is one token in one memory."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.zoo import init


class Route(NamedTuple):
    """Where tokens go, all slots in the order of sequence, then memory, then time.

    Attributes:
        order: Each slot's index ``[slots]`` into the tokens' choices ``[T k]``.
        memory: The memory of each slot ``[slots]``.
        place: The slot of each choice ``[T k]``.
        cu_seqlens: Bounds ``[N*n + 1]`` of what each memory of each sequence gets, maybe nothing.
    """

    order: Tensor
    memory: Tensor
    place: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, memory: Tensor, sequence: Tensor, N: int, n: int) -> "Route":
        """Sort tokens into memories, without a value that the host would have to wait for.

        Args:
            memory: Memories ``[T k]`` of each token, below ``n``, none twice.
            sequence: Sequence ``[T]`` of each token, below ``N``, rising.
            N: Sequences.
            n: Memories of each sequence.
        """
        key, order = (sequence[:, None] * n + memory).flatten().sort(stable=True)
        bounds = torch.searchsorted(key, torch.arange(N * n + 1, device=key.device))
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order)).to(order))
        return cls(order, memory.flatten()[order], place.view_as(memory), bounds.to(torch.int32))


class Slots(NamedTuple):
    """The stream as projections into memories see it: in each slot what its token holds.

    Attributes:
        x: Stream of the tokens ``[1 T D]``.
        route: Where they go.
    """

    x: Tensor
    route: Route

    def pick(self, y: Tensor) -> Tensor:
        """Take each slot's row ``[1 slots *]`` of ``y [1 T n *]``, ``n`` memories or one for all.

        No row is taken twice, so that gradients add up in the same order each time.
        """
        (n, k), order = (y.shape[2], self.route.place.shape[1]), self.route.order
        row = order if n == 1 else order // k * n + self.route.memory
        y = y.expand(-1, -1, k, -1) if n == 1 else y
        return y.flatten(0, 2).index_select(0, row)[None]


class EachMemory(nn.Linear):
    """One linear map for each of ``n`` memories, in one matrix of their outputs side by side.

    Of slots it makes each memory's own outputs ``[1 slots *]``; of a stream ``[.. D]`` those
    ``common`` ones that come first and are no memory's.

    Args:
        linear: The map whose place this takes, with as many initial values of its kind.
        n: Memories; 1 for one map that all share.
        common: Leading outputs of ``linear`` that there shall be only once.
    """

    def __init__(self, linear: nn.Linear, n: int, common: int = 0) -> None:
        own, bias = linear.out_features - common, linear.bias
        super().__init__(linear.in_features, common + n * own, bias=bias is not None)
        self.n, self.common = n, common
        if bias is not None:
            first, each = bias.detach().split([common, own])
            self.bias = nn.Parameter(torch.cat([first, each.repeat(n)]))
        if getattr(linear, "_is_hf_initialized", False):
            init.keep(self)

    def forward(self, x: Tensor | Slots, weight: Tensor | None = None) -> Tensor:
        """Project the tokens for the memories that they go to, or the stream for none of them.

        Args:
            x: Tokens in their slots, or the stream.
            weight: That of an update of this map, which has no bias, to take instead.
        """
        if isinstance(x, Slots):
            return x.pick(self.all(x.x, weight))
        bias = None if self.bias is None or weight is not None else self.bias[: self.common]
        weight = self.weight if weight is None else weight
        return F.linear(x, weight[: self.common], bias)

    def all(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Project ``x [1 T D]``, or one per memory ``[1 T n D]``, for all of them ``[1 T n *]``."""
        bias = None if self.bias is None or weight is not None else self.bias[self.common :]
        weight = (self.weight if weight is None else weight)[self.common :]
        if x.ndim == 3:
            y = F.linear(x, weight, bias).unflatten(-1, (self.n, -1))
        else:
            y = torch.einsum("btni,noi->btno", x, weight.unflatten(0, (self.n, -1)))
            y = y if bias is None else y + bias.view(self.n, -1)
        return cast(Tensor, y)


class EachMemoryChain(nn.Sequential):
    """Linear maps behind each other for each of ``n`` memories, as :class:`EachMemory`."""

    def forward(self, slots: Slots) -> Tensor:
        """Project the tokens for the memories that they go to."""
        y = slots.x
        for part in self:
            y = cast(EachMemory, part).all(y)
        return slots.pick(y)


def for_each_memory(projection: nn.Module, n: int, common: int = 0) -> nn.Module:
    """Return what serves ``n`` memories in place of a projection.

    Raises:
        TypeError: If it is neither a linear map nor a chain of such.
    """
    if isinstance(projection, nn.Linear):
        return EachMemory(projection, n, common)
    if not isinstance(projection, nn.Sequential):
        raise TypeError(f"only linear maps can serve several memories, not {projection}.")
    return EachMemoryChain(*(EachMemory(cast(nn.Linear, part), n) for part in projection))
