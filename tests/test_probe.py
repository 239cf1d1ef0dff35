"""Probes: what is measured, brought together, judged and kept; and one table, trained for real."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from statezoo.datamodules import Synthetic
from statezoo.datamodules.batch import IGNORE
from statezoo.main import main
from statezoo.probe import cell as cells
from statezoo.probe.measuring import measure, solved
from statezoo.probe.models import parse_models, placed
from statezoo.probe.published import expected
from statezoo.probe.results import bring_together, markdown, value
from statezoo.probe.run import plan_cells
from statezoo.probe.suites import SUITES

# Lightning calls names that jsonargparse has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIGNED = "deltanet:negative_eigenvalues=true"


class Oracle(nn.Module):
    """Says of problems that it knows what it is told, as log probabilities."""

    def __init__(self, data, split, length, say):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.said = {}
        for i in range(data.examples[split]):
            one = data.task.example(data.seed, split, i, length)
            self.said[one.tokens.tobytes()] = say(i, one)
        self.length = {len(key) // 8 for key in self.said}

    def model(self, input_ids):
        rows = []
        for row in input_ids.numpy():
            n = next(n for n in self.length if row[:n].tobytes() in self.said)
            law = self.said[row[:n].tobytes()]
            rows.append(torch.full((len(row), law.shape[1]), -9.0))
            rows[-1][:n] = torch.from_numpy(law)
        return type("Out", (), {"last_hidden_state": torch.stack(rows)})

    def lm_head(self, hidden):
        return hidden


def sure(one, width, targets=None):
    """Log probabilities that name the targets."""
    law = np.full((len(one.tokens), width), 1e-9, dtype=np.float32)
    targets = one.targets if targets is None else targets
    at = np.flatnonzero(targets != IGNORE)
    law[at, targets[at]] = 1
    return np.log(law / law.sum(-1, keepdims=True))


def words(**settings):
    return Synthetic(
        {"name": "group_words", "group": "S3", "min_length": 6, "max_length": 6},
        test_lengths=[6], test_examples=20, val_examples=20, **settings,
    )  # fmt: skip


def test_who_knows_all_answers_is_right():
    data = words()
    net = Oracle(data, "test", 6, lambda i, one: sure(one, data.vocab_size))
    found = measure(net, data, "test")[6]
    assert found["tokens"] == found["sequences"] == found["legal"] == 1
    assert found["cumulative"] == [1] * 6
    assert found["problems"], found["scored"] == (20, 120)
    assert found["nll"] < 1e-6
    assert net.training


def test_one_wrong_token_spoils_its_sequence_from_there_on():
    data = words()

    def say(i, one):
        targets = one.targets.copy()
        if i < 5:
            targets[3] = (targets[3] + 1) % 6
        return sure(one, data.vocab_size, targets)

    found = measure(Oracle(data, "test", 6, say), data, "test")[6]
    assert found["tokens"] == pytest.approx(1 - 5 / 120)
    assert found["sequences"] == 0.75
    assert found["cumulative"] == [1, 1, 0.75, 0.75, 0.75, 0.75]
    assert not solved(Oracle(data, "val", 6, say), data, "tokens")
    right = Oracle(data, "val", 6, lambda i, one: sure(one, data.vocab_size))
    assert solved(right, data, "sequences")


def test_true_laws_of_a_language_have_no_distance_and_even_ones_the_one_of_their_spread():
    data = Synthetic(
        {"name": "icll", "max_string": 8}, test_lengths=[10], test_examples=6, val_examples=1
    )

    def true(i, one):
        return np.log(np.maximum(one.laws, 1e-12)).astype(np.float32)

    found = measure(Oracle(data, "test", 10, true), data, "test")[10]
    assert found["legal"] == 1
    assert found["tokens"] < 1
    assert found["variation"] < 1e-5

    def even(i, one):
        return np.full((len(one.tokens), 20), -np.log(20), dtype=np.float32)

    got = measure(Oracle(data, "test", 10, even), data, "test")[10]
    problems = [data.task.example(0, "test", i, 10) for i in range(6)]
    scored = [law for one in problems for law in one.laws[one.targets != IGNORE]]
    assert got["variation"] == pytest.approx(np.mean([1 - (law > 0).sum() / 20 for law in scored]))
    assert "cumulative" not in got


# ------------------------------------------------------------------------ models


def test_models_are_known_by_what_differs_from_the_defaults():
    found = parse_models(f"transformer, gla+attention,{SIGNED},deltaproduct:n_householder=2")
    assert found == {
        "transformer": ({"name": "attention"},),
        "gla+attention": ({"name": "gla"}, {"name": "attention"}),
        SIGNED: ({"name": "deltanet", "negative_eigenvalues": True},),
        "deltaproduct:n_householder=2": ({"name": "deltaproduct"},),
    }
    with pytest.raises(ValueError, match=r"--models deltanet,mamba2"):
        parse_models(" , ")
    with pytest.raises(ValueError, match="KEY=VALUE, got 'n_heads'"):
        parse_models("gla:n_heads")
    with pytest.raises(ValueError, match="gated_deltanet"):
        parse_models("gated_deltnet")


def test_settings_of_the_task_give_way_to_those_of_the_model():
    settings = {"any": {"n_heads": 1, "d_conv": 0}, "mamba": {"d_conv": 1}}
    (gla,) = placed(parse_models("gla:n_heads=2")["gla:n_heads=2"], settings)
    assert gla == {"name": "gla", "n_heads": 2, "d_conv": 0}
    (mamba,) = placed(parse_models("mamba")["mamba"], settings)
    assert mamba == {"name": "mamba", "d_conv": 1}


# --------------------------------------------------------------------- published


@pytest.mark.parametrize(
    ("probe", "model", "text", "right", "wrong"),
    [
        ("parity", SIGNED, "1", 0.9, 0.5),
        ("modular_arithmetic", "mamba:negative_eigenvalues=true", "0.241", 0.3, 0.6),
        ("S5", "deltaproduct:n_householder=4", "pass", 0.95, 0.7),
        ("S5", "deltaproduct:n_householder=3", "fail", 0.2, 0.7),
        ("A5", "deltaproduct", "pass", 0.95, 0.7),
        ("Z2", "deltaproduct:negative_eigenvalues=false", "fail", 0.2, 0.95),
    ],
)
def test_published_values(probe, model, text, right, wrong):
    found = expected(probe, parse_models([model])[model])
    assert found.text == text
    assert found.agrees(right, {})
    assert not found.agrees(wrong, {})


def test_the_order_of_two_models_is_an_expectation_too():
    found = expected("icll", parse_models(["gla"])["gla"])
    assert found.agrees(0.5, {"transformer": 0.6})
    assert not found.agrees(0.7, {"transformer": 0.6})
    assert found.agrees(0.5, {}) is None
    assert expected("icll", parse_models(["kda"])["kda"]) is None


# ----------------------------------------------------------------------- results


def result(probe, model, seed, test, val=1.0, lr=1e-3, measured="tokens", chance=0.5):
    def at(x):
        return {"64": {"tokens": x, "sequences": x, "chance": chance, "problems": 9, "scored": 9}}

    cell = {"probe": probe, "model": model, "d_model": 32, "seed": seed, "lr": lr,
            "measure": measured, "task": {}, "lengths": [64]}  # fmt: skip
    return {"cell": cell, "test": at(test), "val": at(val), "steps": 5, "state_bytes": 10}


def test_learning_rates_are_chosen_by_validation_and_seeds_give_mean_and_best():
    found = [
        result("parity", SIGNED, 0, 1.0, val=0.6, lr=1e-2),
        result("parity", SIGNED, 0, 0.9, val=0.9, lr=1e-3),
        result("parity", SIGNED, 1, 0.5, val=0.5),
    ]
    (entry,) = bring_together(found, parse_models(SIGNED))
    assert [value(one) for one in entry.results] == pytest.approx([0.8, 0.0])
    assert (entry.mean, entry.best) == pytest.approx((0.4, 0.8))
    assert entry.agrees is False
    text = markdown([entry], "title", ["A note."])
    assert f"| `{SIGNED}` | 0.40 / 0.80 (1: DIFFERS) |" in text
    assert "0 of 1 published cells agree." in text
    assert f"- differs: `{SIGNED}` on parity: best 0.80, published 1 (Grazzi" in text


def test_a_sequence_has_no_chance_to_take_off():
    assert value(result("S3", "gla", 0, 0.7, measured="sequences")) == 0.7


# ------------------------------------------------------------------------ tables


def tiny(tmp_path, *more, seeds=1, tasks="Z2", models=f"gla,{SIGNED}"):
    return [
        "probe", "run", "--suite", "state_tracking", "--tasks", tasks, "--models", models,
        "--seeds", str(seeds), "--steps", "4", "--jobs", "1", "--out", str(tmp_path / "t.md"),
        *more,
    ]  # fmt: skip


def test_a_table_is_made_once_and_added_to(tmp_path, capsys):
    main(tiny(tmp_path))
    first = capsys.readouterr()
    assert "| `gla` | 0.00 at 24, 0.00 / 0.00 (fail: agrees) |" in first.out
    assert "1/2 Z2, gla" in first.err
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "t.cells").iterdir()}
    assert len(kept) == 2
    for name in ("t.csv", "t.png"):
        assert (tmp_path / name).stat().st_size > 100
    main(tiny(tmp_path, seeds=2, models="gla"))
    second = capsys.readouterr()
    assert "1 of 2 cells are in" in second.err
    assert "1/1 Z2, gla, width 32, seed 1" in second.err
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["length"]) for row in rows] == [
        (seed, length) for seed in "01" for length in ("24", "64", "128")
    ]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--suite", "state_traking"], "did you mean state_tracking"),
        (["--tasks", "S9"], "there is no task 'S9'"),
        (["--models", "mamba9"], "mamba2"),
        (["--models", "gla:heads=2"], "n_heads"),
        (["--models", "gla:n_heads=3"], "gla:n_heads=3 cannot be made for Z2 (width 32)"),
        (["--seeds", "0"], "seeds, steps and jobs must be at least 1, got 0"),
        (["--out", "t.txt"], "out must end in .md"),
        (["--out", "nowhere/t.md"], "there is no folder 'nowhere'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as ended:
        main([*tiny(tmp_path), *more])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert not (tmp_path / "t.cells").exists()


def test_every_suite_says_what_can_be_made():
    for suite in SUITES.values():
        for probes in (suite.quick, suite.paper):
            least = {
                name: replace(p, d_model=p.d_model[:1], lr=p.lr[:1]) for name, p in probes.items()
            }
            for one in plan_cells(least, parse_models(suite.models), 1):
                module, data = cells.build(replace(one, d_model=min(one.d_model, 64)))
                assert module.net.config.vocab_size == data.vocab_size
                assert max(data.test_lengths) == max(one.lengths)


def one_cell(**changes):
    probe = SUITES["state_tracking"].quick["Z2"]
    (found,) = plan_cells({"Z2": probe}, parse_models(SIGNED), 1, steps=12)
    return replace(found, examples=20, lengths=[24, 32], **changes)


def test_equal_cells_give_equal_numbers_and_other_settings_another_name(tmp_path):
    one = one_cell()
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        cells.run_cell(one, folder)
        found.append(json.loads((folder / f"{one.name}.json").read_text()))
        found[-1].pop("seconds")
    assert found[0] == found[1]
    assert one_cell(lr=1e-4).name != one.name == one_cell().name


def test_a_long_cell_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "LONG", 8)  # a checkpoint every 2 steps
    one = one_cell()
    cells.run_cell(one, tmp_path)
    file = tmp_path / f"{one.name}.json"
    whole = json.loads(file.read_text())
    file.unlink()
    from statezoo.probe import stopping

    def stop(self, trainer, *rest):
        if trainer.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stopping.StopWhenSolved, "on_train_batch_end", stop)
        with pytest.raises(SystemExit):  # what Lightning makes of it
            cells.run_cell(one, tmp_path)
    assert not file.exists()
    assert (tmp_path / one.name / "last.ckpt").is_file()
    cells.run_cell(one, tmp_path)
    again = json.loads(file.read_text())
    assert not (tmp_path / one.name).exists()
    assert again["test"] == whole["test"]
    assert again["steps"] == whole["steps"] == 12


def test_parity_needs_negative_eigenvalues(tmp_path):
    """One layer, trained on 24 bits, read at each of 64 (Grazzi et al., arXiv:2411.12537)."""
    probe = SUITES["state_tracking"].quick["Z2"]
    scores = {}
    for model in ("deltanet", SIGNED):
        (one,) = plan_cells({"Z2": probe}, parse_models([model]), 1)
        cells.run_cell(replace(one, steps=160, examples=50, lengths=[24, 64]), tmp_path)
    for file in tmp_path.glob("*.json"):
        found = json.loads(file.read_text())
        scores[found["cell"]["model"]] = value(found)
    assert scores[SIGNED] >= 0.9
    assert scores["deltanet"] <= 0.1


def test_a_training_that_diverges_is_a_result_too(tmp_path):
    one = one_cell(lr=1e30)
    line = cells.run_cell(one, tmp_path)
    found = json.loads((tmp_path / f"{one.name}.json").read_text())
    assert line.endswith("DIVERGED")
    assert found["diverged"]
    assert 0 < found["steps"] < 12
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


def test_stopped_runs_write_what_there_is(tmp_path, capsys, monkeypatch):
    from statezoo.probe import run as runner

    done = []

    def stop(cell, folder, device):
        if done:
            raise KeyboardInterrupt
        done.append(cell)
        return cells.run_cell(cell, folder, device)

    monkeypatch.setattr(runner, "run_cell", stop)
    with pytest.raises(SystemExit) as ended:
        main(tiny(tmp_path))
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert "stopped with 1 of 2 cells: the same command goes on" in said.err
    assert "| `gla` | 0.00 at 24, 0.00 / 0.00 (fail: agrees) |" in said.out
    assert "deltanet" not in said.out


def test_only_the_widest_models_are_held_against_publications():
    found = [result("mqar_8", "deltanet", 0, 0.1), result("mqar_8", "deltanet", 0, 1.0)]
    found[1]["cell"]["d_model"] = 64
    narrow, wide = bring_together(found, parse_models("deltanet"))
    assert narrow.expected is None
    assert wide.agrees


def test_the_share_of_right_sequences_is_drawn_by_token_and_other_values_by_length(tmp_path):
    from statezoo.probe.pictures import _curve, draw_curves

    words = result("S3", "gla", 0, 0.5, measured="sequences")
    words["test"]["64"]["cumulative"] = [1.0, 0.75, 0.5]
    assert _curve(words) == {1: 1.0, 2: 0.75, 3: 0.5}
    parity = result("parity", "gla", 0, 1.0)
    parity["test"]["128"] = {**parity["test"]["64"], "tokens": 0.75}
    assert _curve(parity) == {64: 1.0, 128: 0.5}
    (only,) = bring_together([result("mqar_8", "gla", 0, 1.0)], parse_models("gla"))
    assert not draw_curves(tmp_path / "a.png", [only])
    assert not (tmp_path / "a.png").exists()


def test_a_row_has_a_width_only_where_a_task_has_several():
    found = [result("S3", "gla", 0, 0.5), result("S4", "gla", 0, 0.7)]
    found[1]["cell"]["d_model"] = 64
    found[1]["test"]["8"] = {**found[1]["test"]["64"], "tokens": 1.0}
    models = parse_models("gla")
    one = markdown(bring_together(found, models), "title", [])
    assert "| `gla` | 0.00 / 0.00 (fail: agrees) | 1.00 at 8, 0.40 / 0.40 (fail: agrees) |" in one
    found.append(result("S4", "gla", 0, 0.5))
    two = markdown(bring_together(found, models), "title", [])
    assert "| `gla` | 64 | not run | 1.00 at 8, 0.40 / 0.40 (fail: agrees) |" in two


@pytest.mark.slow
def test_ctrl_c_ends_all_at_once_and_keeps_what_is_finished(tmp_path):
    given = [*tiny(tmp_path, seeds=2, models="gla"), "--jobs", "2", "--steps", "100000"]
    command = [sys.executable, "-m", "statezoo", *given]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    ) as run:
        folder = tmp_path / "t.cells"
        deadline = time.monotonic() + 120
        while not any(folder.glob("*/*.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.2)
        began = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "stopped with 0 of 2 cells: the same command goes on" in said
    assert "Traceback" not in said
    assert time.monotonic() - began < 30
    assert any(folder.glob("*/last.ckpt"))


WORKER = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statezoo.probe.cell import begin_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), begin_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_a_worker_ends_when_its_table_is_killed(tmp_path):
    script = tmp_path / "table.py"
    script.write_text(WORKER)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it is there
        parent.kill()
    for _ in range(200):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").is_file():
            state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":  # no one is there to take note of its end
                return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker goes on alone")
