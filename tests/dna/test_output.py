"""Outputs go on after a kill and give the same bytes; foreign files stay as they are."""

import gzip
from itertools import chain

import pytest

from statezoo.dna.output import Lines, Settings

BATCHES = [[f"{i}\t{'ACGT' * (i % 50)}" for i in range(a, a + 7)] for a in range(0, 700, 7)]


def write(path, stop=None, settings=None):
    """Write all batches, or be killed before batch number ``stop``; return those computed."""
    computed = []
    with Lines(path, "demo", settings or {"seed": 0}, "#one\n#two\n") as out:
        if out.finished is not None:
            return None
        for number, batch in enumerate(BATCHES):
            if number == stop:
                return computed
            if not out.skip(len(batch)):
                computed.append(number)
                out.write(batch)
        out.finish({"rows": 700})
    return computed


@pytest.mark.parametrize("name", ["out.tsv", "out.tsv.gz"])
def test_what_was_cut_off_anywhere_gives_the_same_bytes(tmp_path, name):
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    text = gzip.decompress(whole) if name.endswith("gz") else whole
    assert text.decode().splitlines() == ["#one", "#two", *chain.from_iterable(BATCHES)]
    assert write(path) is None
    for size in (0, 1, 6, 20, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        computed = write(path)
        assert path.read_bytes() == whole, f"cut at {size}"
        assert size < len(whole) // 2 or len(computed) < 60, "nothing was kept"


def test_a_killed_run_goes_on(tmp_path):
    path, other = tmp_path / "a.tsv", tmp_path / "b.tsv"
    write(other)
    assert write(path, stop=40) == list(range(40))
    assert write(path) == list(range(40, 100))
    assert path.read_bytes() == other.read_bytes()


def test_other_settings_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "out.tsv"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(seed 0, now 1\): choose another --out"):
        write(path, settings={"seed": 1})
    path.with_name("out.tsv.run.json").unlink()
    with pytest.raises(ValueError, match="was not written by this command"):
        write(path)
    assert path.read_bytes() == before
    path.unlink()
    write(path, settings={"seed": 1})
    with pytest.raises(ValueError, match=r"no folder '.*nowhere'"):
        Settings(tmp_path / "nowhere" / "x", "demo", {})
