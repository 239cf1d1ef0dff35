"""Layers written out token by token and head by head, from their equations, and how to compare."""

import torch
import torch.nn.functional as F


def rms(x, weight, eps=1e-6):
    """Root mean square norm, as printed."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x):
    """Vectors of length one."""
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()


def short_conv(x, weight):
    """``y[t, d] = silu(sum_j weight[d, j] x[t - W + 1 + j, d])`` for one sequence ``[T D]``."""
    T, W = len(x), weight.shape[-1]
    rows = []
    for t in range(T):
        terms = [weight[:, 0, j] * x[t - W + 1 + j] for j in range(W) if t - W + 1 + j >= 0]
        rows.append(F.silu(sum(terms)))
    return torch.stack(rows)


def additive_memory(q, k, v, f):
    """``S <- f S + k v``, read ``K^-1/2 S q``: one head of one sequence, ``f [T K]``."""
    S, out = q.new_zeros(k.shape[-1], v.shape[-1]), []
    for t in range(len(q)):
        S = f[t][:, None] * S + torch.outer(k[t], v[t])
        out.append(q[t] @ S / q.shape[-1] ** 0.5)
    return torch.stack(out)


def delta_memory(q, k, v, beta, f):
    """``S <- (I - beta k k^T) S + beta k v^T`` for each write, after one decay a token.

    One head of one sequence: ``k [T n K]``, ``v [T n V]``, ``beta [T n]``, ``f [T K]``.
    """
    K = q.shape[-1]
    S, out, one = q.new_zeros(K, v.shape[-1]), [], torch.eye(K, dtype=q.dtype)
    for t in range(len(q)):
        S = torch.diag(f[t]) @ S
        for j in range(k.shape[1]):
            reflection = one - beta[t, j] * torch.outer(k[t, j], k[t, j])
            S = reflection @ S + beta[t, j] * torch.outer(k[t, j], v[t, j])
        out.append(q[t] @ S / K**0.5)
    return torch.stack(out)


def randomize(module, scale=0.3):
    """Shift every parameter by random numbers, from mild decays on: memories fill."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "A_log":
                parameter.zero_()
            parameter.add_(torch.randn_like(parameter) * scale)
    return module


def assert_equals_oracle(mixer, oracle, x):
    """Compare outputs and all gradients: to 1e-10 in float64, to 1e-5 in float32.

    Where the equation itself loses more in float32 (gradients that are small sums of large terms),
    twice that is allowed. ``oracle(weights, x)`` maps one sequence ``[T D]``, given the mixer's
    parameters by name.
    """

    def run(x, parameters):
        return mixer(x)[0]

    def truth(x, parameters):
        return torch.stack([oracle(parameters, one) for one in x])

    mixer.float()
    got, lost = (outputs_and_gradients(f, x.float(), mixer) for f in (run, truth))
    mixer.double()
    close, want = (outputs_and_gradients(f, x.double(), mixer) for f in (run, truth))
    for name, b in want.items():
        narrow, narrow_truth, wide = (
            ((found[name] - b).norm() / b.norm()).item() for found in (got, lost, close)
        )
        assert wide < 1e-10, f"{name}: relative error {wide:.1e} in float64"
        allowed = max(1e-5, 2 * narrow_truth)
        assert narrow < allowed, f"{name}: relative error {narrow:.1e} in float32"


def outputs_and_gradients(run, x, mixer):
    """Outputs, and gradients of a fixed sum of them, for the inputs and every parameter."""
    x = x.detach().requires_grad_()
    parameters = dict(mixer.named_parameters())
    y = run(x, parameters)
    weights = torch.linspace(-2, 3, y.numel(), dtype=torch.float64).sin().view(y.shape).to(y.dtype)
    grads = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}
