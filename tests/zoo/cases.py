"""Tiny models of every mixer, of some hybrids, and of every shipped configuration."""

from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from statezoo.zoo import MIXERS, StateZooConfig, StateZooForCausalLM, mixer_settings
from statezoo.zoo.mixer import resolve_mixer

WORDS, WIDTH = 11, 16
SMALL = {  # sizes that keep a test quick, for whichever mixer has such a setting
    "n_heads": 2,
    "head_dim": 8,
    "d_state": 4,
    "gate_rank": 3,
    "chunk": 4,
}
MORE = {  # settings beside the defaults
    "gla-grouped": [{"name": "gla", "n_heads": 4, "n_kv_heads": 2, "expand_k": 1.0}],
    "gla-conv": [{"name": "gla", "n_heads": 2, "d_conv": 4}],
    "linear_attention-sum": [{"name": "linear_attention", "normalize": True}],
    "hgrn2-free": [{"name": "hgrn2", "lower_bound": 0.0}],
    "deltanet-gated": [{"name": "deltanet", "use_gate": True, "d_conv": 0}],
    "gated_deltanet-grouped": [
        {"name": "gated_deltanet", "n_v_heads": 4, "negative_eigenvalues": True}
    ],
    "deltaproduct-gated": [
        {"name": "deltaproduct", "n_v_heads": 4, "n_householder": 3, "use_forget_gate": True}
    ],
    "kda-bounded": [{"name": "kda", "gate_floor": -5.0, "expand_v": 1.5, "d_conv": 2}],
    "attention-window": [{"name": "attention", "n_heads": 2, "window": 3}],
    "attention-sinks": [
        {"name": "attention", "n_heads": 4, "n_kv_heads": 2, "window": 2, "sinks": 2}
    ],
    "attention-nope": [{"name": "attention", "rope_base": None, "qkv_bias": True, "qk_norm": True}],
    "mamba-negative": [{"name": "mamba", "negative_eigenvalues": True, "d_conv": 2}],
    "mamba2-groups": [{"name": "mamba2", "n_groups": 2, "dt_limit": [0.01, 0.5], "bias": True}],
    "liger-grouped": [{"name": "liger", "n_heads": 4, "n_kv_heads": 2, "window": 3}],
    "liger-deltanet": [
        {
            "name": "liger",
            "recurrence": "gated_deltanet",
            "n_kv_heads": 1,
            "window": 3,
            "qk_norm": True,
        }
    ],
    "liger-mamba2": [{"name": "liger", "recurrence": "mamba2", "window": 2, "head_dim": 6}],
    "liger-recurrence": [{"name": "liger", "arm": "recurrence"}],
    "liger-window": [
        {"name": "liger", "arm": "window", "window": 2, "rope_scaling": {"factor": 2.0}}
    ],
    "mom-gla": [{"name": "mom", "inner": "gla", "inner_settings": {"d_conv": 3}}],
    "mom-mamba2": [{"name": "mom", "inner": "mamba2", "shared_memory": False}],
    "mom-deltaproduct": [{"name": "mom", "inner": "deltaproduct", "n_memories": 3, "top_k": 3}],
    "mom-retnet": [{"name": "mom", "inner": "retnet", "single_kv": True, "n_memories": 3}],
    "ngram_heads-one": [{"name": "ngram_heads", "orders": [1]}],
    "ngram_heads-window": [{"name": "ngram_heads", "orders": [2, 1], "window": 6}],
    "hybrid": ["gla", {"name": "attention", "n_heads": 2}],
    "hybrid-window": [{"name": "attention", "window": 3}, {"name": "gla", "d_conv": 2}],
    "hybrid-mom": ["mom", {"name": "attention", "window": 2, "sinks": 1}],
    "hybrid-ngrams": ["gated_deltanet", {"name": "ngram_heads", "orders": [1, 3]}],
}
CONFIGS = Path(__file__).parents[2] / "configs"


def small(entry):
    """A mixer with sizes for tests, otherwise as it is."""
    entry = {"name": entry} if isinstance(entry, str) else dict(entry)
    settings = mixer_settings(entry["name"])
    if "inner" in settings:
        inner = small(entry.get("inner", settings["inner"].default))
        entry["inner_settings"] = entry.get("inner_settings", {}) | inner
        del entry["inner_settings"]["name"]
    return {key: size for key, size in SMALL.items() if key in settings} | entry


def inner_of(entry):
    """The inner mixer of an entry, with sizes for tests."""
    return {k: v for k, v in small(entry).items() if k in ("inner", "inner_settings")}


def window_of(entry):
    """A window short enough to matter, where an entry has one."""
    return {"window": 3} if entry.get("window") else {}


def keeps_its_past(entry):
    """Whether the state of a mixer grows with every token."""
    return entry["name"] in ("attention", "ngram_heads") and entry["window"] is None


def has_memory(entry):
    """Whether a mixer's state is more than a copy of its past."""
    return entry["name"] not in ("attention", "ngram_heads")


def shipped():
    """The mixers of every configuration in configs/ that describes a model."""
    by_class = {mixer.__name__: name for name, mixer in MIXERS.items()} | {
        "Transformer": "attention"
    }
    found = {}
    for file in sorted(CONFIGS.rglob("*.yaml")):
        model = (yaml.safe_load(file.read_text()) or {}).get("model")
        if not isinstance(model, dict) or "class_path" not in model:
            continue
        name, given = model["class_path"].rpartition(".")[2], dict(model.get("init_args", {}))
        entries = given.get("mixers", [])
        if name in by_class:
            own = mixer_settings(by_class[name])
            entries = [{"name": by_class[name]} | {k: v for k, v in given.items() if k in own}]
        entries = [{"name": e} if isinstance(e, str) else dict(e) for e in entries]
        found[file.stem] = [e | small(e["name"]) | inner_of(e) | window_of(e) for e in entries]
    return found


def cases():
    """Mixers of each tiny model, by name; each pattern once, and no mixer twice in a row.

    A pattern ends where only pairs of neighbours follow that it has had.
    """
    own = {n: [n] for n, m in MIXERS.items() if m.__module__.startswith("statezoo.zoo.")}
    every = {**own, **MORE, **{f"configs/{n}": e for n, e in shipped().items() if e}}
    found = {}
    for name, entries in every.items():
        pattern = [resolve_mixer(small(entry)) for entry in entries]
        pattern = [e for i, e in enumerate(pattern) if i == 0 or e != pattern[i - 1]]
        pairs = list(pairwise(pattern))
        new = [i for i, pair in enumerate(pairs) if pair not in pairs[:i]]
        pattern = pattern[: max(new, default=-1) + 2]
        if pattern not in found.values():
            found[name] = pattern
    return found


def kinds():
    """One case of every mixer, and of every short pattern of several."""
    found = {}
    for case, entries in CASES.items():
        if len(entries) <= 4:
            found.setdefault(tuple(entry["name"] for entry in entries), case)
    return [*found.values()]


CASES = cases()
KINDS = kinds()
EACH = [case if case in KINDS else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def make(case, dtype=torch.float64, n_layers=2, seed=0, kind=StateZooForCausalLM, **settings):
    """A tiny model whose parameters are all away from zero, in evaluation mode."""
    torch.manual_seed(seed)
    mixers = CASES[case]
    config = StateZooConfig(
        vocab_size=WORDS,
        d_model=WIDTH,
        n_layers=max(n_layers, len(mixers)),
        mixers=mixers,
        **settings,
    )
    net = kind(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return net


def tokens(B, T, seed=0):
    """Random tokens."""
    return torch.randint(WORDS, (B, T), generator=torch.Generator().manual_seed(seed))


@contextmanager
def reading(net, x):
    """Let a net of which the input is ``x [B T D]`` be called on tokens; yields such tokens.

    They come in turns, so that a token is there again after the next: n-gram heads look at more.
    """
    hook = net.get_input_embeddings().register_forward_hook(lambda *_: x)
    try:
        yield torch.arange(x.shape[1]).expand(x.shape[:2]) % 2
    finally:
        hook.remove()
