"""A net trained on a motif tells which variants break it."""

import numpy as np
import pytest
import torch
from tests.dna.conftest import make_model, write_fasta

from statezoo.dna import mutagenesis, score_variants

MOTIF = "TATAATGCCGTC"


@pytest.mark.slow  # trains a net
def test_variants_in_a_learnt_motif_score_lower(tmp_path):
    rng = np.random.default_rng(0)
    model = make_model(d_model=32, initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=5e-3)
    motif = model.ids(np.frombuffer(MOTIF.encode(), dtype=np.uint8)).numpy()
    model.net.train()
    for _ in range(250):
        ids = rng.integers(3, 7, (16, 64))
        for row, at in zip(ids, rng.integers(0, 52, 16), strict=True):
            row[at : at + 12] = motif
        batch = torch.from_numpy(ids)
        optimizer.zero_grad()
        model.net(batch, labels=batch).loss.backward()
        optimizer.step()
    model.net.eval()
    text = "".join(rng.choice(list("ACGT"), 3000))
    places = list(range(40, 2900, 100))
    for at in places:
        text = text[:at] + MOTIF + text[at + 12 :]
    fasta = write_fasta(tmp_path / "g.fa", {"c": text})
    rows, breaks = [], []
    for at in places:
        for place, inside in ((at + 6, True), (at + 50, False)):
            alt = rng.choice([base for base in "ACGT" if base != text[place]])
            rows.append(f"c\t{place + 1}\t.\t{text[place]}\t{alt}\t.\t.\t.")
            breaks.append(inside)
    vcf = tmp_path / "v.vcf"
    vcf.write_text("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "\n".join(rows) + "\n")
    score_variants(model, vcf, fasta, tmp_path / "s.csv", window=64, rc="none")
    lines = (tmp_path / "s.csv").read_text().splitlines()[1:]
    llr = np.array([float(line.split(",")[5]) for line in lines])
    inside, outside = llr[np.array(breaks)], llr[~np.array(breaks)]
    auroc = (inside[:, None] < outside[None]).mean()
    assert auroc >= 0.9, f"AUROC {auroc:.3f}"
    mutagenesis(model, tmp_path / "m.csv", region="c:31-62", genome=fasta, flank=20)
    table = np.genfromtxt(tmp_path / "m.csv", delimiter=",", skip_header=1)[:, 3:]
    loss = table.sum(1)  # places 10 to 21 are the motif
    assert loss[12:20].mean() < loss[np.r_[0:8, 23:32]].mean() - 1
