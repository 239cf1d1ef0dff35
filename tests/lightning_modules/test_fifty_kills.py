"""A run that is killed again and again ends as if nothing had been."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fifty_kills.py"


@pytest.mark.parametrize(
    "kills", [pytest.param(4, id="few"), pytest.param(50, id="fifty", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_is_the_run_that_was_not(kills, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", str(kills), "--fork"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STATEZOO_CACHE": str(tmp_path)},
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^kill +\d+", done.stdout, re.MULTILINE)) == kills
    while_writing = re.search(r"(\d+) kills while writing", done.stdout)
    assert int(while_writing[1]) >= kills // 6
    assert done.stdout.count("equal: ") >= 10
