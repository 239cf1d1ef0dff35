"""Loss and gradients, one chunk of tokens at a time."""

import torch
from torch import Tensor

from statezoo.kernels._dispatch import accumulator


def scored_rows(targets: Tensor, ignore_index: int, W: int) -> Tensor | None:
    """List the scored tokens on CPU, where looking is free; ``None`` means all of them.

    Raises:
        ValueError: If a target is neither ``ignore_index`` nor in ``0 .. W - 1``.
    """
    if targets.device.type != "cpu":
        return None
    scored = targets != ignore_index
    bad = scored & ((targets < 0) | (targets >= W))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: target {int(targets[at])} at token {at} is outside the head's "
            f"rows 0..{W - 1} and is not ignore_index={ignore_index}."
        )
    return None if scored.all() else scored.nonzero()[:, 0]


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return the loss and the log-sum-exp of every token, ``[M]`` each, 0 where not scored."""
    rows = scored_rows(targets, ignore_index, weight.shape[0])
    nll = x.new_zeros(2, x.shape[0], dtype=accumulator(x))
    part = nll if rows is None else nll[:, : rows.shape[0]]
    x, t = (x, targets) if rows is None else (x[rows], targets[rows])
    for a in range(0, x.shape[0], chunk):
        xs, ts = x[a : a + chunk], t[a : a + chunk]
        part[:, a : a + chunk] = torch.stack(_score(xs, weight, ts, ignore_index)[:2])
    if rows is not None:
        nll = torch.zeros_like(nll).index_copy_(1, rows, part)
    return nll[0].clone(), nll[1].clone()


def backward(
    scale: Tensor, lse: Tensor | None, x: Tensor, weight: Tensor, targets: Tensor,
    ignore_index: int, chunk: int, need_x: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the summed loss and the gradients of ``x`` and ``weight`` (empty if not needed).

    Args:
        scale: Gradient of every token's loss ``[M]``.
        lse: Log-sum-exp ``[M]`` where it is known.
        x: Hidden states ``[M D]``.
        weight: The head ``[W D]``.
        targets: Right symbols ``[M]``.
        ignore_index: Marks tokens not scored.
        chunk: Tokens a chunk.
        need_x: Whether the gradient of ``x`` is wanted.
        need_weight: Whether that of ``weight`` is.
    """
    rows = scored_rows(targets, ignore_index, weight.shape[0])
    wide = accumulator(x)
    dx = torch.zeros_like(x) if need_x else x.new_empty(0)
    dW = weight.new_zeros(weight.shape if need_weight else 0, dtype=wide)
    total = x.new_zeros((), dtype=wide)
    M = x.shape[0] if rows is None else rows.shape[0]
    for a in range(0, M, chunk):
        at = slice(a, min(a + chunk, M)) if rows is None else rows[a : a + chunk]
        xs, ts = x[at], targets[at]
        nll, of, logits = _score(xs, weight, ts, ignore_index, None if lse is None else lse[at])
        total += nll.sum()
        if not (need_x or need_weight):
            continue
        d = _softmax_minus_target(logits, of, ts, ignore_index).mul_(scale[at, None]).to(x.dtype)
        if need_x:
            dx[at] = d @ weight
        if need_weight and wide == x.dtype:
            dW.addmm_(d.mT, xs)
        elif need_weight:
            dW += d.mT @ xs
    return total, dx, dW.to(weight.dtype)


def _score(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, lse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss ``[c]``, log-sum-exp ``[c]`` and logits ``[c W]`` of a chunk."""
    logits = (x @ weight.mT).to(accumulator(x))
    scored = targets != ignore_index
    lse = logits.logsumexp(-1) if lse is None else lse
    picked = logits.gather(-1, targets.where(scored, 0)[:, None])[:, 0]
    return (lse - picked).where(scored, 0), lse, logits


def _softmax_minus_target(
    logits: Tensor, lse: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """Turn the logits into the gradient of each token's loss, in place."""
    scored = (targets != ignore_index)[:, None]
    d = logits.sub_(lse[:, None]).exp_()
    at = targets[:, None].where(scored, 0)
    d.scatter_add_(-1, at, d.new_full((1, 1), -1.0).expand_as(at))
    return d.masked_fill_(~scored, 0)
