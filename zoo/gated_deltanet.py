"""Gated DeltaNet."""

from statezoo.kernels._dispatch import Backend
from statezoo.zoo.delta import DeltaLayer
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer


class GatedDeltaNet(DeltaLayer, Mixer):
    r"""DeltaNet whose memory also fades, by a learned rate in every head.

    .. math::
        S_t = e^{g_t} S_{t-1} + \beta_t k_t (v_t - e^{g_t} S_{t-1}^\top k_t)^\top, \qquad
        g_t = -e^{A} \mathrm{softplus}(W_a x_t + b)

        y_t = W_o (\mathrm{norm}(K^{-1/2} S_t^\top q_t) \odot \mathrm{silu}(W_g x_t)), \qquad
        \beta_t = \sigma(W_b x_t)

    Queries and keys have unit length; with values, they come from short convolutions and SiLU.

    Args:
        d_model: Width of the stream.
        n_heads: Heads of queries and keys.
        n_v_heads: Heads of values and memories, in groups that share a key; default ``n_heads``.
        head_dim: Width of a query and key; by default all have 3/4 of ``d_model``.
        expand_v: Width of a value over ``head_dim``.
        d_conv: Taps of the short convolutions; 0 for none.
        use_gate: Whether outputs are gated by ``silu(W_g x)`` after their norm.
        negative_eigenvalues: Whether ``beta`` reaches 2, so that a write can flip what is stored.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If heads and widths do not fit each other.

    Source: Yang et al., arXiv:2412.06464v3, section 3.4; initial values as in its code.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        d_conv: int = 4,
        use_gate: bool = True,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        K = head_dim or head_width(self.name, "3/4 d_model", d_model * 3 // 4, n_heads)
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_v_heads=n_v_heads or n_heads,
            widths=(K, head_width(self.name, "expand_v * head_dim", expand_v * K)),
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
            gates=("forget", "output") if use_gate else ("forget",),
            norm_eps=norm_eps,
            backend=backend,
        )
