"""flash-linear-attention's naive functions as a second opinion, where `fla` can be imported.

It is no dependency, not even of development: installed, it makes transformers dispatch to kernels
that need a GPU. To run this: `pip install --no-deps --target DIR flash-linear-attention fla-core
einops`, then `PYTHONPATH=DIR pytest tests/kernels/test_fla_opinion.py`.
"""

import warnings
from importlib import import_module

import pytest
import torch
from tests.kernels.harness import CASES

CASE = {case.name: case for case in CASES}
OPINIONS = {  # case: module and function
    "additive-head_gate-1": ("simple_gla", "naive_chunk_simple_gla"),
    "additive-channel_gate-1": ("gla", "naive_recurrent_gla"),
    "delta-head_gate-1": ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
    "delta-channel_gate-1": ("kda", "naive_recurrent_kda"),
    "delta3-head_gate": ("gated_delta_product", "naive_recurrent_gated_delta_product"),
}


@pytest.fixture(autouse=True)
def _as_they_come():
    torch.use_deterministic_algorithms(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", OPINIONS)
def test_fla_computes_the_same(name):
    module, function = OPINIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fla")
        naive = getattr(import_module(f"fla.ops.{module}.naive"), function)
    torch.manual_seed(0)
    inputs = CASE[name].make(2, 70, torch.float32)
    o, S = CASE[name].op(**inputs)
    options = {"output_final_state": True}
    if module == "gla":
        inputs["gk"] = inputs.pop("g")
    if module == "gated_delta_product":
        inputs |= {n: inputs[n].flatten(1, 2) for n in ("k", "v", "beta")}
        options |= {"num_householder": 3, "scale": inputs["q"].shape[-1] ** -0.5}
    want, state = naive(**inputs, **options)
    # both in float32, sums of 70 steps in different orders
    torch.testing.assert_close(o, want, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(S, state, rtol=1e-4, atol=2e-5)
