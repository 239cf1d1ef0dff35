"""``statezoo dna bench`` on miniature folders of the forms that benchmarks have."""

import json
import math

import numpy as np
import pytest

from statezoo.dna import bench as module
from statezoo.dna.bench import Task, bench, find_tasks, train_and_test
from statezoo.dna.bench_table import Section, bootstrap, markdown
from statezoo.dna.published import published

pytest.importorskip("sklearn")


def planted(n, seed, length=24):
    """Class 1 begins with many A, class 0 with many C: anything that learns, learns this."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        s = rng.choice(list("ACGT"), size=length)
        s[: length // 2] = rng.choice(
            list("AC"), size=length // 2, p=(0.9, 0.1)[:: 1 - 2 * (i % 2)]
        )
        rows.append(("".join(s), 1 - i % 2))
    return rows


@pytest.fixture
def root(tmp_path):
    """Three data sets: train and test tables, a folder for each class, one table with splits."""
    place = tmp_path / "root"
    gue = place / "GUE" / "tf"
    gue.mkdir(parents=True)
    for seed, (split, n) in enumerate((("train", 80), ("dev", 20), ("test", 20))):
        text = "".join(f"{s},{y}\n" for s, y in planted(n, seed))
        (gue / f"{split}.csv").write_text("sequence,label\n" + text)
        for s, y in planted(n, seed + 9):
            if split != "dev":
                folder = place / "demo_human_or_worm" / split / ("worm" if y else "human")
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "all.txt").open("a") as file:
                    file.write(s + "\n")
    text = "".join(f"{s},{y}\n" for s, y in planted(20, 5))
    (place / "whole.csv").write_text("sequence,label\n" + text)
    (place / "notes.md").write_text("not a data set")
    return place


def test_finds_the_data_sets_of_each_form(root):
    found = find_tasks(str(root))
    assert [task.name for task in found] == ["GUE/tf", "demo_human_or_worm", "whole"]
    assert [task.name for task in find_tasks(str(root), "GUE/*, who?e")] == ["GUE/tf", "whole"]
    assert find_tasks(str(root / "GUE" / "tf")) == [Task("tf", str(root / "GUE" / "tf"))]


def test_mistakes(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder 'nowhere' of data sets"):
        find_tasks("nowhere")
    with pytest.raises(ValueError, match=r"no data set 'x'; it has GUE/tf, demo_human_or_worm,"):
        find_tasks(str(root), "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data set: bench needs folders with train"):
        find_tasks(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="at least one seed"):
        bench(root=str(root), seeds=0)
    broken = tmp_path / "t.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="is no file of finished runs"):
        bench(root=str(root), out=str(tmp_path / "t.md"))


def test_runs_prints_and_goes_on_where_it_was(root, tmp_path, capsys, monkeypatch):
    out = tmp_path / "made" / "table.md"
    done, real = [], train_and_test

    def counted(task, network, seed, recipe, **more):
        done.append((task.name, network, seed))
        if len(done) == 4:
            raise KeyboardInterrupt
        return real(task, network, seed, recipe, **more)

    monkeypatch.setattr(module, "train_and_test", counted)
    settings = {"root": str(root), "mixers": "gla", "seeds": 2, "steps": 25, "out": str(out)}
    settings |= {"d_model": 16, "n_layers": 1, "lr": 0.02}
    with pytest.raises(KeyboardInterrupt):
        bench(**settings)
    bench(**settings)
    tasks = ("GUE/tf", "demo_human_or_worm")
    assert done == [(t, "gla", s) for t in tasks for s in (0, 1)] + [(tasks[1], "gla", 1)]
    said, table = capsys.readouterr().out, out.read_text()
    assert table in said
    assert "whole: left out, it has no test split: add a column split" in said
    assert "GUE/tf gla seed 1: accuracy" in said
    assert f"(kept in {out.with_suffix('.json')})" in said
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| GUE/tf")]
    assert [row[1].split()[0] for row in rows] == [
        "majority", "length", "one_hot", "kmers", "**gla**",
    ]  # fmt: skip
    assert rows[0][0] == "| GUE/tf (80 / 20 / 20)"
    assert rows[0][3] == "0.500"
    assert float(rows[-1][3].split()[0]) > 0.8
    worm = [line for line in table.splitlines() if line.startswith("| demo_human_or_worm (72 / 8")]
    assert any("Caduceus-Ph [1] |  | 0.973" in line for line in worm)
    assert "[1] Schiff et al. 2024, arXiv:2403.03234, Table 1" in table
    kept = json.loads(out.with_suffix(".json").read_text())
    assert len(kept) == 2 + 4 + 1  # baselines, runs, and why one was left out
    bench(**settings)
    assert len(done) == 5  # nothing was run again


def test_command_line_reads_the_settings(root, tmp_path, monkeypatch):
    from statezoo.dna.commands import COMMANDS
    from statezoo.main import main

    assert COMMANDS["dna bench"] is bench
    monkeypatch.setattr(module, "train_and_test", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(SystemExit) as stop:
        main(["dna", "bench", "--root", str(root), "--tasks", "whole", "--out", f"{tmp_path}/t.md"])
    assert stop.value.code == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fine_tunes_the_network_of_a_run(root, tmp_path, monkeypatch):
    from statezoo.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STATEZOO_CACHE", str(tmp_path / "cache"))
    small = "--model.mixers [gla] --model.d_model 16 --model.n_layers 1 --trainer.max_steps 2"
    data = ["--data.path", str(root / "GUE" / "tf"), "--name", "base"]
    main(["fit", "--config", "dna/classify", *small.split(), *data])
    where = {"root": str(root), "tasks": "GUE/tf", "out": "t.md", "model": "runs/base"}
    bench(**where, seeds=1, steps=40, lr=1e-2)
    row = next(x for x in (tmp_path / "t.md").read_text().splitlines() if "**base**" in x)
    assert float(row.split("|")[4].split()[0]) > 0.8


def test_bootstrap_is_that_of_a_loop():
    rng = np.random.default_rng(1)
    right = rng.integers(0, 4, size=150) / 3
    means = [right[rng.integers(150, size=150)].mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    # percentiles of 4,000 draws are themselves random: their error is below a tenth of the width
    assert bootstrap(right) == pytest.approx((low, high), abs=0.1 * (high - low))
    assert bootstrap(np.ones(7)) == (1.0, 1.0)


def test_table_of_known_numbers():
    run = {"accuracy": 0.5, "mcc": 0.25, "auc": math.nan, "parameters": 1234, "n": 4, "right": "a0"}
    other = {**run, "accuracy": 0.75, "right": "e0"}
    base = {"train": 9, "val": 2, "test": 4, "scores": {"majority": [0.25, 0.0, 0.5]}}
    table = markdown([Section("x", base, {"org/gla": [run, other]})], "as told")
    assert "| x (9 / 2 / 4) | majority |  | 0.250 |  | 0.000 | 0.500 |" in table
    line = next(line for line in table.splitlines() if "gla" in line)
    assert line.startswith("| x (9 / 2 / 4) | **gla** (1,234 parameters) | 2 | 0.625 (0.500-0.750)")
    assert line.endswith("| 0.250 |  |")
    assert "Networks: as told." in table


def test_published_numbers_have_a_source():
    assert [n.value for n in published("Human-nonTATA_promoters")] == [
        0.861, 0.944, 0.933, 0.946, 0.945,
    ]  # fmt: skip
    assert {n.metric for n in published("gue_tf_0")} == {"AUC"}
    assert published("mine") == []
