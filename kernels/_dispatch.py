"""Which implementation of an op runs: the choice is made here and nowhere else."""

import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS: tuple[str, ...] = tuple(b for b in get_args(Backend) if b != "auto")


def resolve(backend: str, x: Tensor, available: tuple[str, ...] = BACKENDS) -> str:
    """Name the implementation that runs on ``x``.

    ``"auto"`` means the environment's ``STATEZOO_BACKEND`` where set, else ``triton`` on NVIDIA
    GPUs and ``torch`` everywhere else (and for float64, which the fused kernels do not take). What
    is installed plays no part.

    Args:
        backend: What the caller asked for.
        x: A tensor of the call.
        available: The implementations that the op has.

    Raises:
        ValueError: If the name is unknown, or cannot run on the device or dtype of ``x``.
    """
    if backend == "auto":
        backend = os.environ.get("STATEZOO_BACKEND", "auto")
    if backend == "auto":
        fused = x.is_cuda and torch.version.hip is None and x.dtype != torch.float64
        backend = "triton" if fused and "triton" in available else "torch"
    if backend not in available:
        raise ValueError(f"backend must be 'auto' or one of {available}, got {backend!r}.")
    if backend == "triton":
        _check_triton(x)
    return backend


def _check_triton(x: Tensor) -> None:
    """Say why the fused kernels cannot run on ``x``, where they cannot."""
    if x.dtype == torch.float64:
        raise ValueError("backend 'triton' takes float32 or narrower; use 'torch' for float64.")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs tensors on an NVIDIA GPU, got {x.device}; use 'torch' there, "
            "or set TRITON_INTERPRET=1 before Python starts, to run it in Triton's interpreter."
        )


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """Return float32, or float64 where any of the tensors is: the dtype of states and decays."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32
