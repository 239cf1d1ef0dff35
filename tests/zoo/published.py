"""Models in fla's public format: tensors by their published names, and what they compute.

The layers are written out token by token from their equations, with the tensors as they stand in
the file; nothing here knows the names or the layout of the zoo.
"""

import math

import torch
import torch.nn.functional as F
from tests.zoo.oracle import additive_memory, delta_memory, rms, short_conv, unit

D, W, L = 16, 23, 3  # width, vocabulary, layers
I = 24  # noqa: E741  inner width of the MLP


def skeleton(mixer, fused=False):
    """Tensors of a model; ``mixer(i)`` gives shapes of the tensors of layer ``i``'s mixer."""
    shapes = {"model.embeddings.weight": (W, D), "model.norm.weight": (D,)}
    shapes["lm_head.weight"] = (W, D)
    for i in range(L):
        own = f"model.layers.{i}"
        shapes |= {f"{own}.attn.{name}": shape for name, shape in mixer(i).items()}
        shapes |= {f"{own}.attn_norm.weight": (D,), f"{own}.mlp_norm.weight": (D,)}
        if fused:
            shapes[f"{own}.mlp.gate_proj.weight"] = (2 * I, D)
        else:
            shapes |= {f"{own}.mlp.gate_proj.weight": (I, D), f"{own}.mlp.up_proj.weight": (I, D)}
        shapes[f"{own}.mlp.down_proj.weight"] = (D, I)
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * 0.3 + (name.endswith(("norm.weight", "gate.weight")) * 1.0)
        for name, shape in shapes.items()
    }


def logits(config, tensors, ids):
    """What the published code computes of one sequence ``ids [T]``, in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    eps = config.get("norm_eps", 1e-6)
    x = w["model.embeddings.weight"][ids]
    hybrid = config.get("attn") or {"layers": []}
    for i in range(L):
        own = f"model.layers.{i}."
        layer = {k.removeprefix(own + "attn."): v for k, v in w.items() if k.startswith(own)}
        y = rms(x, w[own + "attn_norm.weight"], eps)
        if i in hybrid["layers"]:
            x = x + attention(layer, y, hybrid)
        else:
            x = x + MIXERS[config["model_type"]](layer, y, config, i, w)
        y = rms(x, w[own + "mlp_norm.weight"], eps)
        gate = y @ w[own + "mlp.gate_proj.weight"].T
        if own + "mlp.up_proj.weight" in w:
            up = y @ w[own + "mlp.up_proj.weight"].T
        else:
            gate, up = gate.chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w[own + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embeddings.weight"])
    return rms(x, w["model.norm.weight"], eps) @ head.T


def heads(x, n):
    return x.unflatten(-1, (n, -1))


def stream(layer, name, x):
    """A projection, its short convolution if there is one."""
    y = x @ layer[f"{name}_proj.weight"].T
    return short_conv(y, layer[f"{name}_conv1d.weight"]) if f"{name}_conv1d.weight" in layer else y


def gated(layer, o, x, norm, eps, act=F.silu):
    """Norm per head, gate, project: ``o`` is a list of heads ``[T V]``."""
    o = torch.stack([rms(one, layer[norm], eps) for one in o], 1).flatten(1)
    gate = act(x @ layer["g_proj.weight"].T) if "g_proj.weight" in layer else 1.0
    return (o * gate) @ layer["o_proj.weight"].T


def gla(layer, x, config, i, w):
    H, kv = config["num_heads"], config.get("num_kv_heads") or config["num_heads"]
    q, k, v = (heads(stream(layer, s, x), n) for s, n in zip("qkv", (H, kv, kv), strict=True))
    gk = x @ layer["gk_proj.0.weight"].T @ layer["gk_proj.1.weight"].T + layer["gk_proj.1.bias"]
    f = heads((F.logsigmoid(gk) / 16).exp(), kv)
    o = [
        additive_memory(q[:, h], k[:, h * kv // H], v[:, h * kv // H], f[:, h * kv // H])
        for h in range(H)
    ]
    norm = "g_norm_swish_gate.weight" if "g_norm_swish_gate.weight" in layer else "g_norm.weight"
    return gated(layer, o, x, norm, config.get("norm_eps", 1e-6))


def delta(layer, x, config, i, w):
    """DeltaNet, Gated DeltaNet, Gated DeltaProduct."""
    norm = "o_norm.weight" if "o_norm.weight" in layer else "norm.weight"
    return gated(layer, delta_heads(layer, x, config), x, norm, config.get("norm_eps", 1e-6))


def mom(layer, x, config, i, w):
    """Gated DeltaNets, each on the tokens sent to it; the shared one on all."""
    p = (x @ layer["gate.weight"].T).softmax(-1)
    top, chosen = p.topk(config["topk"])
    top = top / top.sum(-1, keepdim=True)

    def memory(names):
        writes = {f"{s}_proj.weight": layer[names.format(s)] for s in "kvba"}
        return lambda tokens: torch.stack(delta_heads(layer | writes, tokens, config), 1)

    single = "k_proj.0.weight" not in layer
    o = memory("shared_{}.weight")(x) if config["shared_mem"] else 0.0
    for j in range(p.shape[1]):
        t, place = (chosen == j).nonzero(as_tuple=True)
        if len(t):
            read = memory("shared_{}.weight" if single else f"{{}}_proj.{j}.weight")(x[t])
            o = o + torch.zeros(len(x), *read.shape[1:], dtype=x.dtype).index_add(
                0, t, top[t, place, None, None] * read
            )
    return gated(layer, o.unbind(1), x, "o_norm.weight", config.get("norm_eps", 1e-6))


def delta_heads(layer, x, config):
    """What each head reads, ``n`` writes a token in the layout (n h d)."""
    H = config["num_heads"]
    Hv = config.get("num_v_heads") or H
    n = layer["b_proj.weight"].shape[0] // Hv
    q = heads(F.silu(x @ layer["q_proj.weight"].T), H)
    if "q_conv1d.weight" in layer:
        q = heads(stream(layer, "q", x), H)
    k, v = (stream(layer, s, x).unflatten(-1, (n, h, -1)) for s, h in (("k", H), ("v", Hv)))
    beta = (x @ layer["b_proj.weight"].T).sigmoid().unflatten(-1, (n, Hv))
    beta = beta * (2.0 if config.get("allow_neg_eigval") else 1.0)
    f = torch.ones(len(x), Hv, dtype=x.dtype)
    if "A_log" in layer:
        dt = F.softplus(x @ layer["a_proj.weight"].T + layer["dt_bias"])
        f = (-layer["A_log"].exp() * dt).exp()
    o = []
    for h in range(Hv):
        g = h * H // Hv
        decay = f[:, h, None].expand(-1, k.shape[-1])
        o.append(delta_memory(unit(q[:, g]), unit(k[:, :, g]), v[:, :, h], beta[..., h], decay))
    return o


def kda(layer, x, config, i, w):
    H = config["num_heads"]
    q, k, v = (heads(stream(layer, s, x), H) for s in "qkv")
    beta = (x @ layer["b_proj.weight"].T).sigmoid()
    f = x @ layer["f_proj.0.weight"].T @ layer["f_proj.1.weight"].T + layer["dt_bias"]
    A = layer["A_log"].flatten().exp()[:, None]
    if config.get("lower_bound") is not None:
        f = (config["lower_bound"] * (A * heads(f, H)).sigmoid()).exp()
    else:
        f = (-A * F.softplus(heads(f, H))).exp()
    o = [
        delta_memory(
            unit(q[:, h]), unit(k[:, h])[:, None], v[:, h, None], beta[:, h, None], f[:, h]
        )
        for h in range(H)
    ]
    o = torch.stack([rms(one, layer["o_norm.weight"]) for one in o], 1).flatten(1)
    gate = x @ layer["g_proj.0.weight"].T @ layer["g_proj.1.weight"].T + layer["g_proj.1.bias"]
    return (o * gate.sigmoid()) @ layer["o_proj.weight"].T


def rotate(x, base=10000.0):
    """Turn the pairs ``(c, c + K/2)`` of ``x [T K]`` by their position."""
    half, out = x.shape[-1] // 2, torch.empty_like(x)
    for t in range(len(x)):
        for c in range(half):
            angle = t * base ** (-c / half)
            a, b = x[t, c], x[t, c + half]
            out[t, c] = a * math.cos(angle) - b * math.sin(angle)
            out[t, c + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def retnet(layer, x, config, i, w):
    H = config["num_heads"]
    q, k, v = (heads(x @ layer[f"{s}_proj.weight"].T, H) for s in "qkv")
    o = []
    for h in range(H):
        f = torch.full_like(q[:, h], 1 - 2.0 ** (-5 - h))
        o.append(additive_memory(rotate(q[:, h]), rotate(k[:, h]), v[:, h], f))
    return gated(layer, o, x, "g_norm_swish_gate.weight", config.get("norm_eps", 1e-6))


def linear_attn(layer, x, config, i, w):
    H = config["num_heads"]
    q, k, v = (heads(x @ layer[f"{s}_proj.weight"].T, H) for s in "qkv")
    q, k = F.elu(q) + 1, F.elu(k) + 1
    o = [additive_memory(q[:, h], k[:, h], v[:, h], torch.ones_like(k[:, h])) for h in range(H)]
    return gated(layer, o, x, "norm.weight", config.get("norm_eps", 1e-6))


def hgrn2(layer, x, config, i, w):
    H = D // config["expand_ratio"]
    q, i_, f = (x @ layer[f"{s}_proj.weight"].T for s in "qif")
    table = w["model.lower_bounds"].softmax(0)
    bound = table.cumsum(0)[i] - table[0]
    f = bound + (1 - bound) * f.sigmoid()
    q, k, v, f = (heads(y, H) for y in (F.silu(q), 1 - f, i_, f))
    o = [additive_memory(q[:, h], k[:, h], v[:, h], f[:, h]) for h in range(H)]
    o = torch.cat(o, -1)
    return rms(o, layer["g_norm.weight"], 1e-5) @ layer["o_proj.weight"].T


def attention(layer, x, config, i=None, w=None):
    H, T = config["num_heads"], len(x)
    kv = config.get("num_kv_heads") or H
    window = config.get("window_size") or T
    streams = []
    for s, n in zip("qkv", (H, kv, kv), strict=True):
        streams.append(heads(x @ layer[f"{s}_proj.weight"].T + layer.get(f"{s}_proj.bias", 0), n))
    q, k, v = streams
    o = []
    for h in range(H):
        a, b = q[:, h], k[:, h * kv // H]
        if "q_norm.weight" in layer:
            a, b = rms(a, layer["q_norm.weight"], 1e-5), rms(b, layer["k_norm.weight"], 1e-5)
        a, b = (rotate(y, config.get("rope_theta", 10000.0)) for y in (a, b))
        rows = []
        for t in range(T):
            first = max(0, t - window + 1)
            weights = (b[first : t + 1] @ a[t] / a.shape[-1] ** 0.5).softmax(0)
            rows.append(weights @ v[first : t + 1, h * kv // H])
        o.append(torch.stack(rows))
    return torch.cat(o, -1) @ layer["o_proj.weight"].T


MIXERS = {
    "delta_net": delta,
    "gated_deltanet": delta,
    "gated_deltaproduct": delta,
    "gla": gla,
    "hgrn2": hgrn2,
    "kda": kda,
    "linear_attn": linear_attn,
    "mom": mom,
    "mom_gated_deltanet": mom,
    "retnet": retnet,
    "transformer": attention,
}
