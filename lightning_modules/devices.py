"""What devices can do at best: documented peaks of graphics cards, and of this processor."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

__all__ = ["DEVICES", "Device", "find_device", "measured_peak"]


class Device(NamedTuple):
    """A graphics card.

    Attributes:
        name: What people call it.
        memory: Bytes.
        peak: FLOP/s of dense matrix products (no sparsity) by number format: ``float32`` without
            tensor cores, ``tf32``, ``bfloat16`` (and float16, which is as fast).
        link: Bytes/s that one card can send to others in its machine while it receives as much.
        source: Where the numbers are from.
    """

    name: str
    memory: float
    peak: dict[str, float]
    link: float
    source: str


def _card(
    name: str, gb: float, float32: float, tf32: float, bfloat16: float, link: float, source: str
) -> Device:
    peak = {"float32": float32, "tf32": tf32, "bfloat16": bfloat16}
    return Device(name, gb * 1e9, {k: x * 1e12 for k, x in peak.items() if x}, link * 1e9, source)


DEVICES = {
    card.name: card
    for card in (
        _card("B200", 180, 75, 1125, 2250, 900, "NVIDIA DGX B200 datasheet, a card of eight"),
        _card("H200", 141, 67, 494.5, 989.5, 450, "NVIDIA H200 datasheet, SXM"),
        _card("H100", 80, 67, 494.5, 989.5, 450, "NVIDIA H100 datasheet, SXM5"),
        _card("H100-NVL", 94, 60, 417.5, 835.5, 300, "NVIDIA H100 datasheet, NVL"),
        _card("H100-PCIe", 80, 51, 378, 756, 64, "NVIDIA H100 PCIe product brief"),
        _card("A100-80GB", 80, 19.5, 156, 312, 300, "NVIDIA A100 datasheet, SXM4"),
        _card("A100-40GB", 40, 19.5, 156, 312, 300, "NVIDIA A100 datasheet, SXM4"),
        _card("L40S", 48, 91.6, 183, 362, 32, "NVIDIA L40S datasheet"),
        _card("L4", 24, 30.3, 60, 121, 32, "NVIDIA L4 datasheet"),
        _card("A10G", 24, 31.2, 35, 70, 32, "AWS: NVIDIA A10G datasheet"),
        _card("A6000", 48, 38.7, 77.4, 154.8, 56, "NVIDIA RTX A6000 datasheet"),
        _card("RTX-4090", 24, 82.6, 82.6, 165.2, 32, "NVIDIA Ada GPU architecture, appendix A"),
        _card("RTX-3090", 24, 35.6, 35.6, 71, 32, "NVIDIA GA102 architecture, table 9"),
        _card("T4", 16, 8.1, 0, 0, 16, "NVIDIA T4 datasheet; no bfloat16"),
    )
}
"""Those that are known. Lightning has a table too, but with the rates of sparse products for some
cards (H200, H100 NVL, float32 of several), which are twice what a dense one can reach."""

PATTERNS = (
    (r"h100.*nvl", "H100-NVL"),
    (r"h100.*pcie", "H100-PCIe"),
    (r"a100.*80\s*gb", "A100-80GB"),
    (r"a100.*40\s*gb", "A100-40GB"),
    (r"l40s", "L40S"),
    (r"rtx\s*a6000", "A6000"),
    (r"rtx 4090(?! d| laptop)", "RTX-4090"),
    (r"rtx 3090(?! ti)", "RTX-3090"),
    *((rf"\b{name.lower()}\b", name) for name in ("b200", "h200", "h100", "l4", "a10g", "t4")),
)


def find_device(name: str) -> Device | None:
    """Return what is known of a card that the driver calls ``name``, such as ``NVIDIA H200``."""
    text = name.lower().replace("-", " ")
    known: Iterable[str] = (card for pattern, card in PATTERNS if re.search(pattern, text))
    found = {card.lower(): device for card, device in DEVICES.items()}
    card = next(iter(known), "")
    return found.get(card.lower())


def measured_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Measure the FLOP/s of products of large square matrices: the best of some, in about 0.3 s.

    Args:
        device: Where.
        dtype: Of the matrices.
    """
    n = 1024 if device.type == "cpu" else 8192
    x, y = torch.ones(2, n, n, device=device, dtype=dtype)
    torch.mm(x, y)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.3:
        _wait(device)
        start = time.perf_counter()
        torch.mm(x, y)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
