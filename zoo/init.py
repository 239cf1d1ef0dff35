"""Initial values that several mixers share."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def keep(module: Module) -> Module:
    """Keep the values that ``module`` has now: the model's general initialisation passes it by."""
    module._is_hf_initialized = True  # type: ignore[assignment]  # the mark transformers looks for
    return module


def linear(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    """Make a linear layer that keeps torch's own weights, as those of Mamba do; bias 0."""
    layer = keep(nn.Linear(d_in, d_out, bias=bias))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def scale_by_depth(output: nn.Linear, n_layers: int) -> None:
    """Draw the weights of a mixer's output as torch does, over the root of the depth.

    Source: Radford et al., GPT-2, section 2.3; as in Mamba's code.
    """
    nn.init.kaiming_uniform_(output.weight, a=5**0.5)
    with torch.no_grad():
        output.weight.div_(n_layers**0.5)


def A_log(n_heads: int, low: float = 1.0, high: float = 16.0) -> Tensor:
    """Draw ``log A [n_heads]``, ``A`` uniform in ``[low, high)``; decay is ``exp(-A * dt)``.

    Source: Dao & Gu, Mamba-2, arXiv:2405.21060v1, section 7 and its code.
    """
    return torch.empty(n_heads).uniform_(max(low, 1e-4), high).log()


def A_log_s4d(width: int, d_state: int) -> Tensor:
    """Return ``log(1..d_state)`` for every channel, ``[width d_state]`` (S4D-real, Mamba-1)."""
    return torch.arange(1, d_state + 1, dtype=torch.float32).log().expand(width, -1).contiguous()


def dt_bias(n: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Draw ``[n]`` biases such that ``softplus(bias)`` is log-uniform in ``[low, high]``.

    Source: Gu & Dao, Mamba, arXiv:2312.00752v2, section 3.6.
    """
    ratio = torch.tensor(high / low).log()
    dt = (torch.rand(n) * ratio).exp().mul(low).clamp(min=floor)
    return dt + (-torch.expm1(-dt)).log()


def conv_weight(width: int, d_conv: int) -> Tensor:
    """Draw the taps ``[width 1 d_conv]`` of a depthwise convolution as torch does."""
    return torch.empty(width, 1, d_conv).uniform_(-(d_conv**-0.5), d_conv**-0.5)
