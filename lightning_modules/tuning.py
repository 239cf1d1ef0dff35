"""What of a pretrained network a run trains: all of it, its head, LoRA, or its initial states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from statezoo.lightning_modules.lora import add_lora, merge, projections
from statezoo.zoo.initial_state import InitialState, learnt_state
from statezoo.zoo.model import StateZooPreTrainedModel
from statezoo.zoo.tasks import with_head

Tune = Literal["full", "head", "lora", "state"]

SHARE = {"lora": 0.05, "state": 0.01}
"""Part of the network's bytes below which an adapter of default rank stays, if any rank does."""
RANKS = {"lora": (16, 8, 4, 2, 1), "state": (4, 2, 1)}
ENTRY = 128
"""Bytes that name and shape of a tensor take in a file."""


@dataclass
class Adapter:
    """What is added to a pretrained network where not all of it is trained.

    LoRA learns well at rates up to twice those for all weights, initial states at about ten times
    those: ``--model.optim.lr 0.03``.

    Args:
        rank: Width of LoRA's update of each projection, by default the highest of 16, 8, 4, 2 and
            1 whose file is below 5 % of the network's bytes, else 1. Or, for ``tune: state``, outer
            products in the initial memory of each head, 0 for whole memories; by default the
            highest of 4, 2 and 1 below 1 %, else 1.
        alpha: LoRA's updates count ``alpha / rank`` times; default is twice the rank.
        dropout: Part of the projections' inputs that training hides from LoRA.
        targets: Names of the projections that LoRA updates, such as ``[q_proj, v_proj]``; default
            all of mixers and channel mixers.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"adapter.rank must be at least 0, got {self.rank}.")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"adapter.alpha must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout must lie in [0, 1), got {self.dropout}.")

    @classmethod
    def of(cls, settings: Adapter | Mapping[str, Any] | None) -> Adapter:
        """Return settings of one's own, from an ``Adapter``, a mapping of some fields or none.

        Raises:
            ValueError: If a key is no setting, with the nearest one.
        """
        given = asdict(settings) if isinstance(settings, Adapter) else dict(settings or {})
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                raise ValueError(f"adapter has no setting {key!r}: {hint}")
        return cls(**given)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, as checkpoints keep them."""
        return asdict(self)

    def check(self, tune: str) -> None:
        """Raise where a setting has no meaning for this choice.

        Raises:
            ValueError: If the choice is unknown, or has no such setting.
        """
        if tune not in get_args(Tune):
            near = get_close_matches(str(tune), get_args(Tune), 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"tune must be full, head, lora or state, got {tune!r}{hint}.")
        if tune == "lora" and self.rank == 0:
            raise ValueError("adapter.rank must be at least 1 for tune: lora, got 0.")
        given = {
            "rank": self.rank is not None and tune not in SHARE,
            "alpha": self.alpha is not None and tune != "lora",
            "dropout": self.dropout > 0 and tune != "lora",
            "targets": self.targets is not None and tune != "lora",
        }
        if wrong := [key for key, unused in given.items() if unused]:
            raise ValueError(
                f"adapter.{wrong[0]} has no meaning for tune: {tune}: leave it out, or choose "
                f"--model.tune lora{' or state' if wrong == ['rank'] else ''}."
            )


ADAPTER = Adapter()


def tuned(net: Any, tune: Tune, adapter: Adapter) -> tuple[Any, Adapter]:
    """Make what is chosen of a network trainable, and freeze all else.

    ``head`` gives a head that shares its weight with the embedding one of its own; ``lora`` and
    ``state`` add parameters, which change nothing as they begin, and train the head of a
    classifier with them.

    Args:
        net: A causal or masked language model, or a classifier; changed in place.
        tune: What to train.
        adapter: Settings of what is added.

    Returns:
        The network, and the settings with all defaults written out.

    Raises:
        ValueError: If a setting has no meaning, or there is nothing to train.
        ModuleNotFoundError: If ``lora`` is asked for and peft is not installed.
    """
    adapter.check(tune)
    if tune == "full":
        return net, adapter
    total = sum(p.numel() for p in net.parameters())
    told = ""
    if tune == "head":
        net, told = own_head(net)
        net.requires_grad_(False)
    elif tune == "lora":
        rank = adapter.rank or default_rank(net, tune, adapter.targets)
        adapter = replace(adapter, rank=rank, alpha=adapter.alpha or 2.0 * rank)
        add_lora(net, rank, adapter.alpha or 0.0, adapter.dropout, adapter.targets)
        told = f" of rank {rank}"
    else:
        adapter = replace(adapter, rank=_state_rank(net, adapter.rank))
        learn_initial_states(net, adapter.rank or 0)
        net.requires_grad_(False)
        for part in _initial_states(net):
            part.requires_grad_(True)
        told = f" of rank {adapter.rank}" if adapter.rank else ", whole"
    if tune == "head" or hasattr(net, "score"):
        head_of(net).requires_grad_(True)
    n = sum(p.numel() for p in net.parameters() if p.requires_grad)
    rank_zero_info(f"tune: {tune}{told} trains {n:,} parameters; the base has {total:,}, "
                   f"so {100 * n / total:.2g} %")  # fmt: skip
    return net, adapter


def head_of(net: Any) -> nn.Linear:
    """Return the head of a network."""
    head: nn.Linear = net.score if hasattr(net, "score") else net.lm_head
    return head


def own_head(net: StateZooPreTrainedModel) -> tuple[StateZooPreTrainedModel, str]:
    """Give the head a weight of its own, equal to the embedding, where it shares that one's."""
    if hasattr(net, "score") or not net.config.tie_embeddings:
        return net, ""
    net, _ = with_head(net, type(net), tie_embeddings=False)
    return net, ", from now on apart from the embedding,"


def default_rank(net: Any, tune: str, targets: list[str] | None = None) -> int:
    """Return the highest rank whose adapter is small enough, else the lowest."""
    base = sum(p.numel() * p.element_size() for p in net.parameters())
    for rank in RANKS[tune]:
        sizes = lora_sizes(net, rank, targets) if tune == "lora" else state_sizes(net, rank)
        if sum(4 * n + ENTRY for n in sizes) < SHARE[tune] * base:
            return rank
    return RANKS[tune][-1]


def lora_sizes(net: Any, rank: int, targets: list[str] | None = None) -> list[int]:
    """List the numbers of parameters of the tensors that LoRA adds."""
    shapes = (module.weight.shape for module in projections(net, targets).values())
    return [rank * width for shape in shapes for width in shape]


def state_sizes(net: Any, rank: int) -> list[int]:
    """List the numbers of parameters of the tensors of learnt initial states."""
    config = net.config
    ways = 1 if config.tie_directions else 2
    with torch.device("meta"):
        states = [learnt_state(mixer, config.d_model, rank) for mixer in config.layer_mixers]
    return [p.numel() for part in states if part is not None for p in part.parameters()] * ways


def _state_rank(net: Any, rank: int | None) -> int:
    """Return the rank of initial states: what is asked for, what is there, or the default."""
    has: int | None = net.config.initial_states
    if has is not None and rank not in (None, has):
        raise ValueError(
            f"these weights have initial states of rank {has}, adapter.rank is {rank}: leave it "
            "out, or start from weights without."
        )
    if not state_sizes(net, 0):
        raise ValueError(
            "tune: state needs mixers with a recurrent state, this network has only "
            f"{', '.join(sorted({m['name'] for m in net.config.layer_mixers}))}: choose lora."
        )
    if has is not None or rank is not None:
        return has if rank is None else rank  # type: ignore[return-value]
    return default_rank(net, "state")


def learn_initial_states(net: Any, rank: int) -> None:
    """Give every mixer of a network that has none an initial state to be learnt, in place.

    Args:
        net: The network.
        rank: Outer products per head, 0 for whole memories.
    """
    if net.config.initial_states is not None:
        return
    net.config.initial_states = rank
    for block, mixer in zip(net.model.layers, net.config.layer_mixers, strict=True):
        block.initial_state = learnt_state(mixer, net.config.d_model, rank)
        if block.mixer_back is not None:
            block.initial_state_back = learnt_state(mixer, net.config.d_model, rank)
    for part in _initial_states(net):
        part.to(net.device)


def _initial_states(net: Any) -> list[InitialState]:
    return [part for part in net.modules() if isinstance(part, InitialState)]


def plain_network(net: Any, tune: Tune, adapter: Adapter) -> Any:
    """Return a network that can be saved: ``net`` itself, or a copy with LoRA merged into it."""
    if tune != "lora":
        return net
    plain = type(net)(net.config)
    plain.load_state_dict(merge(net.state_dict(), adapter.alpha or 0.0, adapter.rank or 1))
    return plain.to(net.device)
