"""The mean of what followed the same n tokens before: the memory of n-gram heads."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from statezoo.kernels._varlen import check_packing
from statezoo.kernels.ngram_mean import _op

__all__ = ["ngram_mean"]


def ngram_mean(
    h: Float[Tensor, "B L D"],
    ids: Int[Tensor, "B L"],
    *,
    orders: Sequence[int],
    window: int | None = None,
    queries: int | None = None,
    cu_seqlens: Int[Tensor, " N+1"] | None = None,
) -> Float[Tensor, "B T n*D"]:
    r"""Read the mean of the vectors at tokens that follow an earlier copy of the last tokens.

    .. math::
        a_t = \frac{1}{|M_t|} \sum_{s \in M_t} h_s, \qquad
        M_t = \{ s < t : x_{s-n..s-1} = x_{t-n+1..t} \}

    for each order ``n``; 0 where ``M_t`` is empty. Tokens are compared themselves, so that no two
    n-grams are ever taken for one another. The copy and ``s`` lie in the window.

    Each chunk of queries is compared to all tokens before it: time ``n T L D`` multiply-adds as in
    attention, memory ``B L`` times a chunk of 128. The mean is linear in ``h``; backward compares
    once more, and nothing but the tokens is kept.

    Args:
        h: What is averaged.
        ids: Tokens ``x``; below 0 stands for none, before the start of a sequence.
        orders: Lengths ``n`` of the n-grams.
        window: How many last tokens count, ``t`` itself included; default all.
        queries: How many last tokens ``T`` ask; default all.
        cu_seqlens: Bounds ``0 .. L`` of sequences packed along ``L``; needs ``B = 1``.

    Returns:
        The means of each order side by side, in the dtype of ``h``; sums are in float32 (float64 if
        ``h`` is).

    Raises:
        ValueError: If shapes disagree or a size is out of range.

    Example:
        >>> h, ids = torch.arange(5.0).view(1, 5, 1), torch.tensor([[7, 8, 7, 8, 7]])
        >>> ngram_mean(h, ids, orders=[1, 2])[0, -1]  # 7 was followed at 1 and 3, 8 7 at 3
        tensor([2., 3.])

    Source: Akyuerek et al., In-Context Language Learning, arXiv:2401.12973, n-gram heads.
    """
    T = h.shape[1] if queries is None else queries
    if h.ndim != 3 or ids.shape != h.shape[:2] or not 0 <= T <= h.shape[1]:
        raise ValueError(
            "ngram_mean needs h [B L D], ids [B L] and at most L queries; got h "
            f"{tuple(h.shape)}, ids {tuple(ids.shape)}, {T} queries."
        )
    if not orders or min(orders) < 1 or (window is not None and window < 1):
        raise ValueError(
            f"ngram_mean needs orders >= 1 and window >= 1 or None, got {[*orders]}, {window}."
        )
    check_packing("ngram_mean", h, cu_seqlens)
    out: Tensor = _op.means(h, ids, cu_seqlens, T, [*orders], window or 0)
    return out
