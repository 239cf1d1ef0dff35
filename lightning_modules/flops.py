"""What a network computes for a token: FLOPs of the model, whatever form computes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from statezoo.kernels._flops import attention_flops
from statezoo.kernels.attention import KV, attention
from statezoo.zoo import StateZooConfig
from statezoo.zoo.model import StateZooModel
from statezoo.zoo.mom import MoM
from statezoo.zoo.routing import EachMemory

__all__ = ["Flops", "count_flops", "smaller"]


class Flops(NamedTuple):
    """FLOPs of the model for one token, two for each multiply-add.

    Attributes:
        forward: Of the forward pass.
        training: Of forward and backward pass, all weights trained; nothing recomputed.
        parts: Those of ``training`` by part: ``layers``, and the ``head``.
    """

    forward: float
    training: float
    parts: Mapping[str, float]


def count_flops(config: StateZooConfig, T: int, head: bool = True) -> Flops:
    """Count the FLOPs of the model for one token, as mean over a sequence of ``T`` tokens.

    Counted are the products of linear maps, convolutions, and writes and reads of the memories
    (``kernels/_flops.py`` has each formula), by running a layer of each kind on tensors without
    values: no weight is made. Attention counts what a token sees, so that its part grows with
    ``T``. A mixture of memories counts the projections for the memories that a token goes to,
    though all are computed. Norms, gates and other elementwise work do not count.

    Args:
        config: The network.
        T: Tokens of a sequence.
        head: Whether each token is scored among the symbols of the vocabulary.

    Source: Chowdhery et al., PaLM, arXiv:2204.02311v5, appendix B, which counts all of a causal
    mask; here what a mask hides is not counted.
    """
    if T < 1:
        raise ValueError(f"count_flops needs sequences of at least 1 token, got {T}.")
    layers = [0.0, 0.0]
    kinds: dict[str, tuple[dict[str, Any], int]] = {}
    for mixer in config.layer_mixers:
        key = repr(sorted(mixer.items(), key=lambda item: item[0]))
        kinds[key] = (mixer, kinds.get(key, (mixer, 0))[1] + 1)
    for mixer, n in kinds.values():
        one = smaller(config, [mixer])
        for i, backward in enumerate((False, True)):
            layers[i] += n * _count(one, T, backward) / T
    logits = 2.0 * config.d_model * config.vocab_size if head else 0.0
    training = layers[1] + 3 * logits
    parts = {"layers": layers[1], "head": 3 * logits}
    return Flops(layers[0] + logits, training, parts)


def smaller(config: StateZooConfig, mixers: list[dict[str, Any]]) -> StateZooConfig:
    """Return the configuration of the same network with these layers instead of its own."""
    kept = {key: getattr(config, key) for key in config.own_keys()}
    return StateZooConfig(**{**kept, "mixers": mixers, "n_layers": len(mixers)})


def _count(config: StateZooConfig, T: int, training: bool) -> int:
    """Count the FLOPs of the body of a network, for one sequence."""
    with FakeTensorMode(), torch.device("cpu"):
        net = StateZooModel(config).train(training)
        tokens = torch.zeros(1, T, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter, _attention_counted() as seen, torch.set_grad_enabled(training):
            out = net(input_ids=tokens, use_cache=False).last_hidden_state
            if training:
                out.sum().backward()
        idle = sum(_idle(part) for part in net.modules() if isinstance(part, MoM))
    times = 3 if training else 1
    return int(counter.get_total_flops() + times * (sum(seen) - idle * T))


def _idle(mixer: MoM) -> int:
    """Count the FLOPs for a token of projections for memories that it does not go to."""
    unused = mixer.n - mixer.top_k - mixer.shared
    parts = (part for part in mixer.inner.modules() if isinstance(part, EachMemory) and part.n > 1)
    return sum(
        2 * part.in_features * (part.out_features - part.common) // part.n * unused
        for part in parts
    )


@contextmanager
def _attention_counted() -> Iterator[list[int]]:
    """Note the FLOPs of each call of attention instead of computing it.

    The files of the mixers see another operation meanwhile, of the same inputs and outputs, all
    elementwise: which of its kernels torch would take, and what that one wastes, plays no part.
    """
    seen: list[int] = []

    def noting(
        q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, sinks: int = 0, **_: Any
    ) -> tuple[Tensor, KV]:
        seen.append(attention_flops(q.shape, k.shape, v.shape, window, sinks))
        shared = q.shape[2] // k.shape[2]
        o = (k.sum(-1, keepdim=True) + v).repeat_interleave(shared, 2)
        return o + q.sum(-1, keepdim=True), KV(k, v, torch.zeros(len(q), dtype=torch.long))

    files = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("statezoo.zoo.") and getattr(module, "attention", None) is attention
    ]
    for module in files:
        cast(Any, module).attention = noting
    try:
        yield seen
    finally:
        for module in files:
            cast(Any, module).attention = attention
