"""``statezoo plan``: what a training will need, before it is paid for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from statezoo.plan.shapes import find_shape, number

if TYPE_CHECKING:
    from statezoo.plan.cost import Costs, Way


def plan(
    *,
    model: str,
    tokens: str,
    gpus: str,
    length: int = 2048,
    batch: str = "0.5M",
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] | None = None,
    settings: dict[str, Any] = {},  # noqa: B006  # shown in --help, never changed
    vocab_size: int | None = None,
    memory: float | None = None,
    peak: float | None = None,
    efficiency: float | None = None,
    bandwidth: float | None = None,
    calibrate: bool = False,
    out: str | None = None,
) -> None:
    """Plan a training: memory of a device, communication, time of a step and of the whole.

    Args:
        model: 1.3B-gla (size and architecture), a config, a run, a model's folder or short name.
        tokens: Tokens to train on, 100B.
        gpus: Number and name of the devices, 64xH100; cpu for this machine.
        length: Tokens of a window.
        batch: Tokens of an optimiser step, about.
        precision: As the trainer's; default bf16-mixed on GPUs, 32-true on cpu.
        settings: Settings of the network, --settings.d_model 2048 --settings.n_layers 24.
        vocab_size: Symbols; default those of the model, 32000 where it does not say.
        memory: GB of a device, where unknown or less.
        peak: TFLOP/s of a device, where unknown.
        efficiency: Part of the peak that training reaches; default an assumption.
        bandwidth: GB/s that a device receives while all talk.
        calibrate: Measure the efficiency here, on the layers of the model.
        out: JSON file to write.
    """
    from statezoo.plan.cost import Costs, Job
    from statezoo.plan.machines import calibrated, find_machine

    amount, step = number(tokens, "--tokens"), number(batch, "--batch")
    if length < 1:
        raise ValueError(f"--length must be at least 1 token, got {length}.")
    cpu = gpus.lower().rpartition("x")[2] == "cpu"
    chosen: Any = precision or ("32-true" if cpu else "bf16-mixed")
    machine = find_machine(
        gpus, memory=memory, peak=peak, efficiency=efficiency, bandwidth=bandwidth,
        bf16=chosen != "32-true",
    )  # fmt: skip
    job = Job(find_shape(model, settings, vocab_size), amount, step, length, chosen)
    if calibrate:
        machine = calibrated(machine, job)
    costs = Costs(job, machine)
    ways = list(costs.ways())
    best = choose(costs, ways)
    content = report(costs, ways, best, model)
    if out is not None:
        Path(out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(text(content) + (f"wrote {out}\n" if out else ""))


def choose(costs: Costs, ways: list[Way]) -> Way:
    """Return the fastest way that fits, its memory measured at its own batch.

    Raises:
        ValueError: If none fits; says what would help.
    """
    fits = sorted((w for w in ways if costs.fits(w)), key=lambda w: w.step / w.batch)
    for way in fits:
        exact = costs.of(way, exact=True)
        if costs.fits(exact):
            return exact
    least = min(ways, key=lambda w: w.memory["total"])
    need, has = least.memory["total"] / 1e9, costs.machine.memory / 1e9
    fixed = need - least.memory["activations"] / 1e9
    help_ = "shorter windows (--length)" if fixed < has else "a smaller model"
    more = ", --precision bf16-true" if costs.job.precision != "bf16-true" else ""
    raise ValueError(
        f"nothing fits: one window of {costs.job.length} tokens needs {need:.1f} GB on each of "
        f"{costs.machine.count} {costs.machine.name} at least ({least.strategy}, activations "
        f"{'recomputed' if least.recompute else 'kept'}), there are {has:.1f} GB: take more or "
        f"larger devices, {help_}{more}."
    )


def report(costs: Costs, ways: list[Way], best: Way, model: str) -> dict[str, Any]:
    """Compose all numbers of a plan as plain data: bytes, seconds, FLOPs."""
    job, machine = costs.job, costs.machine
    steps = -(-int(job.tokens) // best.batch)
    names = [mixer["name"] for mixer in job.config.mixers]
    return {
        "model": {
            "name": model,
            "parameters": costs.sizes.all,
            "d_model": job.config.d_model,
            "n_layers": job.config.n_layers,
            "mixers": names,
            "vocab_size": job.config.vocab_size,
            "flops_per_token": costs.flops.training,
            "flops_per_token_forward": costs.flops.forward,
        },
        "job": {"tokens": job.tokens, "length": job.length, "precision": job.precision},
        "machine": {
            "name": machine.name,
            "count": machine.count,
            "memory": machine.memory,
            "peak": machine.peak,
            "efficiency": machine.efficiency,
            "bandwidth": machine.bandwidth,
            "said": machine.said,
        },
        "ways": [_plain(costs, way) for way in ways],
        "best": _plain(costs, best) | {"arguments": arguments(costs, best, steps)},
        "steps": steps,
        "days": steps * best.step / 86400,
    }


def _plain(costs: Costs, way: Way) -> dict[str, Any]:
    replicas = costs.machine.count // way.slices
    used = costs.flops.training * way.batch / costs.machine.count
    return {
        "strategy": way.strategy,
        "recompute": way.recompute,
        "slices": way.slices,
        "batch_size": way.rows,
        "accumulate": way.accumulate,
        "tokens_per_step": way.batch,
        "replicas": replicas,
        "fits": costs.fits(way),
        "memory": way.memory,
        "traffic": way.traffic,
        "seconds": way.seconds | {"step": way.step},
        "mfu": used / way.step / costs.machine.peak,
    }


def arguments(costs: Costs, way: Way, steps: int) -> list[str]:
    """Write a way as arguments of ``statezoo fit``."""
    count = costs.machine.count
    nodes = count // 8 if count > 8 and count % 8 == 0 else 1
    found = ["--trainer.accelerator", "gpu" if costs.machine.gpu else "cpu"]
    found += ["--trainer.devices", str(count // nodes)]
    if nodes > 1:
        found += ["--trainer.num_nodes", str(nodes)]
    if way.strategy != "auto":
        found += ["--trainer.strategy", way.strategy]
    if way.slices > 1:
        found += ["--trainer.strategy.sequence_size", str(way.slices)]
    found += ["--trainer.precision", costs.job.precision]
    found += ["--data.seq_len", str(costs.job.length), "--data.batch_size", str(way.rows)]
    found += ["--trainer.accumulate_grad_batches", str(way.accumulate)]
    if way.recompute:
        found += ["--trainer.callbacks+", "ActivationCheckpointing"]
    return [*found, "--trainer.max_steps", str(steps)]


def text(content: dict[str, Any]) -> str:
    """Lay a plan out for people, in at most 100 columns."""
    from statezoo.listing import aligned

    model, machine, best = content["model"], content["machine"], content["best"]
    said = machine["said"]
    lines = [
        f"{model['name']}: {model['parameters'] / 1e6:,.0f} million parameters, width "
        f"{model['d_model']}, {model['n_layers']} layers, vocabulary {model['vocab_size']}",
        f"{model['flops_per_token'] / 1e9:.3g} GFLOP a token forward and backward, windows of "
        f"{content['job']['length']} tokens",
        f"{machine['count']} x {machine['name']}",
        *aligned(
            [
                ("  memory", f"{machine['memory'] / 1e9:.4g} GB", said.get("memory", "")),
                ("  peak", f"{machine['peak'] / 1e12:.4g} TFLOP/s", said.get("peak", "")),
                ("  efficiency", f"{machine['efficiency']:.2f}", said.get("efficiency", "")),
                (
                    "  bandwidth",
                    f"{machine['bandwidth'] / 1e9:.4g} GB/s",
                    said.get("bandwidth", "ASSUMED"),
                ),
            ]
        ),
        "",
    ]
    head = (
        "strategy",
        "activations",
        "batch",
        "accumulate",
        "GB a device",
        "GB a step",
        "s a step",
    )
    lines += [*aligned([head, *(_row(way) for way in content["ways"])]), ""]
    memory = [(f"  {what}", f"{size / 1e9:.3f} GB") for what, size in best["memory"].items()]
    traffic = [(f"  {what}", f"{size / 1e9:.3f} GB") for what, size in best["traffic"].items()]
    lines += [f"best: {_row(best)[0]}, memory of a device", *aligned(memory)]
    lines += ["received by a device in a step", *aligned(traffic)] if traffic else []
    seconds = best["seconds"]
    lines += [
        f"step: {best['tokens_per_step']:,} tokens, {seconds['step']:.3g} s (computing "
        f"{seconds['compute']:.3g}, talking {seconds['communication']:.3g}), MFU {best['mfu']:.2f}",
        f"{content['steps']:,} steps, {content['days']:.3g} days",
        "",
        f"statezoo fit --model ... --data ... {' '.join(best['arguments'])}",
    ]
    return "\n".join(lines) + "\n"


def _row(way: dict[str, Any]) -> tuple[str, ...]:
    name = way["strategy"] + (f" of {way['slices']}" if way["slices"] > 1 else "")
    total = f"{way['memory']['total'] / 1e9:.3g}" + ("" if way["fits"] else " (too much)")
    return (
        name,
        "recomputed" if way["recompute"] else "kept",
        str(way["batch_size"]),
        str(way["accumulate"]),
        total,
        f"{sum(way['traffic'].values()) / 1e9:.3g}",
        f"{way['seconds']['step']:.3g}",
    )
