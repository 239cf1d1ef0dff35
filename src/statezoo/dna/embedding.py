"""One vector per sequence, whatever the architecture, into parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import torch
from torch import Tensor

from statezoo.datamodules.dna.fasta import Genome
from statezoo.datamodules.dna.sequence import reverse_complement
from statezoo.dna.output import Settings
from statezoo.dna.regions import Region, batches, genome_source, read_bed, whole
from statezoo.dna.scoring import Model, open_model, padded_batch

__all__ = ["embed"]

ROWS = 1024
"""Records per row group, which is also what a kill may cost."""


def embed(
    model: str | Model,
    out: str | Path,
    *,
    fasta: str | Path | None = None,
    bed: str | Path | None = None,
    genome: str | Path | None = None,
    layer: int = -1,
    pool: Literal["mean", "last", "max"] = "mean",
    rc: Literal["none", "average"] = "none",
    batch_size: int = 16,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write a vector for every record of a FASTA file or every region of a BED file.

    The stream of one layer is pooled over the tokens of the sequence, which is read without
    ``[BOS]``; what else is in the batch changes nothing. Columns: id, contig, start, end (from 0,
    half-open), strand, length, embedding (list of float32).

    Args:
        model: Checkpoint, folder of a run, exported folder or Hub id, of any kind of model; or an
            opened one.
        out: Parquet file to write.
        fasta: Sequences.
        bed: Regions of ``genome``, on the strand of their column 6.
        genome: FASTA that the regions are cut from.
        layer: 0 is the embedding, ``i`` the stream after block ``i``; -1 is the last, after the
            final norm, -2 the one before the last block.
        pool: Over the tokens: their mean, maximum, or the last token's own vector.
        rc: ``average`` takes the mean of the vectors of both strands.
        batch_size: Sequences at once.
        device: Where to run.

    Returns:
        Counts: records, and the width of the vectors.

    Raises:
        ValueError: If an input cannot be used, there is no such layer, or pyarrow is missing.
    """
    _pyarrow()
    if (fasta is None) == (bed is None) or (bed is None) != (genome is None):
        raise ValueError("embed needs --fasta, or --bed together with --genome.")
    if Path(out).suffix != ".parquet" or batch_size < 1:
        raise ValueError(
            f"embed needs --out that ends in .parquet and batch_size of at least 1; got {out}, "
            f"{batch_size}."
        )
    opened = open_model(model, device, "embed", ("causal", "masked", "classifier"), single=False)
    depth = opened.net.config.n_layers
    if not -depth - 1 <= layer <= depth:
        raise ValueError(f"the model has layers 0 to {depth} (or -{depth + 1} to -1), not {layer}.")
    source = Genome(str(fasta if bed is None else genome))
    regions = whole(source) if bed is None else read_bed(bed, source)
    empty = [region.name for region in regions if region.stop == region.start]
    if empty:
        raise ValueError(f"{fasta} has records without a base, such as {empty[0]!r}.")
    settings = {"source": genome_source(source), "bed": bed and [r[:5] for r in regions]}
    settings |= {"layer": layer % (depth + 1), "pool": pool, "rc": rc}
    settings["weights"] = opened.fingerprint
    run = Settings(out, "embed", settings)
    summary = {"records": len(regions), "width": opened.net.config.d_model}
    if run.finished is None:
        parts = Path(f"{out}.parts")
        _start(parts, run.settings)
        for number, group in enumerate(batches(regions, ROWS)):
            part = parts / f"{number:08d}.parquet"
            if not part.exists():
                vectors = [
                    vector
                    for batch in batches(group, batch_size)
                    for vector in _vectors(opened, source, batch, layer, pool, rc)
                ]
                _write(part, group, vectors)
        _join(sorted(parts.glob("*.parquet")), Path(out), run.settings)
        run.finish(summary)
        rmtree(parts)
    return summary


def _vectors(
    model: Model, genome: Genome, regions: Sequence[Region], layer: int, pool: str, rc: str
) -> list[list[float]]:
    sequences = [region.fetch(genome) for region in regions]
    found = _pooled(model, sequences, layer, pool)
    if rc == "average":
        other = _pooled(model, [reverse_complement(x) for x in sequences], layer, pool)
        found = (found + other) / 2
    vectors: list[list[float]] = found.tolist()
    return vectors


@torch.inference_mode()
def _pooled(model: Model, sequences: list[Any], layer: int, pool: str) -> Tensor:
    """Return ``[B D]``: the stream after a layer, pooled over the sequence's own tokens."""
    ids = [model.ids(x) for x in sequences]
    batch = padded_batch(ids, model.net.device)
    streams = model.net.base_model(**batch, output_hidden_states=True).hidden_states
    x: Tensor = streams[layer].float()
    lengths = torch.tensor([len(row) for row in ids], device=x.device)
    place = torch.arange(x.shape[1], device=x.device)
    own = (place < lengths[:, None])[..., None]  # [B T 1]
    if pool == "last":
        found = x[torch.arange(len(x), device=x.device), lengths - 1]
    elif pool == "max":
        found = x.masked_fill(~own, -torch.inf).amax(1)
    else:
        found = (x * own).sum(1) / lengths[:, None]
    return found.cpu()


def _start(parts: Path, settings: dict[str, Any]) -> None:
    """Make the folder of row groups, empty unless these settings began it."""
    note = parts / "settings.json"
    text = json.dumps(settings, indent=2)
    if parts.is_dir() and not (note.is_file() and note.read_text(encoding="utf-8") == text):
        rmtree(parts)
    parts.mkdir(exist_ok=True)
    note.write_text(text, encoding="utf-8")


def _write(path: Path, regions: Sequence[Region], vectors: list[list[float]]) -> None:
    pyarrow, parquet = _pyarrow()
    table = pyarrow.table(
        {
            "id": pyarrow.array([r.name for r in regions], pyarrow.string()),
            "contig": pyarrow.array([r.contig for r in regions], pyarrow.string()),
            "start": pyarrow.array([r.start for r in regions], pyarrow.int64()),
            "end": pyarrow.array([r.stop for r in regions], pyarrow.int64()),
            "strand": pyarrow.array([r.strand for r in regions], pyarrow.string()),
            "length": pyarrow.array([r.stop - r.start for r in regions], pyarrow.int64()),
            "embedding": pyarrow.array(vectors, pyarrow.list_(pyarrow.float32())),
        }
    )
    draft = path.with_suffix(".tmp")
    parquet.write_table(table, draft)
    os.replace(draft, path)


def _join(parts: list[Path], out: Path, settings: dict[str, Any]) -> None:
    """Copy row groups into one file, one at a time, with the settings in its metadata."""
    _, parquet = _pyarrow()
    draft = out.with_name(out.name + ".tmp")
    schema = parquet.read_schema(parts[0])
    with parquet.ParquetWriter(draft, schema.with_metadata({})) as writer:
        for part in parts:
            writer.write_table(parquet.read_table(part))
        writer.add_key_value_metadata({"statezoo": json.dumps(settings)})
    os.replace(draft, out)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # type: ignore[import-untyped,unused-ignore]
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            'embed writes parquet, which needs pyarrow: pip install "statezoo[dna]".'
        ) from error
    return pyarrow, parquet
