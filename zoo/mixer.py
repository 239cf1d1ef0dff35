"""The contract of a mixer: the part of a block that moves content along time."""

import inspect
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statezoo.zoo.settings import build, lookup, resolve, settings_of

State = tuple[Any, ...] | None
MIXERS: dict[str, type["Mixer"]] = {}


class Mixer(nn.Module):
    """Mixes tokens along time and hands a state on.

    A subclass is known by the name of its file (``zoo/gated_deltanet.py`` is ``"gated_deltanet"``).
    Its constructor takes ``d_model`` and, by keyword, its settings: typed, with defaults, described
    under ``Args:`` of the class. That list is the whole configuration, on every surface.

    Args:
        d_model: Width of the stream.

    Attributes:
        name: Name in configurations.
        layer: Which block of the model this is in, from 0; for :meth:`reset_parameters`.
        reads: Projections of the stream that :meth:`recur` only reads with.
        writes: Those that it writes with, as far as a mixer has them. A mixer of matrix states
            names both, and has ``recur`` and ``read_out`` instead of ``forward``; no other access
            to the stream than by these projections then makes its memory fit to be one of several.
        read_width: Leading outputs of a writing projection that are for ``read_out`` alone.
        observable: Whether it mixes by a recurrence or attention of ``kernels/``, so that
            ``zoo/observe.py`` sees what it does.
        reads_ids: Whether ``forward`` takes the tokens themselves too, as its fourth argument.
        learnable: Parts of the state that may be learnt for the time before the first token.
        auxiliary: What the last forward pass in training mode had to say beside its output, in
            scalars or vectors to be logged; ``"loss"`` is added to the training loss.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    read_width: int = 0
    observable: ClassVar[bool] = True
    reads_ids: ClassVar[bool] = False
    learnable: tuple[str, ...] = ("S", "conv")
    layer: int = 0
    auxiliary: dict[str, Tensor] | None = None

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Register the class under ``name``, by default that of its file."""
        super().__init_subclass__(**kwargs)
        module = cls.__module__.rpartition(".")[2]
        if module == "__main__":
            module = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        cls.name = name or module
        known = MIXERS.get(cls.name)
        if known is not None and (known.__module__, known.__name__) != (
            cls.__module__,
            cls.__name__,
        ):
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} would be mixer {cls.name!r}, which "
                f"{known.__module__}.{known.__name__} is: one Mixer a file, or name it, "
                f"class {cls.__name__}(Mixer, name='...')."
            )
        MIXERS[cls.name] = cls

    def forward(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Mix ``x [B T D]`` along time, continuing from ``state``.

        Args:
            x: The stream after its norm.
            state: What an earlier call returned; ``None`` at the start of the sequences, as may be
                any part of it then.
            cu_seqlens: Bounds ``[N+1]`` of sequences packed along ``T``; then ``B = 1``.

        Returns:
            The update of the stream, and the state: a named tuple of tensors whose first axis is
            the sequence (``B``, or ``N`` if packed), never written in place.
        """
        o, state = self.recur(x, state, cu_seqlens)
        return self.read_out(o, x), state

    def mix(
        self, x: Tensor, state: State, cu_seqlens: Tensor | None, ids: Tensor | None
    ) -> tuple[Tensor, State]:
        """Call this mixer, with the tokens ``ids [B T]`` if it reads them; ``None`` if unknown."""
        more = (ids,) if self.reads_ids else ()
        made: tuple[Tensor, State] = self(x, state, cu_seqlens, *more)
        return made

    def recur(
        self, x: Tensor, state: State = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Write and read the memory of every head; arguments as those of :meth:`forward`.

        Returns:
            What was read, ``[B T H V]``, before any norm, and the state.
        """
        raise NotImplementedError

    def read_out(self, o: Tensor, x: Tensor) -> Tensor:
        """Turn what :meth:`recur` read, ``[B T H V]``, into the update of the stream ``x``."""
        raise NotImplementedError

    @classmethod
    def complete(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Check resolved settings further, and write out what they contain, before any is used."""
        return settings

    def initial_state(self, n: int, like: Tensor) -> State:
        """Return the state of ``n`` sequences before their first token; ``None`` means zeros."""
        return None

    def state_size(self, T: int) -> int:
        """Return the bytes of state that one sequence needs after ``T`` tokens."""
        raise NotImplementedError

    def reset_parameters(self, n_layers: int) -> None:
        """Set initial values that depend on depth, after the model's general initialisation.

        Called once for a fresh model and never for loaded tensors. Values set in the constructor
        stay: those of the mixer's own parameters anyway, those of a Linear with ``init.keep``.
        """


def mixer_settings(name: str) -> dict[str, inspect.Parameter]:
    """List the settings of a mixer: name, real type and default of each.

    Raises:
        ValueError: If there is no such mixer.
    """
    return settings_of(lookup(MIXERS, name, "mixer"))


def resolve_mixer(entry: Any) -> dict[str, Any]:
    """Write out all settings of a mixer given by name or by name and some settings."""
    resolved = resolve(MIXERS, entry, "mixer")
    return MIXERS[resolved["name"]].complete(resolved)


def build_mixer(entry: Any, d_model: int) -> Mixer:
    """Make a mixer given by name or by name and some settings."""
    mixer: Mixer = build(MIXERS, resolve_mixer(entry), d_model, "mixer")
    return mixer


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply ``function`` to every tensor of a state, keeping its structure."""
    if state is None or isinstance(state, Tensor):
        return state if state is None else function(state)
    parts = [map_state(function, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def name_tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Flatten a state into tensors by dotted name."""
    if state is None:
        return {}
    if isinstance(state, Tensor):
        return {prefix: state}
    names = getattr(state, "_fields", range(len(state)))
    flat: dict[str, Tensor] = {}
    for name, part in zip(names, state, strict=True):
        flat |= name_tensors(part, f"{prefix}.{name}" if prefix else str(name))
    return flat


def state_bytes(*shape: int, dtype: torch.dtype) -> int:
    """Count the bytes of one tensor of a state."""
    n = dtype.itemsize
    for size in shape:
        n *= size
    return n
