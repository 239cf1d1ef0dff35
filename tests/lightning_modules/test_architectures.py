"""Every mixer has its module, with the mixer's settings and their texts."""

import inspect

import docstring_parser
import pytest

from statezoo.lightning_modules import ARCHITECTURES, architecture, architectures
from statezoo.lightning_modules.architectures import CLASS_NAMES
from statezoo.zoo import MIXERS, mixer_settings

SHIPPED = sorted(n for n, mixer in MIXERS.items() if mixer.__module__.startswith("statezoo."))


@pytest.mark.parametrize("name", SHIPPED)
def test_module_has_the_settings_of_its_mixer(name):
    cls = ARCHITECTURES[CLASS_NAMES.get(name, MIXERS[name].__name__)]
    assert getattr(architectures, cls.__name__) is cls
    parameters = inspect.signature(cls).parameters
    texts = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__).params}
    for key, setting in mixer_settings(name).items():
        assert parameters[key].default == setting.default
        assert parameters[key].annotation == setting.annotation
    assert all(texts[key] for key in parameters)
    assert {"d_model", "n_layers", "vocab_size", "optim", "pretrained"} <= parameters.keys()


def test_unknown_names_and_arguments_are_told():
    with pytest.raises(AttributeError, match=r"no architecture 'GLAA'; there are .*GLA"):
        _ = architectures.GLAA
    with pytest.raises(TypeError, match="d_modle"):
        architectures.GLA(d_modle=3)
    with pytest.raises(KeyError):
        architecture("nope")
