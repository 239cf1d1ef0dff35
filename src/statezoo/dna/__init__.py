"""Commands on genomes: what a trained model says of variants, sequences and tracks.

The functions have the names of the ``statezoo dna`` commands and do the same; what is heavy is
imported when one of them is first asked for.

Example:
    >>> from statezoo.dna import score_variants
    >>> score_variants("runs/gla-dna", "variants.vcf", "genome.fa", "scored.vcf", window=8192)
    {'records': 20, 'alternates': 23, 'scored': 14, 'renamed': 2, 'skipped': {...}}
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statezoo.dna.embedding import embed
    from statezoo.dna.mutations import mutagenesis
    from statezoo.dna.sampling import generate
    from statezoo.dna.scoring import Model, nll, open_model
    from statezoo.dna.tracks import perplexity
    from statezoo.dna.variants import score_variants

__all__ = [
    "Model",
    "embed",
    "generate",
    "mutagenesis",
    "nll",
    "open_model",
    "perplexity",
    "score_variants",
]

_HOMES = {
    "Model": "scoring",
    "embed": "embedding",
    "generate": "sampling",
    "mutagenesis": "mutations",
    "nll": "scoring",
    "open_model": "scoring",
    "perplexity": "tracks",
    "score_variants": "variants",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
