"""Sharing the prefix is faster, and says the same."""

from argparse import Namespace

import pytest
from benchmarks.dna_variants import main, measure


def test_benchmark_prints_both_ways(capsys):
    main(["--d-model", "16", "--n-layers", "1", "--window", "128", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "3"]
    assert all(float(line.split()[-2]) < 1e-4 for line in lines)


@pytest.mark.slow  # wall times need a quiet machine
@pytest.mark.parametrize("mixers", ["gla", "mamba2", "gated_deltanet"])
def test_prefix_sharing_is_faster(mixers):
    sizes = {"d_model": 128, "n_layers": 2, "window": 4096, "variants": 1, "repeats": 5}
    one, three = measure(Namespace(mixers=mixers, device="cpu", **sizes))
    assert one["ratio"] > 1.25  # 1.33 at best, by the count of windows
    assert three["ratio"] > 1.5  # 1.6 at best
    assert max(one["largest_difference"], three["largest_difference"]) < 1e-4
