"""Each architecture as a module by its own name, made from the settings of its mixer.

Nothing is listed here by hand: a mixer in ``zoo/`` has its module, with the mixer's settings as
typed arguments and the mixer's documentation as help.
"""

from __future__ import annotations

import inspect
from inspect import Parameter, Signature
from typing import Any

import docstring_parser

from statezoo.lightning_modules.causal_lm import CausalLM
from statezoo.zoo import MIXERS, mixer_settings
from statezoo.zoo.mixer import Mixer

CLASS_NAMES = {"attention": "Transformer"}
"""Names of modules that are not those of their mixers' classes."""


class Hybrid(CausalLM):
    """A stack of different mixers: the list of them repeats over the layers."""


class OneMixer(CausalLM):
    """Base of the modules whose layers all have the same mixer.

    Not for use by itself: ``architecture`` makes the subclasses.
    """

    mixer: str

    def plain_settings(self) -> dict[str, Any]:
        """Return the arguments that build this module again, as plain data.

        Raises:
            ValueError: If the layers differ, as they may where weights came from a file.
        """
        settings = super().plain_settings()
        first, *others = settings.pop("mixers")
        if any(other != first for other in others):
            raise ValueError(
                f"the layers of these weights differ, {type(self).__name__} has one setting for "
                "all: use --model Hybrid."
            )
        first.pop("name")
        return {**settings, **first}


def architecture(name: str) -> type[CausalLM]:
    """Make the module for one mixer.

    Args:
        name: Snake-case name of a registered mixer.

    Returns:
        A subclass of ``CausalLM`` with the mixer's settings among its arguments.

    Raises:
        TypeError: If a setting of the mixer bears the name of an argument that all modules have.
    """
    mixer, common, settings = MIXERS[name], _common(), mixer_settings(name)
    if both := sorted(common.keys() & settings.keys()):
        raise TypeError(
            f"mixer {name!r} must not call a setting {both[0]!r}: all modules have one."
        )
    names = ["d_model", "n_layers", *settings]
    names += [key for key in common if key not in names]
    everything = common | settings
    signature = Signature(
        [
            Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
            *(everything[key].replace(kind=Parameter.KEYWORD_ONLY) for key in names),
        ]
    )

    def __init__(self: OneMixer, **given: Any) -> None:
        bound = signature.bind(self, **given)
        bound.apply_defaults()
        values = {key: value for key, value in bound.arguments.items() if key != "self"}
        own = {key: values.pop(key) for key in settings}
        CausalLM.__init__(self, [{"name": name, **own}], **values)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__annotations__ = {key: everything[key].annotation for key in names}
    class_name = CLASS_NAMES.get(name, mixer.__name__)
    body = {
        "__init__": __init__,
        "__doc__": _docstring(mixer, names),
        "__module__": __name__,
        "__qualname__": class_name,
        "mixer": name,
    }
    return type(class_name, (OneMixer,), body)


def _common() -> dict[str, Parameter]:
    """Arguments that all modules have."""
    arguments = dict(inspect.signature(CausalLM.__init__, eval_str=True).parameters)
    return {key: value for key, value in arguments.items() if key not in ("self", "mixers")}


def _docstring(mixer: type[Mixer], names: list[str]) -> str:
    """Compose the mixer's text and the explanations of all arguments."""
    parsed = docstring_parser.parse(inspect.getdoc(mixer) or "")
    ours = docstring_parser.parse(inspect.getdoc(CausalLM) or "")
    texts = {p.arg_name: p.description or "" for p in [*ours.params, *parsed.params]}
    lines = [parsed.short_description or f"Language model of {mixer.__name__}.", ""]
    if parsed.long_description:
        lines += [parsed.long_description, ""]
    lines += ["Args:", *(f"    {key}: {' '.join(texts.get(key, '').split())}" for key in names)]
    return "\n".join(lines)


ARCHITECTURES: dict[str, type[CausalLM]] = {}
"""The modules by the names of their classes."""

for _name in MIXERS:
    _cls = architecture(_name)
    ARCHITECTURES[_cls.__name__] = globals()[_cls.__name__] = _cls
ARCHITECTURES["Hybrid"] = Hybrid


def __getattr__(name: str) -> type[CausalLM]:
    raise AttributeError(
        f"there is no architecture {name!r}; there are {', '.join(sorted(ARCHITECTURES))}."
    )
