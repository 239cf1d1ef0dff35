"""DeltaProduct and Gated DeltaProduct."""

from statezoo.kernels._dispatch import Backend
from statezoo.zoo.delta import DeltaLayer
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer


class DeltaProduct(DeltaLayer, Mixer):
    r"""Several delta-rule writes a token: each memory is multiplied by a product of reflections.

    .. math::
        \tilde S_0 = e^{g_t} S_{t-1}, \qquad
        \tilde S_j = \tilde S_{j-1} + \beta_{tj} k_{tj} (v_{tj} - \tilde S_{j-1}^\top k_{tj})^\top,
        \qquad S_t = \tilde S_n

        y_t = W_o (\mathrm{norm}(K^{-1/2} S_t^\top q_t) \odot \mathrm{silu}(W_g x_t))

    Keys, values and strengths of the ``n`` writes of a token come from their own slices of wide
    projections, in the layout ``(n h d)``, each after its own short convolution along tokens. With
    ``negative_eigenvalues``, two writes make a rotation, ``n`` any permutation of ``n + 1`` items.

    Args:
        d_model: Width of the stream.
        n_heads: Heads of queries and keys.
        n_v_heads: Heads of values and memories, in groups that share keys; default ``n_heads``.
        head_dim: Width of a query and key; by default all have 3/4 of ``d_model``.
        expand_v: Width of a value over ``head_dim``.
        n_householder: Writes a token.
        d_conv: Taps of the short convolutions; 0 for none.
        use_forget_gate: Whether memories fade, as in Gated DeltaNet.
        negative_eigenvalues: Whether ``beta`` reaches 2, so that a write can flip what is stored.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If heads and widths do not fit each other.

    Source: Siems et al., DeltaProduct, arXiv:2502.10297, section 3; initial values as in its code.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        n_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        n_householder: int = 2,
        d_conv: int = 4,
        use_forget_gate: bool = False,
        negative_eigenvalues: bool = True,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        K = head_dim or head_width(self.name, "3/4 d_model", d_model * 3 // 4, n_heads)
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_v_heads=n_v_heads or n_heads,
            widths=(K, head_width(self.name, "expand_v * head_dim", expand_v * K)),
            per_token=(n_householder,),
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
            gates=("forget", "output") if use_forget_gate else ("output",),
            norm_eps=norm_eps,
            backend=backend,
        )
