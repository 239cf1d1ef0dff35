"""The suites of probes, in a quick size and as published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from statezoo.probe.base import Probe, Settings, Suite

__all__ = ["SUITES"]

NO_CONV: Settings = {
    "any": {"d_conv": 0, "n_heads": 4},
    "mamba": {"d_conv": 1},
    "mamba2": {"d_conv": 1, "head_dim": 16, "d_state": 32},
    "mamba3": {"head_dim": 16, "d_state": 32},
    "gated_deltanet": {"use_gate": False, "expand_v": 1.0, "head_dim": 8},
    "deltaproduct": {"head_dim": 16, "expand_v": 1.0},
}
"""No short convolution, which would be a second layer of a kind; Mamba's is at least one tap."""

WORDS = Probe(
    task={"name": "group_words", "min_length": 24, "max_length": 24},
    lengths=(24, 64, 128),
    measure="sequences",
    mixers=NO_CONV,
    channel=None,
    steps=400,
    lr=(1e-2,),
)

SHORT_WORDS = replace(
    WORDS,
    task={"name": "group_words", "min_length": 8, "max_length": 8},
    lengths=(8, 16, 24),
    mixers={**NO_CONV, "any": {"d_conv": 0, "n_heads": 8}},
    steps=1000,
    batch_size=128,
    lr=(5e-3,),
    d_model=(64,),
    usual=False,
)
"""Large groups are learnt slowly: from short words, read a little beyond."""

AS_PUBLISHED: Settings = {
    "any": {"d_conv": 0, "n_heads": 8, "use_gate": False},
    "mamba": {"d_conv": 1},
    "mamba2": {"d_conv": 1},
    "deltaproduct": {"head_dim": 32, "expand_v": 1.0},
}

PUBLISHED_WORDS = Probe(
    task={"name": "group_words", "min_length": 128, "max_length": 128},
    lengths=(128, 256, 512),
    measure="sequences",
    mixers=AS_PUBLISHED,
    d_model=(128,),
    steps=97_700,
    batch_size=2048,
    train_examples=2_000_000,
    lr=(1e-3,),
    weight_decay=1e-6,
    warmup_steps=1000,
    examples=1000,
    precision="bf16-mixed",
)

PUBLISHED_PARITY = Probe(
    task={"name": "parity"},
    lengths=(40, 64, 128, 256),
    d_model=(128,),
    n_layers=2,
    steps=20_000,
    batch_size=256,
    lr=(1e-3,),
    warmup_steps=2000,
    examples=1000,
    precision="bf16-mixed",
)

PUBLISHED_ARITHMETIC = replace(
    PUBLISHED_PARITY,
    task={"name": "modular_arithmetic"},
    steps=100_000,
    warmup_steps=10_000,
    weight_decay=0.1,
)

QUICK_PARITY = Probe(
    task={"name": "parity", "max_length": 12},
    lengths=(12, 20, 64, 128),
    mixers=NO_CONV,
    steps=400,
    lr=(1e-2,),
    usual=False,
)

STATE_TRACKING = Suite(
    about="the state of a finite machine, kept for longer than in training",
    models=(
        "transformer,gla,mamba,mamba:negative_eigenvalues=true,mamba2,deltanet,"
        "deltanet:negative_eigenvalues=true,gated_deltanet,deltaproduct"
    ),
    quick={
        "parity": QUICK_PARITY,
        "modular_arithmetic": replace(
            QUICK_PARITY, task={"name": "modular_arithmetic", "max_length": 9}, lengths=(9, 19, 39)
        ),
        "modular_brackets": replace(
            QUICK_PARITY, task={"name": "modular_brackets", "max_length": 9}, lengths=(9, 19, 39)
        ),
        "Z2": WORDS.on({"group": "Z2"}),
        "Z3": WORDS.on({"group": "Z3"}, usual=False),
        "S3": WORDS.on({"group": "S3"}),
        "S4": SHORT_WORDS.on({"group": "S4"}),
        "A5": SHORT_WORDS.on({"group": "A5"}, d_model=(128,)),
        "S5": SHORT_WORDS.on({"group": "S5"}, d_model=(128,)),
    },
    paper={
        "parity": PUBLISHED_PARITY,
        "modular_arithmetic": PUBLISHED_ARITHMETIC,
        "modular_brackets": replace(PUBLISHED_ARITHMETIC, task={"name": "modular_brackets"}),
        **{group: PUBLISHED_WORDS.on({"group": group}) for group in ("Z2", "S3", "S4", "A5", "S5")},
        "S5_transpositions": PUBLISHED_WORDS.on({"group": "S5", "elements": "transpositions"}),
    },
)

ONE_HEAD: Settings = {
    "any": {"n_heads": 1},
    "based": {"feature_dim": 8},
    "deltaproduct": {"expand_v": 1.0},
    "gated_deltanet": {"expand_v": 1.0},
    "mamba2": {"head_dim": 32, "d_state": 32},
    "mamba3": {"head_dim": 32, "d_state": 32},
    "mom": {"inner_settings": {"n_heads": 1, "expand_v": 1.0}},
}

PAIRS = Probe(
    task={"name": "mqar", "n_symbols": 128, "random_filler": False},
    lengths=(64,),
    mixers=ONE_HEAD,
    d_model=(16, 48),
    n_layers=2,
    channel=None,
    steps=1000,
    lr=(5e-3,),
)


def _pairs(base: Probe, length: int, n_pairs: int, **changes: Any) -> Probe:
    shape = {"min_length": length, "max_length": length, "n_pairs": n_pairs}
    return base.on(shape, lengths=(length,), **changes)


PUBLISHED_PAIRS = Probe(
    task={"name": "mqar", "random_filler": False},
    lengths=(64,),
    mixers={"any": {"n_heads": 1}},
    d_model=(64, 128, 256, 512),
    n_layers=2,
    channel=None,
    steps=100_000,
    batch_size=64,
    train_examples=100_000,
    lr=(1e-4, 4.6e-4, 2.2e-3, 1e-2),
    weight_decay=0.1,
    examples=3000,
)

RECALL = Suite(
    about="values of keys that were read before; many pairs need a large or well used state",
    models=(
        "transformer,hybrid,deltanet,gated_deltanet,deltaproduct,mamba,mamba2,gla,base_conv+based"
    ),
    quick={
        "mqar_8": _pairs(PAIRS, 64, 8),
        "mqar_16": _pairs(PAIRS, 64, 16, steps=3000, usual=False),
        "mqar_8_of_8192": _pairs(
            replace(PAIRS, task=PUBLISHED_PAIRS.task, d_model=(64,), lr=(1e-2,), usual=False),
            64,
            8,
        ),
        "induction_heads": replace(
            PAIRS, task={"name": "induction_heads"}, lengths=(30, 64, 256), usual=False
        ),
    },
    paper={
        "mqar_4": _pairs(PUBLISHED_PAIRS, 64, 4),
        "mqar_8": _pairs(PUBLISHED_PAIRS, 128, 8),
        "mqar_16": _pairs(PUBLISHED_PAIRS, 256, 16),
        "mqar_64": _pairs(PUBLISHED_PAIRS, 512, 64),
        "mqar_b": replace(
            PUBLISHED_PAIRS,
            task={"name": "mqar_b"},
            lengths=(64, 128, 256, 512, 1024),
            steps=22_500,
            batch_size=256,
            train_examples=180_000,
            lr=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
            examples=1000,
        ),
        "induction_heads": replace(
            PUBLISHED_PAIRS,
            task={"name": "induction_heads", "min_length": 256, "max_length": 256},
            lengths=(256, 1024, 4096, 16384),
            d_model=(64,),
            steps=200_000,
            batch_size=8,
            train_examples=None,
            lr=(1e-3,),
            weight_decay=0.0,
            examples=200,
        ),
    },
    frontier=True,
)

TWO_HEADS: Settings = {
    "any": {"n_heads": 2},
    "mamba2": {"head_dim": 32, "d_state": 32},
    "gated_deltanet": {"expand_v": 1.0},
}

LANGUAGES = Probe(
    task={"name": "icll", "min_length": 10, "max_length": 10, "max_string": 12},
    lengths=(10, 20),
    measure="legal",
    mixers=TWO_HEADS,
    d_model=(48,),
    n_layers=2,
    steps=500,
    batch_size=32,
)

IN_CONTEXT = Suite(
    about="the language of a random automaton, learnt from the strings before",
    models="transformer,gla,retnet,mamba,gated_deltanet,gated_deltanet+ngram_heads+gated_deltanet",
    quick={"icll": LANGUAGES},
    paper={
        "icll": replace(
            LANGUAGES,
            task={"name": "icll"},
            d_model=(256,),
            n_layers=4,
            mixers={"any": {"n_heads": 4}},
            steps=31_250,
            train_examples=5000,
            lr=(2.5e-4, 5e-4),
            weight_decay=0.1,
            examples=500,
        )
    },
)

PASSKEY = Probe(
    task={"name": "passkey", "min_length": 32, "max_length": 32, "n_symbols": 16, "n_key": 3},
    lengths=(32, 64, 256, 1024),
    mixers=TWO_HEADS,
    d_model=(48,),
    n_layers=2,
    steps=600,
    examples=100,
)

PUBLISHED_NEEDLE = replace(
    PASSKEY,
    task={"name": "needle"},
    lengths=(128, 256, 512, 1024),
    mixers={"any": {"n_heads": 4}},
    d_model=(256,),
    n_layers=4,
    steps=20_000,
    batch_size=32,
    lr=(1e-3,),
)

NEEDLE = replace(
    PASSKEY,
    task={"name": "needle", "min_length": 32, "max_length": 32, "n_symbols": 128},
    lengths=(32, 64),
    usual=False,
)

LONG_CONTEXT = Suite(
    about="facts among noise, found again much further back than in training",
    models="transformer,hybrid,gla,mamba2,deltanet,gated_deltanet",
    quick={
        "passkey": PASSKEY,
        "needle_single": NEEDLE,
        "needle_forward": NEEDLE.on({"kind": "forward", "n_needles": 3}),
        "selective_copying": replace(
            PASSKEY,
            task={
                "name": "selective_copying", "min_length": 64, "max_length": 64, "n_data": 8,
                "n_symbols": 8,
            },
            lengths=(64, 128, 256),
            usual=False,
        ),
    },
    paper={
        "passkey": replace(PUBLISHED_NEEDLE, task={"name": "passkey"}),
        **{
            f"needle_{kind}": replace(
                PUBLISHED_NEEDLE, task={"name": "needle", "kind": kind, "n_needles": count}
            )
            for kind, count in {
                "single": 1, "multi": 4, "conditional": 4, "forward": 4, "backward": 4,
            }.items()
        },
        "selective_copying": replace(
            PUBLISHED_NEEDLE,
            task={"name": "selective_copying"},
            lengths=(4096,),
            d_model=(64,),
            n_layers=2,
            steps=400_000,
            batch_size=64,
            lr=(1e-4,),
        ),
    },
)  # fmt: skip

SUCCESSOR = Probe(
    task={"name": "binary_successor", "max_length": 8},
    lengths=(8, 16, 32),
    measure="sequences",
    mixers=TWO_HEADS,
    d_model=(48,),
    n_layers=2,
    steps=400,
)

PUBLISHED_SUCCESSOR = replace(
    SUCCESSOR,
    task={"name": "binary_successor"},
    lengths=(16, 32, 64),
    d_model=(128,),
    n_layers=4,
    mixers={"any": {"n_heads": 4}},
    steps=50_000,
    lr=(5e-4,),
    examples=1000,
)

PERMUTATION = replace(
    SUCCESSOR,
    task={"name": "inverse_permutation", "max_length": 6, "max_places": 16},
    lengths=(6, 8),
    usual=False,
)

ALGORITHMIC = Suite(
    about="answers that an exact algorithm gives, written token by token",
    models="transformer,hybrid,gla,mamba2,gated_deltanet,deltaproduct",
    quick={
        "binary_successor": SUCCESSOR,
        "tree_traversal": replace(
            SUCCESSOR, task={"name": "tree_traversal", "max_length": 5}, lengths=(5, 8)
        ),
        "inverse_permutation": PERMUTATION,
        "inverse_permutation_bare": PERMUTATION.on({"scratch": False}),
        "multiplication": replace(
            SUCCESSOR,
            task={"name": "multiplication", "min_length": 2, "max_length": 2},
            lengths=(2, 3),
            usual=False,
        ),
    },
    paper={
        "binary_successor": PUBLISHED_SUCCESSOR,
        "tree_traversal": replace(
            PUBLISHED_SUCCESSOR, task={"name": "tree_traversal"}, lengths=(12, 24, 48)
        ),
        "inverse_permutation": replace(
            PUBLISHED_SUCCESSOR, task={"name": "inverse_permutation"}, lengths=(16, 32)
        ),
        "inverse_permutation_bare": replace(
            PUBLISHED_SUCCESSOR,
            task={"name": "inverse_permutation", "scratch": False},
            lengths=(16, 32),
        ),
        "multiplication": replace(
            PUBLISHED_SUCCESSOR, task={"name": "multiplication"}, lengths=(4, 5, 6)
        ),
    },
)

SUITES = {
    "state_tracking": STATE_TRACKING,
    "recall": RECALL,
    "in_context": IN_CONTEXT,
    "long_context": LONG_CONTEXT,
    "algorithmic": ALGORITHMIC,
}
"""The suites, by name."""
