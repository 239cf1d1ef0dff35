"""benchmarks/streaming.py: memory of a document of a million tokens is that of a tenth of it."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "streaming.py"
GROWTH_MB = 16  # working space of the allocator; the 900,000 tokens more take 0.9 MB as text alone


def rows(*arguments):
    """Numbers of each row: tokens, peak, after loading, tokens/s, tokens/CPU s, bits."""
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|")[1:] for line in done.stdout.splitlines()[2:]]
    return [[float(cell.replace(",", "")) for cell in line] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gla-yeast", "mamba2-yeast"])
def test_a_million_tokens_take_no_more_memory_than_a_tenth(model):
    short, long = rows("--model", model, "--lengths", "100000", "1000000")
    assert (short[0], long[0]) == (100_000, 1_000_000)
    assert long[1] - short[1] < GROWTH_MB, (short[1], long[1])
    assert long[5] == pytest.approx(2, abs=0.1)  # random bases


@pytest.mark.slow
def test_attention_takes_more(tmp_path):
    """The measure sees growth where there is some: 20,000 tokens of 3 layers of 160 channels."""
    text = tmp_path / "a.txt"
    text.write_text("ACGTTGCA" * 100, encoding="utf-8")
    short, long = rows(
        "--model", "transformer-yeast", "--lengths", "2000", "22000", "--data", str(text)
    )
    assert long[1] - short[1] > 20_000 * 3 * 2 * 160 * 4 / 1e6
