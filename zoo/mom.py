"""Mixture of memories."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from statezoo.kernels._varlen import n_sequences, segment_ids
from statezoo.zoo.delta import wide
from statezoo.zoo.mixer import MIXERS, Mixer, State, build_mixer, map_state, resolve_mixer
from statezoo.zoo.routing import Route, Slots, for_each_memory
from statezoo.zoo.settings import lookup
from statezoo.zoo.slices import mean_of_slices


class MoM(Mixer):
    r"""Several memories, of which every token writes and reads a few, chosen by a router.

    .. math::
        p_t = \mathrm{softmax}(W_r x_t), \qquad I_t = \mathrm{top}_k(p_t), \qquad
        a_{tm} = p_{tm} / \sum_{j \in I_t} p_{tj} \\
        o_t = o_{t0} + \sum_{m \in I_t} a_{tm} o_{tm}, \qquad y_t = \mathrm{out}(o_t, x_t)

    Memory ``m`` is that of the inner mixer, on the tokens sent to it alone: ``o_tm`` is read after
    the write of token ``t``; others neither change nor fade it, and short convolutions run along
    its own tokens. The always-on memory 0 has weight 1. Each memory has its own projections for
    writing (keys, values, strengths, decays); those for reading, convolutions, initial decays,
    norm, gate and projection of the output are common to all.

    With Mamba-2 inside, ``B``, ``u``, the step sizes and, as it is made along with them, the query
    ``C`` are each memory's own; the output gate ``z`` is common.

    In training, ``balance_coefficient`` times the balance ``M * sum_m f_m P_m`` joins the loss, as
    mean over layers. ``f_m`` is the part of the tokens that went to memory ``m``, ``P_m`` the mean
    of ``p_m``: the balance is ``top_k`` where all memories get the same.

    Args:
        d_model: Width of the stream.
        inner: Mixer whose memory there is several times; any that keeps a matrix.
        inner_settings: Its settings, where not the defaults.
        n_memories: Memories to choose from, ``M``.
        top_k: Memories that each token goes to.
        shared_memory: Whether there is one more that all tokens go to.
        single_kv: Whether one set of writing projections serves all memories.
        balance_coefficient: Weight of the balance in the training loss.

    Raises:
        ValueError: If ``top_k`` is not in 1 to ``n_memories``, the inner mixer has no matrix
            memory, or its settings are wrong.

    Source: Du et al., MoM, arXiv:2502.13685, section 3; balance after Fedus et al., Switch
    Transformers, arXiv:2101.03961, eq. 4, per layer.
    """

    def __init__(
        self,
        d_model: int,
        *,
        inner: str = "gated_deltanet",
        inner_settings: dict[str, Any] | None = None,
        n_memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
        single_kv: bool = False,
        balance_coefficient: float = 0.01,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_memories:
            raise ValueError(f"mom: top_k must lie in 1 to n_memories={n_memories}, got {top_k}.")
        self.n_memories, self.top_k, self.shared = n_memories, top_k, int(shared_memory)
        self.n, self.balance_coefficient = n_memories + self.shared, balance_coefficient
        self.gate = nn.Linear(d_model, n_memories, bias=False)
        own = self.complete({"inner": inner, "inner_settings": inner_settings})["inner_settings"]
        self.inner = build_mixer({"name": inner, **own}, d_model)
        for name in (*self.inner.reads, *self.inner.writes):
            if (projection := getattr(self.inner, name, None)) is not None:
                writes = name in self.inner.writes
                common = self.inner.read_width if writes else 0
                n = self.n if writes and not single_kv else 1
                setattr(self.inner, name, for_each_memory(projection, n, common))
        self.learnable = self.inner.learnable

    @classmethod
    def complete(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Write out the settings of the inner mixer too.

        Raises:
            ValueError: If it has no matrix memory or a setting is unknown.
            TypeError: If a setting has the wrong type.
        """
        inner, given = settings["inner"], settings["inner_settings"] or {}
        if not lookup(MIXERS, inner, "mixer").writes:  # type: ignore[attr-defined]
            able = ", ".join(sorted(name for name, mixer in MIXERS.items() if mixer.writes))
            raise ValueError(f"mom: inner mixer {inner!r} has no matrix memory; these do: {able}.")
        if "name" in given:
            raise ValueError("mom: the inner mixer's name is the setting 'inner'.")
        resolved = resolve_mixer({"name": inner, **given})
        return settings | {"inner_settings": {k: v for k, v in resolved.items() if k != "name"}}

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Mix ``x [B T D]`` along time; states are ``[N n *]`` for ``n`` memories, shared first."""
        B, T, D = x.shape
        N = n_sequences(x, cu_seqlens)
        memory, weight = self.choose(x.reshape(B * T, D))
        if cu_seqlens is None:
            sequence = torch.arange(B, device=x.device).repeat_interleave(T)
        else:
            sequence = segment_ids(cu_seqlens, T)
        route = Route.of(memory, sequence, N, self.n)
        slots = Slots(x.reshape(1, B * T, D), route)
        state = map_state(lambda s: s.flatten(0, 1), state)
        o, state = self.inner.recur(cast(Tensor, slots), state, route.cu_seqlens)
        each = o[0].index_select(0, route.place.flatten()).unflatten(0, weight.shape)  # [BT k H V]
        mixed = (weight[..., None, None] * each).sum(1).to(o.dtype).unflatten(0, (B, T))
        return self.inner.read_out(mixed, x), map_state(
            lambda s: s.unflatten(0, (N, self.n)), state
        )

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the memories of tokens ``x [T D]`` and their weights, both ``[T k]``.

        The shared memory comes first; of equally probable ones, the first.
        """
        p = wide(self.gate(x)).softmax(-1)
        top, memory = p.sort(dim=-1, descending=True, stable=True)
        top, memory = top[:, : self.top_k], memory[:, : self.top_k]
        self.auxiliary = self.report(p, memory) if self.training else None
        weight = top / top.sum(-1, keepdim=True)
        if self.shared:
            memory = torch.cat([torch.zeros_like(memory[:, :1]), memory + 1], 1)
            weight = torch.cat([torch.ones_like(weight[:, :1]), weight], 1)
        return memory, weight

    def report(self, p: Tensor, memory: Tensor) -> dict[str, Tensor]:
        """Measure how evenly probabilities ``p [T M]`` send tokens to ``memory [T k]``.

        Of a slice of time, so do all slices together: one small all-reduce each way.

        Returns:
            ``loss``, and its value ``router_balance`` before the coefficient; ``router_entropy`` of
            a token's probabilities in nats; ``router_load [M]``, the part of all slots that each
            memory got.
        """
        T, M = max(len(p), 1), self.n_memories
        sent = torch.zeros_like(p).scatter(1, memory, 1.0).sum(0)
        entropy = -torch.special.xlogy(p, p).detach().sum()
        means = mean_of_slices(torch.cat([sent, p.sum(0), entropy[None]]) / T, "router")
        sent, probable, entropy = means.split([M, M, 1])
        balance = M * (sent * probable).sum()
        return {
            "loss": self.balance_coefficient * balance,
            "router_balance": balance.detach(),
            "router_entropy": entropy.detach().squeeze(),
            "router_load": sent.detach() / self.top_k,
        }

    def initial_state(self, n: int, like: Tensor) -> State:
        """Return the state of ``n`` sequences before their first token; ``None`` means zeros."""
        state: State = map_state(
            lambda s: s.unflatten(0, (n, self.n)), self.inner.initial_state(n * self.n, like)
        )
        return state

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        return self.n * self.inner.state_size(T)
