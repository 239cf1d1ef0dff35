"""Kimi Delta Attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statezoo.kernels._dispatch import Backend
from statezoo.zoo import init
from statezoo.zoo.delta import DeltaLayer, wide
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer


class KDA(DeltaLayer, Mixer):
    r"""Gated DeltaNet whose memory fades by its own rate in every key channel.

    .. math::
        \tilde S_t = \mathrm{Diag}(e^{g_t}) S_{t-1}, \qquad
        S_t = \tilde S_t + \beta_t k_t (v_t - \tilde S_t^\top k_t)^\top, \qquad
        g_t = -e^{A} \mathrm{softplus}(W_2 W_1 x_t + b)

        y_t = W_o (\mathrm{norm}(K^{-1/2} S_t^\top q_t) \odot \sigma(W_4 W_3 x_t + c))

    Queries and keys have unit length; with values, they come from short convolutions and SiLU.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        head_dim: Width of a query and key; by default all have ``d_model``.
        expand_v: Width of a value over ``head_dim``; also the bottlenecks that make the gates.
        d_conv: Taps of the short convolutions; 0 for none.
        gate_floor: Lower bound of the log decay, below 0, as in
            ``g = gate_floor * sigmoid(exp(A) * (W_2 W_1 x + b))``; default is the unbounded form.
        negative_eigenvalues: Whether ``beta`` reaches 2, so that a write can flip what is stored.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If heads and widths do not fit each other, or ``gate_floor`` is not below 0.

    Source: Kimi Linear, arXiv:2510.26692, section 3. Both forms of the gate start with the same
    decays here, those of Gated DeltaNet.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        d_conv: int = 4,
        gate_floor: float | None = None,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        if gate_floor is not None and gate_floor >= 0:
            raise ValueError(f"kda: gate_floor must be below 0, got {gate_floor}.")
        K = head_dim or head_width(self.name, "d_model", d_model, n_heads)
        V = head_width(self.name, "expand_v * head_dim", expand_v * K)
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_v_heads=n_heads,
            widths=(K, V),
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.gate_floor = gate_floor
        self.f_proj = nn.Sequential(
            nn.Linear(d_model, V, bias=False), nn.Linear(V, n_heads * K, bias=False)
        )
        self.g_proj = nn.Sequential(nn.Linear(d_model, V, bias=False), nn.Linear(V, n_heads * V))
        self.A_log = nn.Parameter(init.A_log(n_heads))
        dt_bias = init.dt_bias(n_heads * K)
        if gate_floor is not None:
            A = self.A_log.detach().exp().repeat_interleave(K)
            dt_bias = torch.logit(A * F.softplus(dt_bias) / -gate_floor, eps=1e-3) / A
        self.dt_bias = nn.Parameter(dt_bias)

    def decay(self, x: Tensor) -> Tensor:
        """Make log decays ``[B T H K]``."""
        f = (wide(self.f_proj(x)) + self.dt_bias).unflatten(-1, (-1, self.K))
        A = wide(self.A_log).exp()[:, None]
        if self.gate_floor is None:
            return -A * F.softplus(f)
        return self.gate_floor * torch.sigmoid(A * f)

    def gate(self, o: Tensor, x: Tensor) -> Tensor:
        """Gate the normed outputs ``o [B T H V]``."""
        y: Tensor = o * torch.sigmoid(self.g_proj(x)).unflatten(-1, (-1, self.V))
        return y
