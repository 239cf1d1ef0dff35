"""The table of ``statezoo dna bench``: our runs, classical methods, published numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from statezoo.dna.published import published

__all__ = ["Section", "bootstrap", "markdown"]


def bootstrap(right: NDArray[np.float64], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of ``[n]`` values when rows are drawn anew, by their percentiles.

    Values are means over seeds, so few differ: how often each is drawn is one multinomial.
    """
    values, counts = np.unique(right, return_counts=True)
    n = len(right)
    drawn = np.random.default_rng(0).multinomial(n, counts / n, size=draws)
    low, high = np.percentile(drawn @ values / n, [2.5, 97.5])
    return float(low), float(high)


class Section(NamedTuple):
    """What is known of one task.

    Attributes:
        name: Of the task.
        baselines: ``train``, ``val``, ``test`` sizes and ``scores`` by method.
        runs: What ``train_and_test`` returned, by network.
    """

    name: str
    baselines: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]]


def markdown(sections: list[Section], recipe: str) -> str:
    """The table, and what the numbers in it rest on."""
    lines = [
        "| task (train / val / test) | method | seeds | accuracy: mean (min-max) | 95 % interval "
        "over test rows | MCC | AUC |",
        "|---|---|---|---|---|---|---|",
    ]
    sources: list[str] = []
    for task, base, runs in sections:
        name = f"{task} ({base['train']} / {base['val']} / {base['test']})"
        for method, (accuracy, mcc, auc) in base["scores"].items():
            lines.append(_line(name, method, "", _three(accuracy), "", _three(mcc), _three(auc)))
        lines += [_network_line(name, network, found) for network, found in runs.items() if found]
        for number in published(task):
            if number.source not in sources:
                sources.append(number.source)
            model = f"{number.model} [{sources.index(number.source) + 1}]"
            is_accuracy, shown = number.metric == "accuracy", _three(number.value)
            cells = (shown, "", "", "") if is_accuracy else ("", "", "", shown)
            lines.append(_line(name, model, "", *cells))
    lines += ["", f"Networks: {recipe}.", "Baselines: the most frequent class; a tree that sees"]
    lines[-1] += (
        " the length alone; logistic regression on the base at each place, where all lengths are "
        "equal; logistic regression on which words of 6 bases occur."
    )
    lines += [f"[{number}] {source}." for number, source in enumerate(sources, start=1)]
    return "\n".join(lines) + "\n"


def _network_line(task: str, network: str, runs: list[dict[str, Any]]) -> str:
    accuracy = np.array([run["accuracy"] for run in runs])
    bits = [
        np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), np.uint8))[: run["n"]]
        for run in runs
    ]
    low, high = bootstrap(np.mean(bits, axis=0))
    mcc, auc = (float(np.mean([run[name] for run in runs])) for name in ("mcc", "auc"))
    return _line(
        task,
        f"**{Path(network).name}** ({runs[0]['parameters']:,} parameters)",
        str(len(runs)),
        f"{accuracy.mean():.3f} ({accuracy.min():.3f}-{accuracy.max():.3f})",
        f"{low:.3f}-{high:.3f}",
        f"{mcc:.3f}",
        _three(auc),
    )


def _three(value: float) -> str:
    return "" if value != value else f"{value:.3f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
