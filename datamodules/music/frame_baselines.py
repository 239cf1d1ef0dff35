"""What simple models of piano-roll frames need, in nats per frame of 88 independent notes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["frame_baselines", "linear_nll", "marginal_nll"]

Roll = NDArray[np.uint8]

PSEUDO = 0.5
"""Frames added with, and as many without, each note: no frequency is 0 or 1."""
RIDGE = 1e-4
"""Weight of the squared coefficients beside the mean nats of a frame."""


def marginal_nll(train: Sequence[Roll], held_out: Sequence[Roll]) -> float:
    """Nats per frame where each note sounds as often as in training.

    Args:
        train: Pieces ``[T P]`` of zeros and ones.
        held_out: Pieces that are scored.
    """
    frames, scored = np.concatenate(train), np.concatenate(held_out)
    p = (frames.sum(0, dtype=np.float64) + PSEUDO) / (len(frames) + 2 * PSEUDO)
    nats = np.where(scored == 1, -np.log(p), -np.log1p(-p))
    return float(nats.sum() / len(scored))


def linear_nll(
    train: Sequence[Roll], held_out: Sequence[Roll], *, context: int = 1, steps: int = 100
) -> float:
    """Nats per frame of one logistic regression per note on the ``context`` frames before.

    Frames before the first are empty and marked so; found by L-BFGS from zero, so the number is
    the same in every run.

    Args:
        train: Pieces ``[T P]`` of zeros and ones.
        held_out: Pieces that are scored.
        context: Frames that are read.
        steps: Most steps of L-BFGS.
    """
    x, y = _regression(train, context)
    weight = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        nats = binary_cross_entropy_with_logits(x @ weight, y, reduction="sum") / len(y)
        loss: Tensor = nats + RIDGE * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    x, y = _regression(held_out, context)
    with torch.no_grad():
        nats = binary_cross_entropy_with_logits(x @ weight, y, reduction="sum")
    return float(nats / len(y))


def frame_baselines(train: Sequence[Roll], held_out: Sequence[Roll]) -> dict[str, float]:
    """Nats per frame of the simple models, by name, the weakest first."""
    return {
        "note frequencies": marginal_nll(train, held_out),
        "linear, previous frame": linear_nll(train, held_out),
        "linear, previous 4 frames": linear_nll(train, held_out, context=4),
    }


def _regression(pieces: Sequence[Roll], context: int) -> tuple[Tensor, Tensor]:
    """Return inputs (frames before, whether each was there, 1) and targets, all pieces' frames."""
    inputs = []
    for piece in pieces:
        seen = np.concatenate([piece, np.ones((len(piece), 1), np.uint8)], axis=1)
        padded = np.concatenate([np.zeros((context, seen.shape[1]), np.uint8), seen[:-1]])
        inputs.append(np.concatenate([padded[i : i + len(piece)] for i in range(context)], axis=1))
    x = np.concatenate(inputs)
    x = np.concatenate([x, np.ones((len(x), 1), np.uint8)], axis=1)
    return torch.from_numpy(x).float(), torch.from_numpy(np.concatenate(pieces)).float()
