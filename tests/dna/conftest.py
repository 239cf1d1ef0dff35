"""A small genome and small random nets of several families, saved as users have them."""

import numpy as np
import pytest
import torch

from statezoo import zoo
from statezoo.datamodules.dna.tokenizers import Nucleotides
from statezoo.dna import Model

FAMILIES = {
    "gla": ["gla"],
    "mamba2": [{"name": "mamba2", "head_dim": 8, "d_state": 16}],
    "gated_deltanet": ["gated_deltanet"],
    "hybrid": ["gla", {"name": "attention", "n_heads": 2}],
}
HEADS = {
    "causal": zoo.StateZooForCausalLM,
    "masked": zoo.StateZooForMaskedLM,
    "classifier": zoo.StateZooForSequenceClassification,
}


def make_net(kind="causal", family="gla", seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 8, "d_model": 16, "n_layers": 2, "initializer_range": 0.3}
    config = zoo.StateZooConfig(mixers=FAMILIES[family], **(sizes | settings))
    net = HEADS[kind](config).eval()
    with torch.no_grad():  # likelihoods that differ much between bases
        for name, parameter in net.named_parameters():
            if name == "lm_head.weight":
                parameter.mul_(3)
    return net


def make_model(kind="causal", family="gla", **settings):
    return Model(make_net(kind, family, **settings), Nucleotides(), kind)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder of a saved net by kind and family."""
    done = {}

    def save(kind="causal", family="gla", **settings):
        key = (kind, family, str(settings))
        if key not in done:
            folder = tmp_path_factory.mktemp("net")
            make_net(kind, family, **settings).save_pretrained(folder)
            Nucleotides().save(folder)
            done[key] = str(folder)
        return done[key]

    return save


def write_fasta(path, contigs, width=60):
    lines = []
    for name, bases in contigs.items():
        lines += [f">{name}", *(bases[i : i + width] for i in range(0, len(bases), width))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def genome(tmp_path):
    """Contigs chr1 (2,000 bases, some soft-masked, some N, one R) and chr2 (300)."""
    rng = np.random.default_rng(0)
    one = "".join(rng.choice(list("ACGT"), 2000))
    one = one[:700] + one[700:760].lower() + one[760:900] + "N" * 30 + one[930:]
    one = one[:1500] + "R" + one[1501:]
    two = "".join(rng.choice(list("ACGT"), 300))
    contigs = {"chr1": one, "chr2": two}
    return write_fasta(tmp_path / "genome.fa", contigs), contigs
