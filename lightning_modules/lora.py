"""Low-rank updates of projections, LoRA, through peft; merging them needs no peft.

Source: Hu et al., LoRA, arXiv:2106.09685v2, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from statezoo.zoo.model import StateZooModel
from statezoo.zoo.routing import EachMemory, Slots

NAME = "default"
"""What peft calls an adapter that is the only one."""


def projections(net: Any, targets: Sequence[str] | None = None) -> dict[str, nn.Linear]:
    """List the linear maps of all mixers and channel mixers, by their names in ``net``.

    Args:
        net: The network.
        targets: Only those whose names end so, such as ``q_proj``; default all.

    Raises:
        ValueError: If no name ends like one of the targets.
    """
    body: StateZooModel = net.model
    found = {}
    for number, block in enumerate(body.layers):
        for part in ("mixer", "mixer_back", "channel"):
            inside = getattr(block, part)
            for name, module in [] if inside is None else inside.named_modules():
                if isinstance(module, nn.Linear):
                    path = f"model.layers.{number}.{part}"
                    found[f"{path}.{name}" if name else path] = module
    if targets is None:
        return found
    for target in targets:
        if not any(_ends(name, target) for name in found):
            known = sorted({name.rpartition(".")[2] for name in found})
            raise ValueError(
                f"adapter.targets: no projection is called {target!r}; there are "
                f"{', '.join(known)}."
            )
    return {name: x for name, x in found.items() if any(_ends(name, t) for t in targets)}


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def import_peft() -> Any:
    """Return peft.

    Raises:
        ModuleNotFoundError: If it is not installed; names the extra.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'tune: lora needs peft: pip install "statezoo[peft]".', name="peft"
        ) from error
    return peft


def add_lora(
    net: Any, rank: int, alpha: float, dropout: float, targets: Sequence[str] | None = None
) -> None:
    """Add to projections of ``net``, in place, an update that is zero; freeze all else.

    Raises:
        ModuleNotFoundError: If peft is not installed.
        ValueError: If there is no such projection.
    """
    peft = import_peft()
    config = peft_config(rank, alpha, dropout, [*projections(net, targets)])
    config._register_custom_module({EachMemory: _each_memory()})
    peft.inject_adapter_in_model(config, net, adapter_name=NAME)


def peft_config(rank: int, alpha: float, dropout: float, targets: list[str]) -> Any:
    """Return the adapter's settings as peft has them."""
    return import_peft().LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets
    )


def _each_memory() -> type[nn.Module]:
    """Return peft's layer for the projections of a mixture of memories."""
    from peft.tuners.lora import Linear

    class LoraEachMemory(Linear):
        """An update of the map of all memories, which each token meets where it is sent."""

        def forward(self, x: Tensor | Slots, *args: Any, **kwargs: Any) -> Tensor:
            hidden = x._replace(x=self._drop(x.x)) if isinstance(x, Slots) else self._drop(x)
            return self._add(self.base_layer, x, hidden)

        def all(self, x: Tensor) -> Tensor:
            base: Any = self.base_layer
            return self._add(base.all, x, self._drop(x))

        def _add(self, project: Any, x: Tensor | Slots, hidden: Tensor | Slots) -> Tensor:
            y: Tensor = project(x)
            if self.merged or self.disable_adapters:
                return y
            update: Tensor = project(hidden, self.get_delta_weight(NAME))
            return y + update.to(y.dtype)

        def _drop(self, x: Tensor) -> Tensor:
            dropout: Any = self.lora_dropout[NAME]
            y: Tensor = dropout(x)
            return y

    return LoraEachMemory


def merge(tensors: Mapping[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
    """Return the weights of a net with its updates added in, under the names of a plain net.

    Args:
        tensors: State dict of a net after :func:`add_lora`.
        alpha: As it was there.
        rank: As it was there.
    """
    merged = {}
    for name, x in tensors.items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            path = name.removesuffix(".base_layer.weight")
            A, B = (tensors[f"{path}.lora_{side}.{NAME}.weight"] for side in "AB")
            x = (x.double() + alpha / rank * (B.double() @ A.double())).to(x.dtype)
        merged[name.replace(".base_layer.", ".")] = x
    return merged
