"""Memory, communication and time of a training step, for each way to spread it.

The model of time is a roofline without overlap, so rather too long than too short::

    seconds = FLOPs of the model / (peak * efficiency) + bytes received / bandwidth

Recomputed activations add the forward pass of the blocks. Collectives are rings, each device
receives and sends: all gradients twice times ``(N-1)/N`` (all-reduce of ``ddp``); all weights twice
and all gradients once, for each batch (``fsdp2``); the states of the other slices once per layer
and direction beside the all-reduce (``SequenceParallel``, LASP-2, arXiv:2502.07563, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statezoo.lightning_modules.estimate import Precision
    from statezoo.zoo import StateZooConfig

RESERVED, GAPS = 1.5e9, 0.05
"""Assumed of graphics cards: bytes for driver, libraries and work space within operations, and the
part of the activations that is lost in gaps between blocks of memory."""


@dataclass(frozen=True)
class Machine:
    """Devices.

    Attributes:
        name: What kind.
        count: How many.
        memory: Bytes of each.
        peak: FLOP/s of each.
        efficiency: Part of the peak that training reaches.
        bandwidth: Bytes/s that a device receives in a collective.
        gpu: Whether they are graphics cards.
        said: Where the numbers are from, and which are assumptions.
    """

    name: str
    count: int
    memory: float
    peak: float
    efficiency: float
    bandwidth: float
    gpu: bool
    said: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        config: The network.
        tokens: Of the whole training.
        batch: Tokens of a step, about.
        length: Tokens of a window.
        precision: As the trainer's.
    """

    config: StateZooConfig
    tokens: float
    batch: float
    length: int
    precision: Precision

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.precision == "bf16-true" else 4


@dataclass(frozen=True)
class Way:
    """One way to train, and what it costs.

    Attributes:
        strategy: ``auto`` (one device), ``ddp``, ``fsdp2`` or ``SequenceParallel``.
        recompute: Whether activations are recomputed.
        slices: Processes that share a window.
        rows: Windows of a batch of a process, or of those that share them.
        accumulate: Batches of a step.
        memory: Bytes of each device, by what for; ``total`` is the most at a time.
        traffic: Bytes that each device receives in a step, by what.
        seconds: Of a step, ``compute`` and ``communication``.
        batch: Tokens of a step.
    """

    strategy: str
    recompute: bool
    slices: int = 1
    rows: int = 1
    accumulate: int = 1
    memory: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    batch: int = 0

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


class Costs:
    """Costs of a job on a machine; what was measured once is kept.

    Args:
        job: What is to be trained.
        machine: On what.
    """

    def __init__(self, job: Job, machine: Machine) -> None:
        from statezoo.lightning_modules.estimate import sizes
        from statezoo.lightning_modules.flops import count_flops

        self.job, self.machine = job, machine
        self.sizes = sizes(job.config)
        self.flops = count_flops(job.config, job.length)
        self._peaks: dict[Any, Any] = {}

    def ways(self) -> Iterator[Way]:
        """List what could be done, each with the largest batch that fits."""
        N = self.machine.count
        plain = ["auto"] if N == 1 else ["ddp", "fsdp2"]
        kinds = [(strategy, 1) for strategy in plain]
        slices = 2
        while N > 1 and slices <= N:
            if N % slices == 0 and slices <= self.job.length:
                kinds.append(("SequenceParallel", slices))
            slices *= 2
        for strategy, slices in kinds:
            for recompute in (False, True):
                yield self.largest(Way(strategy, recompute, slices))

    def largest(self, way: Way) -> Way:
        """Return a way with the largest batch that fits, or one window where none does."""
        share = ceil(self.windows / (self.machine.count // way.slices))
        rows, best = 1, self.of(replace(way, rows=1))
        while rows * 2 <= share:
            rows *= 2
            tried = self.of(replace(way, rows=rows))
            if not self.fits(tried):
                break
            best = tried
        return best

    @property
    def windows(self) -> int:
        """Windows of a step."""
        return max(1, round(self.job.batch / self.job.length))

    def fits(self, way: Way) -> bool:
        """Say whether a way needs no more memory than there is."""
        return way.memory["total"] <= self.machine.memory

    def of(self, way: Way, exact: bool = False) -> Way:
        """Return a way with its costs; ``exact`` runs its very batch, not one and two windows."""
        replicas = self.machine.count // way.slices
        accumulate = max(1, ceil(self.windows / (replicas * way.rows)))
        batch = accumulate * replicas * way.rows * self.job.length
        way = replace(way, accumulate=accumulate, batch=batch)
        memory, traffic = self.memory(way, exact), self.traffic(way)
        forward = self.flops.parts["layers"] / 3 if way.recompute else 0.0
        work = (self.flops.training + forward) * batch / self.machine.count
        seconds = {
            "compute": work / (self.machine.peak * self.machine.efficiency),
            "communication": sum(traffic.values()) / self.machine.bandwidth,
        }
        return replace(way, memory=memory, traffic=traffic, seconds=seconds)

    # ------------------------------------------------------------------ memory

    def memory(self, way: Way, exact: bool = False) -> dict[str, float]:
        """Return the bytes of a device."""
        size, b = self.sizes, self.job.width
        parts = self.machine.count if way.strategy == "fsdp2" else 1
        whole = b * size.all / parts
        copies = way.strategy in ("ddp", "SequenceParallel") and self.machine.count > 1
        found = {
            "weights": whole,
            "gradients": whole,
            "optimiser": 2 * whole,
            "reducer": b * size.all if copies else 0.0,
            "gathered": self._gathered(way),
        }
        held = sum(found.values())
        accumulates = way.accumulate > 1 or parts > 1
        peak = self._peak(way, accumulates, exact).total(whole, accumulates)
        activations = max(0.0, peak - whole)
        stepping = whole if self.machine.gpu else 2 * b * size.largest
        found["activations"] = activations
        more = RESERVED + GAPS * activations if self.machine.gpu else 0.0
        found["reserved"] = more
        return found | {"total": held + max(activations, stepping) + more}

    def _gathered(self, way: Way) -> float:
        """Bytes of what comes from other devices while a block is computed."""
        b = self.job.width
        if way.strategy == "fsdp2":
            return b * (2.0 * self.sizes.around + 3.0 * self.sizes.block)
        if way.slices > 1:
            kept = self._states(way, attends=True) * (way.slices - 1)
            return kept + self._states(way, attends=False) / self.job.config.n_layers * way.slices
        return 0.0

    def _peak(self, way: Way, accumulate: bool, exact: bool) -> Any:
        """Return what a batch makes; from one and two windows, unless it shall be exact."""
        if exact or way.rows <= 2:
            return self._measured(way, way.rows, accumulate)
        one, two = (self._measured(way, rows, accumulate) for rows in (1, 2))
        return type(one)(*(x + (way.rows - 1) * (y - x) for x, y in zip(one, two, strict=True)))

    def _measured(self, way: Way, rows: int, accumulate: bool) -> Any:
        from statezoo.lightning_modules.estimate import step_peak

        T = ceil(self.job.length / way.slices)
        key = (rows, T, way.recompute, accumulate)
        if key not in self._peaks:
            self._peaks[key] = step_peak(
                self.job.config,
                rows,
                T,
                precision=self.job.precision,
                recompute=way.recompute,
                accumulate=accumulate,
                fused=self.machine.gpu,
            )
        return self._peaks[key]

    # ------------------------------------------------------------ communication

    def traffic(self, way: Way) -> dict[str, float]:
        """Return the bytes that a device receives in a step."""
        N, whole = self.machine.count, float(self.job.width * self.sizes.all)
        part = (N - 1) / N
        if way.strategy == "fsdp2":
            return {
                "all-gather of weights": 2 * part * whole * way.accumulate,
                "reduce-scatter of gradients": part * whole * way.accumulate,
            }
        if N == 1:
            return {}
        found = {"all-reduce of gradients": 2 * part * whole}
        if way.slices > 1:
            passes = 3 if way.recompute else 2
            each = self._states(way, attends=True) + self._states(way, attends=False)
            found["all-gather of states"] = (way.slices - 1) * passes * way.accumulate * each
        return found

    def _states(self, way: Way, attends: bool) -> float:
        """Bytes that a slice hands to the others in all layers: keys and values, or states."""
        import torch

        from statezoo.zoo.delta import DeltaLayer
        from statezoo.zoo.mixer import build_mixer

        T, total = ceil(self.job.length / way.slices), 0.0
        with torch.device("meta"):
            for entry in self.job.config.layer_mixers:
                mixer = build_mixer(entry, self.job.config.d_model)
                size = mixer.state_size(T)
                if (mixer.state_size(T + 1) != size) == attends:
                    inner: Any = getattr(mixer, "inner", mixer)
                    delta = isinstance(inner, DeltaLayer)  # hands its transition on too
                    total += size * (1 + inner.K / inner.V if delta else 1)
        return total * way.rows
