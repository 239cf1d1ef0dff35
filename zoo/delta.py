"""What the delta-rule mixers share: everything but how the memory fades and how wide it is."""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.kernels.gated_delta_rule import gated_delta_rule, l2_norm
from statezoo.zoo import init
from statezoo.zoo.conv import CausalConv
from statezoo.zoo.mixer import State, state_bytes
from statezoo.zoo.norm import RMSNorm


class MemoryState(NamedTuple):
    """Memory ``S [N Hv K V]``, and the last inputs of the short convolutions, if there are any."""

    S: Tensor
    conv: tuple[Tensor, ...]


class DeltaLayer(nn.Module):
    r"""A layer around the delta rule. A subclass is a mixer too: ``class KDA(DeltaLayer, Mixer)``.

    .. math::
        q, k = \mathrm{l2}(\mathrm{silu}(\mathrm{conv}(W x))), \quad
        v = \mathrm{silu}(\mathrm{conv}(W_v x)), \quad \beta = \mathrm{reach} \cdot \sigma(W_b x)

        g = -e^{A} \mathrm{softplus}(W_a x + b), \quad
        y = W_o (\mathrm{norm}(\mathrm{rule}(q, k, v, \beta, g)) \odot \mathrm{silu}(W_g x))

    Gates ``g`` and the last factor are there only if asked for.

    Args:
        d_model: Width of the stream.
        n_heads: Heads of queries and keys.
        n_v_heads: Heads of values, gates and memories, a multiple of ``n_heads``.
        widths: Width ``K`` of a key and ``V`` of a value.
        per_token: ``(n,)`` for ``n`` writes a token, in the layout ``(n h d)``; ``()`` for one.
        d_conv: Taps of the short convolutions; 0 for none.
        negative_eigenvalues: Whether ``beta`` reaches 2 instead of 1.
        gates: Which gates there are: ``"forget"``, ``"output"``.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If heads do not fit each other, or ``d_conv`` is negative.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ("q_proj",)
    writes: ClassVar[tuple[str, ...]] = ("k_proj", "v_proj", "b_proj", "a_proj", "f_proj")
    g_proj: nn.Module

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_v_heads: int,
        widths: tuple[int, int],
        per_token: tuple[int, ...] = (),
        d_conv: int,
        negative_eigenvalues: bool,
        gates: tuple[str, ...] = (),
        norm_eps: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        (K, V), n = widths, (*per_token, 1)[0]
        if min(n_heads, n_v_heads, n, K, V) < 1 or n_v_heads % n_heads or d_conv < 0:
            raise ValueError(
                f"{self.name}: n_v_heads={n_v_heads} must be a multiple of n_heads={n_heads}, the "
                f"head width and the writes a token at least 1, d_conv at least 0; got {K}, {n}, "
                f"{d_conv}."
            )
        self.K, self.V, self.per_token, self.backend = K, V, per_token, backend
        self.reach = 2.0 if negative_eigenvalues else 1.0
        streams = {"q": n_heads * K, "k": n * n_heads * K, "v": n * n_v_heads * V}
        for stream, width in streams.items():
            setattr(self, f"{stream}_proj", nn.Linear(d_model, width, bias=False))
            if d_conv:
                setattr(self, f"{stream}_conv1d", CausalConv(width, d_conv, backend=backend))
        self.b_proj = nn.Linear(d_model, n * n_v_heads, bias=False)
        if "forget" in gates:
            self.a_proj = nn.Linear(d_model, n_v_heads, bias=False)
            self.A_log = nn.Parameter(init.A_log(n_v_heads, low=0.0))
            self.dt_bias = nn.Parameter(init.dt_bias(n_v_heads))
        if "output" in gates:
            self.g_proj = nn.Linear(d_model, n_v_heads * V, bias=False)
        self.gates, self.d_conv = gates, d_conv
        self.o_norm = RMSNorm(V, norm_eps)
        self.o_proj = nn.Linear(n_v_heads * V, d_model, bias=False)
        tails = [(width, d_conv - 1) for width in streams.values()] if d_conv else []
        self.state_shapes: list[tuple[int, ...]] = [(n_v_heads, K, V), *tails]

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Write and read the memories, ``[B T H V]``."""
        S, tails = state or (None, ())
        (q, k, v), tails = self.project(x, tails, cu_seqlens)
        o, S = gated_delta_rule(
            l2_norm(q),
            l2_norm(k),
            v,
            self.beta(x),
            self.decay(x),
            initial_state=S,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return o, MemoryState(S, tails)

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and project what was read."""
        y: Tensor = self.o_proj(self.gate(self.o_norm(o), x).flatten(-2))
        return y

    def project(
        self, x: Tensor, tails: tuple[Tensor, ...], cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Make queries ``[B T H K]``, keys ``[B T (n) H K]`` and values ``[B T (n) Hv V]``."""
        streams, new = [], []
        for i, stream in enumerate("qkv"):
            y = getattr(self, f"{stream}_proj")(x)
            if self.d_conv:
                y, tail = getattr(self, f"{stream}_conv1d")(
                    y, tails[i] if tails else None, cu_seqlens
                )
                new.append(tail)
            else:
                y = F.silu(y)
            width = self.V if stream == "v" else self.K
            n = () if stream == "q" else self.per_token
            streams.append(y.unflatten(-1, (*n, -1, width)))
        return streams, tuple(new)

    def beta(self, x: Tensor) -> Tensor:
        """Make write strengths ``[B T (n) Hv]``."""
        b = wide(self.b_proj(x)).unflatten(-1, (*self.per_token, -1))
        beta: Tensor = self.reach * b.sigmoid()
        return beta

    def decay(self, x: Tensor) -> Tensor | None:
        """Make log decays ``[B T Hv]``, if there is a forget gate."""
        if "forget" not in self.gates:
            return None
        g: Tensor = -wide(self.A_log).exp() * F.softplus(wide(self.a_proj(x)) + self.dt_bias)
        return g

    def gate(self, o: Tensor, x: Tensor) -> Tensor:
        """Gate the normed outputs ``o [B T Hv V]``, if there is an output gate."""
        if "output" not in self.gates:
            return o
        y: Tensor = o * F.silu(self.g_proj(x)).unflatten(-1, (-1, self.V))
        return y

    def state_size(self, T: int) -> int:
        """Return the bytes of state of one sequence, whatever ``T``."""
        dtype = wide(self.o_proj.weight[:0]).dtype
        return sum(state_bytes(*shape, dtype=dtype) for shape in self.state_shapes)


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
