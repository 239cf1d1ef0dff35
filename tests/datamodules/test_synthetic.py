"""Synthetic problems as data; what is asked of every task, by one table for all of them."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from statezoo.datamodules import IGNORE, Synthetic
from statezoo.datamodules.synthetic import TASKS, make_task
from statezoo.lightning_modules import CausalLM


def solved(task, solver, count=1000, length=None) -> float:
    """Part of the scored positions that a solver gets right from the tokens up to each."""
    right = []
    for index in range(count):
        tokens, targets, _ = task.example(1, "test", index, length)
        read = tokens.tolist()
        right += [solver(read[: t + 1]) == targets[t] for t in np.flatnonzero(targets != IGNORE)]
    return float(np.mean(right))


def best_constant(task, length, count=1000) -> float:
    """Accuracy on fresh problems of the answer that was the most frequent before."""
    drawn = [task.example(2, "train", i, length).targets for i in range(2 * count)]
    seen, fresh = (np.concatenate(part) for part in (drawn[:count], drawn[count:]))
    constant = np.bincount(seen[seen != IGNORE]).argmax()
    return float((fresh[fresh != IGNORE] == constant).mean())


EVERY = sorted(TASKS)
SMALL = {"icll": {"max_length": 12}, "selective_copying": {"min_length": 64, "max_length": 64}}


def small(name: str):
    return make_task({"name": name, **SMALL.get(name, {})})


@pytest.mark.parametrize("name", EVERY)
def test_a_problem_is_a_function_of_its_number(name):
    task = small(name)
    for again in (task, small(name)):
        first, same = (x.example(3, "train", 5) for x in (task, again))
        assert all(np.array_equal(a, b) for a, b in zip(first[:2], same[:2], strict=True))
    others = [
        task.example(*key).tokens for key in [(4, "train", 5), (3, "val", 5), (3, "train", 6)]
    ]
    assert not any(np.array_equal(first.tokens, other) for other in others)


@pytest.mark.parametrize("name", EVERY)
def test_symbols_and_targets_are_ids(name):
    task = small(name)
    assert len(set(task.symbols)) == task.vocab_size
    for index in range(20):
        tokens, targets, _ = task.example(0, "train", index)
        scored = targets[targets != IGNORE]
        assert tokens.shape == targets.shape
        assert tokens.dtype == targets.dtype == np.int64
        assert len(scored)
        for ids in (tokens, scored):
            assert 0 <= ids.min() <= ids.max() < task.vocab_size
    assert len(task.write(tokens).split()) == len(tokens)


@pytest.mark.parametrize("name", EVERY)
def test_settings_and_tasks_are_documented(name):
    text = TASKS[name].__doc__
    assert all(f"        {field.name}: " in text for field in fields(TASKS[name]))
    assert "Source: " in text
    assert f"``{name}``" in Synthetic.__doc__


@pytest.mark.parametrize("name", EVERY)
def test_published_lengths_exist(name):
    task = TASKS[name]()
    for length in task.longer:
        task.check_length(length)
    with pytest.raises(ValueError, match=f"{task.name} needs length of at least .*, got 0"):
        task.check_length(0)


def test_lengths_of_training_are_uniform():
    task = make_task("parity")
    lengths = [len(task.example(0, "train", i).tokens) - 1 for i in range(4000)]
    counts = np.bincount(lengths, minlength=41)
    assert not counts[:3].any()
    assert len(counts) == 41
    assert abs(counts[3:] - 4000 / 38).max() < 4.5 * (4000 / 38) ** 0.5  # of a Poisson law


def test_batches_are_padded_on_the_right():
    batch = Synthetic(batch_size=8).windows("train")[0, [0, 1, 2, -1]]
    task = make_task("parity")
    for row, index in enumerate([0, 1, 2]):
        tokens, targets, _ = task.example(0, "train", index)
        n = len(tokens)
        assert batch["tokens"][row, :n].tolist() == tokens.tolist()
        assert batch["targets"][row, :n].tolist() == targets.tolist()
        assert (batch["targets"][row, n:] == IGNORE).all()
    assert (batch["targets"][3] == IGNORE).all()
    assert batch["n_bytes"] == 3
    assert "attention_mask" not in batch  # nothing after the end is scored, and nothing read before


def test_the_test_has_each_length_in_turn():
    data = Synthetic(test_lengths=[5, 9], test_examples=3, batch_size=3)
    short, long = list(data.test_dataloader())
    assert short["tokens"].shape == (3, 6)
    assert long["tokens"].shape == (3, 10)
    loaders = data.loaders_by_length("test")
    assert list(loaders) == [5, 9]
    assert torch.equal(next(iter(loaders[9]))["tokens"], long["tokens"])
    assert not torch.equal(next(iter(data.loaders_by_length()[9]))["tokens"][:3], long["tokens"])


def test_training_resumes_in_the_middle():
    def loader():
        return Synthetic(train_examples=40, batch_size=8).train_dataloader()

    whole, first = loader(), loader()
    want = [batch["tokens"].tolist() for _ in range(2) for batch in whole]
    reader = iter(first)
    got = [next(reader)["tokens"].tolist() for _ in range(3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    got += [batch["tokens"].tolist() for _ in range(2) for batch in second]
    assert got == want
    assert sorted(map(str, want[:5])) != sorted(map(str, want[5:]))  # another order


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sorting"}, "Synthetic needs a task of parity, .*; got 'sorting'"),
        ({"task": {"max_length": 9}}, "Synthetic needs a task of .*; got None"),
        (
            {"task": {"name": "parity", "n": 9}},
            "The task parity has min_length, max_length; got 'n'",
        ),
        (
            {"task": {"name": "parity", "min_length": 50}},
            "Parity needs min_length of at most max_length=40, got 50",
        ),
        (
            {"task": {"name": "parity", "max_length": "long"}},
            "Parity needs max_length to be a whole number, got 'long'",
        ),
        (
            {"task": {"name": "parity", "min_length": 0}},
            "Parity needs length of at least 1, got 0",
        ),
        ({"test_lengths": [0]}, "Parity needs length of at least 1, got 0"),
        ({"test_lengths": []}, "Synthetic needs a length in test_lengths at least, got none"),
        (
            {"batch_size": 0},
            r"Synthetic needs batch_size of at least 1 and below 2\*\*32, got 0",
        ),
        ({"seed": -1}, r"Synthetic needs seed of at least 0 and below 2\*\*32, got -1"),
        ({"val_examples": 0}, "Synthetic needs val_examples of at least 1"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(**settings)


def trainer(folder, steps):
    return Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*is smaller than.*")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_model_trains_and_goes_on_with_the_same_task_alone(tmp_path):
    def data(**task):
        return Synthetic({"name": "parity", **task}, batch_size=4, train_examples=16)

    def model():
        return CausalLM(["deltanet"], vocab_size=3, d_model=16, n_layers=1)

    run, found = trainer(tmp_path, 4), data(max_length=8)
    run.fit(model(), found)
    assert {"val/nll", "val/bits_per_answer"} <= set(run.callback_metrics)
    path = tmp_path / "x.ckpt"
    run.save_checkpoint(path)
    trainer(tmp_path, 6).fit(model(), data(max_length=8), ckpt_path=path)
    with pytest.raises(ValueError, match="the task parity is not what it was"):
        trainer(tmp_path, 6).fit(model(), data(max_length=9), ckpt_path=path)
