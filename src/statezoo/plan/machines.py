"""What a plan is for: ``64xH100``, ``8x`` a card described by its numbers, ``cpu``."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from statezoo.parser import nearest
from statezoo.plan.cost import Job, Machine

if TYPE_CHECKING:
    import torch

EFFICIENCY = 0.35
"""Assumed part of the peak that training reaches, model FLOPs over peak, where none is measured."""
NODE, NETWORK = 8, 50e9
"""Assumed: devices in a machine, and bytes/s that each can send to other machines (400 Gbit/s)."""


def find_machine(
    gpus: str, *, memory: float | None, peak: float | None, efficiency: float | None,
    bandwidth: float | None, bf16: bool,
) -> Machine:  # fmt: skip
    """Return the devices that are meant.

    Args:
        gpus: Number and name, ``64xH100``, or ``cpu``.
        memory: GB of a device instead of those known.
        peak: TFLOP/s of a device instead of those known.
        efficiency: Part of the peak that training reaches.
        bandwidth: GB/s that a device receives in a collective.
        bf16: Whether products are of bfloat16.

    Raises:
        ValueError: If the device is unknown and not described, or a number out of range.
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\S+)", gpus.strip(), re.IGNORECASE)
    if not found or int(found[1] or 1) < 1:
        raise ValueError(f"--gpus must be a number and a name such as 64xH100, got {gpus!r}.")
    count, name = int(found[1] or 1), found[2]
    for option, value in (("memory", memory), ("peak", peak), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise ValueError(f"--{option} must be above 0, got {value}.")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ValueError(f"--efficiency must lie in (0, 1], got {efficiency}.")
    cpu = name.lower() == "cpu"
    size, flops, link, said = _this(count) if cpu else _card(name, memory, peak, bf16)
    if memory is not None:
        size, said["memory"] = memory * 1e9, "as given"
    if peak is not None:
        flops, said["peak"] = peak * 1e12, "as given"
    said["efficiency"] = "as given" if efficiency else "ASSUMED, not measured: give --efficiency"
    if bandwidth is not None:
        link, said["bandwidth"] = bandwidth * 1e9, "as given"
    elif not cpu:
        said["bandwidth"] = "within a machine, as documented"
        if count > NODE:
            link = min(link, NODE * NETWORK)
            said["bandwidth"] = f"ASSUMED: {NODE} devices a machine, 50 GB/s each to others"
    used = efficiency or EFFICIENCY
    return Machine(name, count, size, flops, used, link, not cpu, said)


def _this(count: int) -> tuple[float, float, float, dict[str, str]]:
    """Describe this machine's processor, shared by so many processes."""
    import torch

    from statezoo.lightning_modules.devices import measured_peak
    from statezoo.lightning_modules.facts import machine
    from statezoo.lightning_modules.memory import available_bytes

    device = torch.device("cpu")
    said = {
        "memory": f"free on this machine, {machine()}",
        "peak": f"measured here, float32, {torch.get_num_threads()} threads",
        "bandwidth": "ASSUMED: 5 GB/s between processes",
    }
    return available_bytes(device) / count, measured_peak(device) / count, 5e9, said


def _card(
    name: str, memory: float | None, peak: float | None, bf16: bool
) -> tuple[float, float, float, dict[str, str]]:
    """Describe a graphics card."""
    from statezoo.lightning_modules.devices import DEVICES

    known = {card.lower(): device for card, device in DEVICES.items()}
    also = {"a100": "a100-80gb", "4090": "rtx-4090", "3090": "rtx-3090"}
    device = known.get(also.get(name.lower(), name.lower()))
    kind = "bfloat16" if bf16 else "float32"
    if device is None and (memory is None or peak is None):
        raise ValueError(
            f"--gpus: no device {name!r}{nearest(name, DEVICES)}; known are {', '.join(DEVICES)} "
            "and cpu. Describe another with --memory in GB and --peak in TFLOP/s."
        )
    if device is None:
        return 0.0, 0.0, 32e9, {}
    if kind not in device.peak and peak is None:
        raise ValueError(
            f"--gpus {device.name} cannot multiply in {kind}: choose another --precision."
        )
    said = {"memory": device.source, "peak": f"{device.source}, {kind}, dense"}
    return device.memory, device.peak.get(kind, 0.0), device.link, said


def calibrated(machine: Machine, job: Job) -> Machine:
    """Return a machine with the efficiency that training steps of the job's layers reach here.

    A network of one repetition of the job's pattern of layers makes three steps of one window; the
    best counts. Its efficiency is FLOPs of the model over time and peak.

    Raises:
        ValueError: If the plan is for devices that are not here.
    """
    import torch

    from statezoo.lightning_modules.flops import count_flops, smaller
    from statezoo.zoo import StateZooForCausalLM

    if machine.gpu and not torch.cuda.is_available():
        raise ValueError(
            f"--calibrate measures this machine, and there is no {machine.name} in it: run it on "
            "one and give --efficiency here, or plan with --gpus cpu."
        )
    device = torch.device("cuda" if machine.gpu else "cpu")
    config = smaller(job.config, job.config.mixers)
    with device:
        net = StateZooForCausalLM(config).train()
        tokens = torch.zeros(1, job.length, dtype=torch.long)
    best = min(_step(net, tokens, job.precision) for _ in range(3))
    work = count_flops(config, job.length).training * job.length
    peak = machine.peak if machine.gpu else machine.peak * machine.count
    used = work / best / peak
    said = machine.said | {"efficiency": f"measured here: {config.n_layers} layers, one window"}
    return replace(machine, efficiency=min(1.0, used), said=said)


def _step(net: torch.nn.Module, tokens: torch.Tensor, precision: str) -> float:
    """Return the seconds of a forward and a backward pass."""
    import torch

    start = time.perf_counter()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = net(input_ids=tokens, labels=tokens).loss
    loss.backward()
    net.zero_grad()
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
