"""Numbers that others have published for DNA benchmarks, as they stand in the named source.

Protocols differ (length of training, choice of learning rate, validation split), which moves a
number more than the architecture does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Published", "published"]


class Published(NamedTuple):
    """A number: ``metric`` is accuracy, MCC or AUC."""

    model: str
    value: float
    metric: str
    source: str


CADUCEUS = "Schiff et al. 2024, arXiv:2403.03234, Table 1, mean of 5 seeds"
CADUCEUS_MODELS = ("CNN 264K", "HyenaDNA 436K", "Mamba 468K", "Caduceus-Ph", "Caduceus-PS")
GENOMIC_BENCHMARKS = {
    "dummy_mouse_enhancers_ensembl": (0.715, 0.780, 0.743, 0.754, 0.793),
    "demo_coding_vs_intergenomic_seqs": (0.892, 0.904, 0.904, 0.915, 0.910),
    "demo_human_or_worm": (0.942, 0.964, 0.967, 0.973, 0.968),
    "human_enhancers_cohn": (0.702, 0.729, 0.732, 0.747, 0.745),
    "human_enhancers_ensembl": (0.744, 0.849, 0.862, 0.893, 0.900),
    "human_ensembl_regulatory": (0.872, 0.869, 0.814, 0.872, 0.873),
    "human_ocr_ensembl": (0.698, 0.783, 0.815, 0.828, 0.818),
    "human_nontata_promoters": (0.861, 0.944, 0.933, 0.946, 0.945),
}

FROZEN = (
    "Nature Communications 2025, s41467-025-65823-8, Tables 1-3, frozen embeddings; the split is "
    "not known to be the same"
)
FROZEN_MODELS = ("DNABERT-2", "NT-v2", "HyenaDNA", "Caduceus-Ph", "GROVER")
FROZEN_AUC = {
    "gue_prom_core_tata": (0.778, 0.795, 0.783, 0.810, 0.796),
    "gue_prom_300_tata": (0.765, 0.779, 0.808, 0.760, 0.780),
    "gue_tf_0": (0.838, 0.832, 0.830, 0.880, 0.862),
}


def published(task: str) -> list[Published]:
    """What is published for a task, by its folder's or file's name; nothing if it is unknown."""
    name = re.sub(r"[^a-z0-9]+", "_", task.lower())
    found = []
    for table, models, metric, source in (
        (GENOMIC_BENCHMARKS, CADUCEUS_MODELS, "accuracy", CADUCEUS),
        (FROZEN_AUC, FROZEN_MODELS, "AUC", FROZEN),
    ):
        for model, value in zip(models, table.get(name, ()), strict=False):
            found.append(Published(model, value, metric, source))
    return found
