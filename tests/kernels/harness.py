"""One description of every recurrence op, so that one set of properties tests them all."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from statezoo.kernels.causal_conv1d import causal_conv1d
from statezoo.kernels.gated_delta_rule import gated_delta_rule
from statezoo.kernels.gated_linear_attention import gated_linear_attention
from statezoo.kernels.selective_scan import selective_scan

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An op with one choice of its options.

    Attributes:
        name: Shown in test names.
        op: The public function; takes the inputs by name.
        make: Draws inputs for ``B`` sequences of ``T`` tokens in a dtype; all but the initial state
            and the parameters have ``[B T ...]``.
        parameters: Inputs without an axis for time.
        gate: The input that holds log decays, if any.
        options: Further keywords of the op.
    """

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    make: Callable[[int, int, torch.dtype], Inputs]
    parameters: tuple[str, ...] = ()
    gate: str | None = None
    options: tuple[tuple[str, object], ...] = ()

    def run(self, inputs: Inputs, backend: str, cu_seqlens: Tensor | None = None):
        """Call the op: outputs and final state."""
        return self.op(**inputs, **dict(self.options), cu_seqlens=cu_seqlens, backend=backend)

    def all_of(self, inputs: Inputs, backend: str, cu_seqlens: Tensor | None = None) -> Inputs:
        """Outputs, final state and the gradients of every input under random output gradients."""
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o, S = self.run(leaves, backend, cu_seqlens)
        rng = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (o, S)]
        loss = (o * weights[0]).sum() + (S * weights[1]).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"o": o, "S": S, **{f"d{n}": d for n, d in zip(leaves, grads, strict=True)}}

    def at(self, inputs: Inputs, tokens: slice, sequences: slice, state: Tensor | None) -> Inputs:
        """The inputs of some tokens of some sequences, starting from ``state``."""
        kept = {
            name: x if name in self.parameters else x[sequences, tokens]
            for name, x in inputs.items()
            if name != "initial_state"
        }
        return kept if state is None else {**kept, "initial_state": state}


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, drawn in float64 whatever the dtype."""
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def gates(*shape: int, dtype: torch.dtype) -> Tensor:
    """Log decays of every size: mostly mild, some 0, some -20."""
    g = F.logsigmoid(3 * torch.randn(shape, dtype=torch.float64))
    pick = torch.rand(shape)
    return g.masked_fill(pick < 0.1, 0.0).masked_fill(pick > 0.95, -20.0).to(dtype)


def make_additive(gate: str | None, groups: int, K: int = 8, V: int = 6, H: int = 2):
    """Inputs of ``gated_linear_attention``."""

    def make(B: int, T: int, dtype: torch.dtype) -> Inputs:
        Hv = H * groups
        inputs = {n: randn(B, T, H, K, dtype=dtype) for n in ("q", "k")}
        inputs |= {"v": randn(B, T, Hv, V, dtype=dtype)}
        if gate:
            inputs["g"] = gates(B, T, Hv, *((K,) if gate == "channel" else ()), dtype=dtype)
        return inputs | {"initial_state": state(B, Hv, K, V, dtype=dtype)}

    return make


def make_delta(gate: str | None, groups: int, n: int = 1, K: int = 8, V: int = 6, H: int = 2):
    """Inputs of ``gated_delta_rule``: unit keys, write strengths up to 2."""

    def make(B: int, T: int, dtype: torch.dtype) -> Inputs:
        Hv, steps = H * groups, (n,) if n > 1 else ()
        k = F.normalize(randn(B, T, *steps, H, K, dtype=torch.float64), dim=-1).to(dtype)
        inputs = {"q": randn(B, T, H, K, dtype=dtype), "k": k}
        inputs["v"] = randn(B, T, *steps, Hv, V, dtype=dtype)
        inputs["beta"] = (2 * torch.rand(B, T, *steps, Hv, dtype=torch.float64)).to(dtype)
        if gate:
            inputs["g"] = gates(B, T, Hv, *((K,) if gate == "channel" else ()), dtype=dtype)
        return inputs | {"initial_state": state(B, Hv, K, V, dtype=dtype)}

    return make


def make_scan(E: int = 6, N: int = 4):
    """Inputs of ``selective_scan``."""

    def make(B: int, T: int, dtype: torch.dtype) -> Inputs:
        inputs = {"x": randn(B, T, E, dtype=dtype)}
        inputs["dt"] = F.softplus(randn(B, T, E, dtype=torch.float64)).to(dtype)
        inputs["A"] = -torch.rand(E, N, dtype=torch.float64).to(dtype) * 3
        inputs |= {n: randn(B, T, N, dtype=dtype) for n in ("B", "C")}
        return inputs | {"D": randn(E, dtype=dtype), "initial_state": state(B, E, N, dtype=dtype)}

    return make


def make_conv(D: int = 5, W: int = 4):
    """Inputs of ``causal_conv1d``."""

    def make(B: int, T: int, dtype: torch.dtype) -> Inputs:
        inputs = {"x": randn(B, T, D, dtype=dtype), "weight": randn(D, W, dtype=dtype)}
        inputs["bias"] = randn(D, dtype=dtype)
        return inputs | {"initial_state": randn(B, D, W - 1, dtype=dtype)}

    return make


def state(*shape: int, dtype: torch.dtype) -> Tensor:
    """An initial state, at least float32 as states are."""
    return randn(*shape, dtype=torch.promote_types(dtype, torch.float32))


def cases() -> list[Case]:
    """Every op with every kind of gate, shared heads, several sub-steps."""
    found = []
    for gate in (None, "head", "channel"):
        for groups in (1, 2):
            label = f"{gate or 'no'}_gate-{groups}"
            key = "g" if gate else None
            make = make_additive(gate, groups)
            found.append(Case(f"additive-{label}", gated_linear_attention, make, gate=key))
            make = make_delta(gate, groups)
            found.append(Case(f"delta-{label}", gated_delta_rule, make, gate=key))
        make = make_delta(gate, 1, n=3)
        found.append(Case(f"delta3-{gate or 'no'}_gate", gated_delta_rule, make, gate=key))
    one = make_additive("head", 1, H=1)  # no axis to permute: nothing forces a copy of the inputs
    found.append(Case("additive-one_head", gated_linear_attention, one, gate="g"))
    found.append(Case("delta-one_head", gated_delta_rule, make_delta("head", 1, H=1), gate="g"))
    scan = {"op": selective_scan, "make": make_scan(), "parameters": ("A", "D")}
    found.append(Case("scan", **scan))
    found.append(Case("scan-negative", **scan, options=(("negative_eigenvalues", True),)))
    conv = {"op": causal_conv1d, "make": make_conv(), "parameters": ("weight", "bias")}
    found.append(Case("conv", **conv))
    found.append(Case("conv-silu", **conv, options=(("activation", "silu"),)))
    return found


CASES = cases()


def bounds(lengths: list[int]) -> Tensor:
    """Turn lengths into ``cu_seqlens``."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def separately(case: Case, inputs: Inputs, lengths: list[int], backend: str) -> Inputs:
    """Run packed inputs one sequence at a time, and put the results together again."""
    at, states = pairwise(bounds(lengths).tolist()), inputs["initial_state"]
    parts = [
        case.run(case.at(inputs, slice(a, b), slice(None), states[i : i + 1]), backend)
        for i, (a, b) in enumerate(at)
    ]  # fmt: skip
    return {"o": torch.cat([o for o, _ in parts], 1), "S": torch.cat([S for _, S in parts])}


def assert_close(got: Inputs, want: Inputs, allowed: float) -> None:
    """Compare by root mean square error relative to the values' own size."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].isfinite().all(), f"{name} is not finite"
        difference = (got[name].double() - want[name].double()).square().mean().sqrt()
        size = want[name].double().square().mean().sqrt().clamp(min=1e-2)
        error = (difference / size).nan_to_num(0.0)  # an empty tensor has no mean
        assert error <= allowed, f"{name}: relative RMS error {error:.1e}, allowed {allowed:.0e}"
