"""A mixer with every kind of initial value that needs protection."""

import torch
from torch import nn

from statezoo.zoo import Mixer, init


class ToyMixer(Mixer):
    """A decaying mean with a bias and a skip, so that each special parameter has a use."""

    def __init__(self, d_model: int, *, n_heads: int = 2) -> None:
        super().__init__()
        self.A_log = nn.Parameter(init.A_log(d_model))
        self.D = nn.Parameter(torch.ones(d_model))
        self.dt_proj = init.keep(nn.Linear(d_model, d_model))
        with torch.no_grad():
            self.dt_proj.bias.copy_(init.dt_bias(d_model))
        self.dt_bias = nn.Parameter(init.dt_bias(d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def reset_parameters(self, n_layers):
        with torch.no_grad():
            self.out_proj.weight.fill_(1 / n_layers)

    def forward(self, x, state=None, cu_seqlens=None):
        dt = nn.functional.softplus(self.dt_proj(x) + self.dt_bias)
        return self.out_proj(x * self.D - dt * self.A_log.exp()), (x[:, -1],)

    def state_size(self, T):
        return 0
