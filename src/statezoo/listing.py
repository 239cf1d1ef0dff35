"""What ``statezoo list`` shows, read off sources, shipped configs and metrics without torch."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from statezoo import shipped

SIZE = re.compile(r"_(tiny|small|\d+m)$")
STATEMENT = re.compile(
    r"([\d.]+) million parameters (?:on (bytes)|with a vocabulary of (\d+)), "
    r"([^,;]+ a (?:sequence|token)); ([^;]+)\."
)
"""Second line of every preset; tests/zoo/test_presets.py holds it against the model."""
WIDTH = 100
COLUMNS = ("preset", "parameters", "vocabulary", "state a sequence (float32)", "trains on")
TRAINED = ("model", "trained on", "parameters", "file", "held out", "transformer", "state")
TWIN = "transformer"
"""Family of the softmax models that the others are compared with."""
TASK_BASES = ("Task", "TokenTask", "LabelTask", "CausalLM")
NO_TASKS = ("TokenTask", "LabelTask", "OneMixer", "Hybrid")
"""Classes that tasks are made from, and what is made from those and is none by itself."""
NAMES = {"Attention": "Transformer"}
"""Modules whose names are not those of their mixers' classes."""


@dataclass(frozen=True)
class Preset:
    """A shipped config of a model, as its header and its file name describe it.

    Attributes:
        name: Name of the file, without ``.yaml``.
        model: Class of the model.
        title: What it is, without the paper.
        paper: Where it was published, such as ``arXiv:2312.06635``; or nothing.
        cells: Parameters, vocabulary, state of a sequence, what it trains on.
    """

    name: str
    model: str
    title: str
    paper: str
    cells: tuple[str, str, str, str]

    @property
    def architecture(self) -> str:
        """Name without the size."""
        return SIZE.sub("", self.name)

    @property
    def size(self) -> tuple[int, float]:
        """Order within an architecture: the plain name first, then by parameters."""
        return int(self.name != self.architecture), float(self.cells[0].split()[0])

    def matches(self, pattern: str) -> bool:
        """Say whether the pattern fits the preset, its architecture or its class."""
        return fits(pattern, self.name, self.architecture, self.model)


def fits(pattern: str, *names: str) -> bool:
    """Say whether a shell pattern fits one of the names, in either case."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in names)


def listing(pattern: str = "*") -> str:
    """Compose the lists of everything whose name fits ``pattern``, in at most 100 columns.

    Raises:
        ValueError: If there is no such name.
    """
    presets, others = configs()
    hybrid = ("Hybrid", "A stack of different mixers: the list of them repeats over the layers.")
    modules = dict([*classes("zoo", "Mixer"), hybrid])
    tasks = [x for base in TASK_BASES for x in classes("lightning_modules", base)]
    data = [x for base in ("SplitData", "LabelledData") for x in classes("datamodules", base)]
    covered = {preset.model for preset in presets}
    sections = {
        "architectures without a preset (--model)": {
            (name, what) for name, what in modules.items() if name not in covered
        },
        "tasks, of any mixers (--model)": {x for x in tasks if x[0] not in NO_TASKS},
        "data (--data)": {x for x in data if x[0] != "LabelledData"},
        "other configs (--config)": set(others),
    }
    text = table([preset for preset in presets if preset.matches(pattern)])
    for title, found in sections.items():
        rows = sorted((name, what) for name, what in found if fits(pattern, name))
        if rows:
            lines = aligned([(f"  {name}", what) for name, what in rows])
            text += [title, *(shortened(line, WIDTH) for line in lines), ""]
    if not text:
        raise ValueError(
            f"nothing is called {pattern!r}: statezoo list shows all names, statezoo list "
            "--pretrained those of trained models."
        )
    if pattern == "*":
        text.append(f"statezoo list --pretrained shows the {len(shipped.names())} trained models")
    return "\n".join(text)


def table(presets: Sequence[Preset]) -> list[str]:
    """Lay out presets, a row each, under the title of their architecture."""
    groups: dict[str, list[Preset]] = {}
    for preset in sorted(presets, key=lambda p: (p.architecture, p.size)):
        groups.setdefault(preset.architecture, []).append(preset)
    rows = [COLUMNS, *((f"  {p.name}", *p.cells) for group in groups.values() for p in group)]
    head, *lines = aligned(rows)
    text = ["architectures (--model) and their presets (--config)", "", head] if groups else []
    for group in groups.values():
        first = group[0]
        about = [x for x in (first.title, first.paper) if x and x != first.model]
        text += [f"{first.model}  {', '.join(about)}", *(lines.pop(0) for _ in group)]
    return [*text, ""] if groups else []


def pretrained_listing(pattern: str = "*") -> str:
    """Compose the table of the trained models whose name fits, in at most 100 columns.

    Their numbers are those of ``metrics.json``: the first result on the test split, that of the
    transformer trained beside on the same data, and the state of one sequence.

    Raises:
        ValueError: If there is no such model.
    """
    found = [name for name in shipped.names() if fits(pattern, name)]
    if not found:
        raise ValueError(
            f"no trained model is called {pattern!r}{shipped.near(pattern)}: "
            "statezoo list --pretrained shows all names."
        )
    rows = [trained(name) for name in found]
    widths = [max(map(len, column)) for column in zip(TRAINED, *rows, strict=True)]
    spare = WIDTH - sum(widths) - 2 * (len(widths) - 1)
    if spare < 0:
        rows = [(r[0], shortened(r[1], max(widths[1] + spare, 12)), *r[2:]) for r in rows]
    use = f'statezoo.load("{found[0]}"), --model {found[0]}, --model.pretrained {found[0]}'
    return "\n".join([*aligned([TRAINED, *rows]), "", shortened(use, WIDTH)])


def trained(name: str) -> tuple[str, ...]:
    """Return the cells of a trained model, as far as its ``metrics.json`` says."""
    said = metrics(name)
    if not said:
        return (name, "on the Hub", "", "", "", "", "")
    model = said.get("model", {})
    state = model.get("state_bytes")
    family, _, corpus = name.partition("-")
    twin = "" if family == TWIN else headline(metrics(f"{TWIN}-{corpus}"))
    return (
        name,
        str(said.get("data", {}).get("name", "")),
        f"{model['parameters'] / 1e6:.2f} M" if "parameters" in model else "",
        f"{model['bytes'] / 1e6:.1f} MB" if "bytes" in model else "",
        headline(said),
        twin.partition(" ")[0],
        "" if state is None else f"{state / 1e3:.1f} kB",
    )


def metrics(name: str) -> dict[str, Any]:
    """Read what was measured of a trained model; nothing where that is not here or unreadable."""
    try:
        said = json.loads((shipped.root() / name / shipped.METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def headline(said: dict[str, Any]) -> str:
    """Return the result that stands for a model, with its unit: bits per unit, else nats."""
    unit, results = said.get("unit", "token"), said.get("results", {})
    for split in ("test", "val"):
        for key, measure in ((f"bits_per_{unit}", "bits"), ("nll", "nats")):
            if (value := results.get(f"{split}/{key}")) is not None:
                return f"{value:.3f} {measure}/{unit}"
    return ""


def shortened(text: str, width: int) -> str:
    """Cut a text that is longer than ``width``, and show that it was."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Write rows of cells in columns, two spaces apart."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def configs() -> tuple[list[Preset], list[tuple[str, str]]]:
    """Return the presets among the shipped configs, and the others with their first comment."""
    presets, others = [], []
    for path, file in walk(files("statezoo") / "configs"):
        name, _, ending = path.rpartition(".")
        if ending != "yaml":
            continue
        text = file.read_text(encoding="utf-8")
        if preset := read(name, text):
            presets.append(preset)
        else:
            others.append((name, text.partition("\n")[0].lstrip("# ").partition(". ")[0]))
    return presets, others


def read(name: str, text: str) -> Preset | None:
    """Return the preset that a config's text describes, if it does."""
    title, statement, *_ = [line.lstrip("# ") for line in text.splitlines()] + ["", ""]
    said = STATEMENT.fullmatch(statement)
    model = re.search(r"^  class_path: *(?:\S*\.)?(\w+)", text, re.MULTILINE)
    if said is None or model is None:
        return None
    what, _, paper = title.removesuffix(".").rpartition(", arXiv:")
    millions, on_bytes, vocabulary, state, where = said.groups()
    state = state.replace(" of state", "").removesuffix(" a sequence")  # as the column says
    cells = (f"{millions} M", on_bytes or vocabulary, state, where)
    return Preset(name, model[1], what or title, paper and f"arXiv:{paper}", cells)


def walk(folder: Traversable, within: str = "") -> Iterator[tuple[str, Traversable]]:
    """Yield the files of a folder and of those in it, each after its path from the folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from walk(entry, f"{within}{entry.name}/")
        else:
            yield within + entry.name, entry


def classes(part: str, base: str) -> Iterator[tuple[str, str]]:
    """Yield the classes of a part of the library, with the first line of their documentation."""
    for path, file in walk(files("statezoo") / part):
        if not path.endswith(".py"):
            continue
        source = file.read_text(encoding="utf-8")
        if f"{base})" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and base in map(last_name, node.bases):
                text = ast.get_docstring(node) or ""
                yield NAMES.get(node.name, node.name), text.partition("\n")[0]


def last_name(base: ast.expr) -> str:
    """Return the last part of a dotted name."""
    return ast.unparse(base).rpartition(".")[2]
