"""DeltaNet."""

from statezoo.kernels._dispatch import Backend
from statezoo.zoo.delta import DeltaLayer
from statezoo.zoo.heads import head_width
from statezoo.zoo.mixer import Mixer


class DeltaNet(DeltaLayer, Mixer):
    r"""Linear attention that corrects what its memory says of a key, instead of adding to it.

    .. math::
        S_t = S_{t-1} + \beta_t k_t (v_t - S_{t-1}^\top k_t)^\top, \qquad
        y_t = W_o \mathrm{norm}(K^{-1/2} S_t^\top q_t), \qquad \beta_t = \sigma(W_b x_t)

    Queries and keys have unit length; with values, they come from short convolutions and SiLU.

    Args:
        d_model: Width of the stream.
        n_heads: Heads.
        expand_k: Width of all queries over ``d_model``.
        expand_v: Width of all values over ``d_model``.
        d_conv: Taps of the short convolutions; 0 for none.
        use_gate: Whether outputs are gated by ``silu(W_g x)`` after their norm.
        negative_eigenvalues: Whether ``beta`` reaches 2, so that a write can flip what is stored.
        norm_eps: Added under the root of the output norm.
        backend: Implementation of the recurrence.

    Raises:
        ValueError: If the widths cannot be cut into heads.

    Source: Yang et al., arXiv:2406.06484, sections 2 and 3; negative eigenvalues after Grazzi et
    al., arXiv:2411.12537.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        d_conv: int = 4,
        use_gate: bool = False,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-6,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_v_heads=n_heads,
            widths=(
                head_width(self.name, "expand_k * d_model", expand_k * d_model, n_heads),
                head_width(self.name, "expand_v * d_model", expand_v * d_model, n_heads),
            ),
            d_conv=d_conv,
            negative_eigenvalues=negative_eigenvalues,
            gates=("output",) if use_gate else (),
            norm_eps=norm_eps,
            backend=backend,
        )
