"""How much memory a training step takes, from a run of it on tensors without values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from statezoo.lightning_modules.flops import smaller
from statezoo.lightning_modules.memory import LiveBytes, gradients_dropped
from statezoo.lightning_modules.speed import recompute_blocks
from statezoo.zoo import StateZooConfig, StateZooForCausalLM

__all__ = ["Precision", "Sizes", "StepPeak", "sizes", "step_peak"]

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]


class Sizes(NamedTuple):
    """Numbers of a network's parameters.

    Attributes:
        all: Of the whole.
        block: Of its largest block.
        around: Of what is around the blocks: embedding, last norm, head.
        largest: Of the largest tensor.
    """

    all: int
    block: int
    around: int
    largest: int


class StepPeak(NamedTuple):
    """Bytes of tensors that a step makes, beside weights and averages of the optimiser.

    Attributes:
        forward: Most at a time in the forward pass, without gradients of the step before.
        backward: Most at a time in the backward pass, with its gradients as far as they are made by
            then; those that are added to the gradients of batches before count until then alone.
    """

    forward: float
    backward: float

    def total(self, gradients: float, accumulate: bool) -> float:
        """Return the most at a time, with the ``gradients`` of the step or the batches before."""
        return max(self.forward + gradients, self.backward + (gradients if accumulate else 0))


def sizes(config: StateZooConfig) -> Sizes:
    """Count the parameters of a language model, without making any."""
    around = largest = 0
    kinds = {repr(mixer): mixer for mixer in config.layer_mixers}
    found: dict[str, int] = {}
    for key, mixer in kinds.items():
        with torch.device("meta"):
            net = StateZooForCausalLM(smaller(config, [mixer]))
        found[key] = sum(p.numel() for p in net.model.layers.parameters())
        around = sum(p.numel() for p in net.parameters()) - found[key]
        largest = max(largest, *(p.numel() for p in net.parameters()))
    blocks = [found[repr(mixer)] for mixer in config.layer_mixers]
    return Sizes(around + sum(blocks), max(blocks), around, largest)


def step_peak(
    config: StateZooConfig,
    rows: int,
    T: int,
    *,
    precision: Precision = "32-true",
    recompute: bool = False,
    accumulate: bool = False,
    fused: bool = False,
) -> StepPeak:
    """Measure a forward and a backward pass of a language model, without a value computed.

    The step itself runs, on tensors that have shapes alone, so that nothing is assumed of any
    layer. Deep networks run with two and three repetitions of their pattern of layers, from which
    all others follow. What operations use within themselves is not seen.

    Args:
        config: The network.
        rows: Sequences of a batch.
        T: Tokens of each.
        precision: As the trainer's.
        recompute: Whether blocks are computed anew in the backward pass.
        accumulate: Whether a step has several batches, so that gradients are added to others.
        fused: Whether the recurrences are the fused ones of GPUs, which keep other states.
    """
    period, L = len(config.mixers), config.n_layers
    if fused:
        config = smaller(config, [_fused(mixer) for mixer in config.layer_mixers])
    run = partial(
        _measure, rows=rows, T=T, precision=precision, recompute=recompute, accumulate=accumulate
    )
    short = 2 * period + L % period
    with _interpreted() if fused else nullcontext():
        if short + period >= L:
            return run(config)
        near, far = (run(smaller(config, config.layer_mixers[:n])) for n in (short, short + period))
    more = (L - short) / period
    return StepPeak(*(a + more * (b - a) for a, b in zip(near, far, strict=True)))


def _fused(mixer: dict[str, Any]) -> dict[str, Any]:
    """Return a mixer with the fused backend, where it has the choice, and those inside of it."""
    changed: dict[str, Any] = {"backend": "triton"} if mixer.get("backend") == "auto" else {}
    inner = mixer.get("inner_settings")
    if isinstance(inner, dict) and inner.get("backend") == "auto":
        changed["inner_settings"] = inner | {"backend": "triton"}
    return mixer | changed


def _measure(
    config: StateZooConfig, rows: int, T: int, precision: str, recompute: bool, accumulate: bool
) -> StepPeak:
    was = torch.get_default_dtype()
    with FakeTensorMode(), torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16 if precision == "bf16-true" else was)
        try:
            net: Any = StateZooForCausalLM(config).train()
            if recompute:
                recompute_blocks(net)
            tokens = torch.zeros(rows, T, dtype=torch.long)
            counter = LiveBytes([*net.parameters(), *net.buffers(), tokens])
            dropped = gradients_dropped([*net.parameters()]) if accumulate else nullcontext()
            with dropped, counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = net(input_ids=tokens, labels=tokens).loss
                forward, counter.peak = counter.peak, counter.now
                loss.backward()
        finally:
            torch.set_default_dtype(was)
    return StepPeak(forward, counter.peak)


@contextmanager
def _interpreted() -> Iterator[None]:
    """Let tensors that are on no GPU choose fused kernels; of these only shapes are asked."""
    key, was = "TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET")
    os.environ[key] = "1"
    try:
        yield
    finally:
        if was is None:
            del os.environ[key]
        else:
            os.environ[key] = was
