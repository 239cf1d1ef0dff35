"""The optimiser's settings, which parameters it decays, and how its rate runs along the steps."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW

NOT_DECAYED = ("bias", "A_log", "D", "dt_bias")
"""Last parts of the names of parameters that weight decay would harm, whatever their shape."""


@dataclass
class Optim:
    """AdamW with a linear warm-up and a schedule along optimiser steps.

    Args:
        lr: Learning rate after the warm-up, at least 0.
        weight_decay: Pull of the matrices to zero, times the rate; norms, biases, embeddings,
            A_log, D, dt_bias and learnt initial states are left alone.
        betas: Memory of the two gradient averages, each in [0, 1).
        warmup_steps: Steps of rising rate; at most a tenth of all steps is used for it.
        schedule: Rate after the warm-up.
        final_lr: Rate at the last step, as a fraction of ``lr``.
        total_steps: Steps until ``final_lr``; default is the trainer's number of steps.
        clip_norm: Longest gradient that is used as it is; longer ones are scaled to this length.
            0 never clips.
        decay_embeddings: Pull the embedding to zero too.
        rates: Factors of ``lr`` by patterns of the network's parameter names, the first that fits:
            ``{"score*": 10, "model.layers.0.*": 0.1, "model.embed*": 0}``; 0 freezes. Names without
            a pattern have ``lr``.
    """

    lr: float = 3e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = 0.1
    total_steps: int | None = None
    clip_norm: float = 1.0
    decay_embeddings: bool = False
    rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        if self.lr < 0 or self.weight_decay < 0 or self.clip_norm < 0 or self.warmup_steps < 0:
            raise ValueError(
                "optim needs lr, weight_decay, clip_norm and warmup_steps of at least 0, got "
                f"{self.lr}, {self.weight_decay}, {self.clip_norm} and {self.warmup_steps}."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}.")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(
                f"optim.schedule must be cosine, linear or constant, got {self.schedule!r}."
            )
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"optim.total_steps must be at least 1, got {self.total_steps}.")
        for pattern, factor in self.rates.items():
            if not 0 <= factor < math.inf:
                raise ValueError(
                    f"optim.rates must be at least 0, a factor of lr, got {factor} for {pattern!r}."
                )

    @classmethod
    def of(cls, settings: "Optim | Mapping[str, Any] | None") -> "Optim":
        """Return settings of one's own, from an ``Optim``, a mapping of some of its fields or none.

        Raises:
            ValueError: If a key is no setting, with the nearest one.
        """
        given = asdict(settings) if isinstance(settings, Optim) else dict(settings or {})
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                raise ValueError(f"optim has no setting {key!r}: {hint}")
        return cls(**given)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, as checkpoints keep them."""
        return {**asdict(self), "betas": list(self.betas)}


def rate(step: int, optim: Optim, total_steps: int | None) -> float:
    """Return the learning rate of ``step`` (the first is 0), as a fraction of ``optim.lr``.

    Args:
        step: Optimiser steps taken before this one.
        optim: Settings.
        total_steps: Steps of the whole run; None is unknown, and then the rate stays after warm-up.
    """
    warmup = optim.warmup_steps
    if total_steps is not None:
        warmup = min(warmup, total_steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if total_steps is None or optim.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    left = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.final_lr + (1 - optim.final_lr) * left


def decays(name: str, embeddings: set[str], decay_embeddings: bool = False) -> bool:
    """Say by its name whether a parameter decays.

    Args:
        name: As in ``named_parameters``.
        embeddings: Names of the embedding tables.
        decay_embeddings: What to say of those.
    """
    *path, last = name.split(".")
    if name in embeddings:
        return decay_embeddings
    if "initial_state" in name:
        return False
    in_norm = any("norm" in part.lower() for part in path[-1:])
    return not (in_norm or last in NOT_DECAYED or last.endswith("_bias"))


def freeze(net: nn.Module, rates: Mapping[str, float]) -> None:
    """Freeze the parameters of ``net``, in place, whose rate is 0."""
    for name, parameter in net.named_parameters():
        pattern = _pattern_of(name, rates)
        if pattern is not None and rates[pattern] == 0:
            parameter.requires_grad_(False)


def _pattern_of(name: str, rates: Iterable[str]) -> str | None:
    """Return the first pattern that a name fits, if there is one."""
    return next((pattern for pattern in rates if fnmatchcase(name, pattern)), None)


def check_rates(net: nn.Module, rates: Mapping[str, float]) -> None:
    """Compare patterns with the names of parameters.

    Raises:
        ValueError: If a pattern fits no name, or only names that an earlier pattern has, or sets
            the rate of what is frozen by ``tune``; or if nothing is left to be trained.
    """
    found: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in rates}
    for name, parameter in net.named_parameters():
        if (pattern := _pattern_of(name, rates)) is not None:
            found[pattern].append(parameter)
    for pattern, parameters in found.items():
        if not parameters:
            raise ValueError(f"optim.rates: {_unfit(pattern, net)}.")
        if rates[pattern] and not any(p.requires_grad for p in parameters):
            raise ValueError(
                f"optim.rates: {pattern!r} fits only parameters that are not trained here: leave "
                "the pattern out, or choose another tune."
            )
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError(
            "optim.rates freezes every parameter, so there is nothing to train: give some pattern "
            "a rate above 0."
        )


def _unfit(pattern: str, net: nn.Module) -> str:
    """Say why a pattern fits nothing, and what it may have meant."""
    names = [name for name, _ in net.named_parameters()]
    if any(fnmatchcase(name, pattern) for name in names):
        return f"what {pattern!r} fits has its rate from the patterns before it: put it first"
    every = net.named_parameters(remove_duplicate=False)
    if tied := [(name, p) for name, p in every if fnmatchcase(name, pattern)]:
        own = next(name for name, p in net.named_parameters() if p is tied[0][1])
        return f"{pattern!r} fits {tied[0][0]}, which is the same tensor as {own}: name that one"
    parts = {
        ".".join(n.split(".")[i:]): n for n in reversed(names) for i in range(n.count(".") + 1)
    }
    near = [parts[part] for part in get_close_matches(pattern.strip("*."), parts, 3, 0.4)]
    return f"{pattern!r} fits no parameter; the nearest are {', '.join(near or names[:3])}"


def adamw(net: nn.Module, optim: Optim) -> AdamW:
    """Return AdamW over the trainable parameters, frozen by :func:`freeze` where a rate is 0.

    There is a decayed and an undecayed group for each factor of the rate, those of factor 1 first.

    Raises:
        ValueError: If ``optim.rates`` has a pattern without use.
    """
    embeddings = {
        f"{path}.{name}" if path else name
        for path, module in net.named_modules()
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    freeze(net, optim.rates)
    check_rates(net, optim.rates)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            pattern = _pattern_of(name, optim.rates)
            factor = 1.0 if pattern is None else float(optim.rates[pattern])
            decayed = decays(name, embeddings, optim.decay_embeddings)
            groups.setdefault((factor, decayed), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "lr": factor * optim.lr,
                "weight_decay": optim.weight_decay if decayed else 0.0,
            }
            for (factor, decayed), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=optim.betas,
    )
