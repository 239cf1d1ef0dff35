"""Decay, writes, memory length, routes and attention of a model, as PNG, npz and csv files."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from statezoo.zoo.observe import Seen

__all__ = ["save"]

Array = NDArray[np.float32]

SYMBOL_INCHES = 0.13
"""Width of a position whose symbol is written."""
WIDTH = (8.0, 24.0)
MAPS = 8
"""Attention maps side by side."""
MANY = 64
"""Heads of a layer above which they are drawn in the order of their memory lengths."""
BEYOND = 10
"""Memory lengths above so many times the input have one colour."""
TITLES = {
    "decay": "Decay: the part of its memory that a head keeps at each token",
    "write": "Write strength: how much of each token goes into the memory",
    "memory": "Memory length: tokens until what is written here has faded to 1/e",
    "router": "Router: the weight of each memory",
    "attention": "Attention: what each token (row) looks at (column)",
}


def save(seen: Sequence[Seen], symbols: Sequence[str], name: str, folder: Path) -> list[Path]:
    """Draw what was seen, and write its numbers.

    An npz has the array of its name, ``[layer head position]`` (``attention`` has two axes of
    positions, ``router`` memories for heads), NaN where a layer has fewer heads than another; the
    ``layers``, ``mixers``, ``views`` and ``memories`` of its first axis, as
    :class:`~statezoo.zoo.observe.Seen` has them; and the ``symbols`` of positions. ``memory.npz``
    has ``longest`` as well, ``write.npz`` has ``write_is``.

    Args:
        seen: What :func:`~statezoo.zoo.observe.observe` found.
        symbols: What each position reads.
        name: What was read.
        folder: Where to; made if need be.

    Returns:
        The files, pictures first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures, numbers = [], []
    for quantity in TITLES:
        having = [s for s in seen if getattr(s, quantity) is not None]
        if not having:
            continue
        picture = folder / f"{quantity}.png"
        draw = _draw_maps if quantity == "attention" else _draw_rows
        draw(picture, quantity, having, symbols, f"{TITLES[quantity]} ({name})")
        pictures.append(picture)
        numbers.append(folder / f"{quantity}.npz")
        np.savez_compressed(numbers[-1], **_arrays(quantity, having, symbols))
    summary = folder / "summary.csv"
    with summary.open("w", newline="", encoding="utf-8") as file:
        rows = [row for s in seen for row in _summary(s)]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [*pictures, *numbers, summary]


def _values(s: Seen, quantity: str) -> Array:
    found: Array = getattr(s, quantity).float().cpu().numpy()
    return found


def _sorted(s: Seen) -> bool:
    """Whether heads are drawn from short memory to long."""
    return s.decay is not None and s.memories == 1 and len(s.decay) > MANY


def _rows(s: Seen, quantity: str) -> Array:
    """Return values as drawn: NaN, drawn grey, where a memory is passed by and does nothing."""
    values = _values(s, quantity).copy()
    if quantity != "router" and _sorted(s):
        return values[np.argsort(np.median(_values(s, "memory"), axis=-1), kind="stable")]
    if s.router is not None and quantity in ("decay", "write"):
        shares = _values(s, "router")
        own = len(values) // s.memories
        passed = np.repeat(shares == 0, own, axis=0)
        values[-len(passed) :][passed] = np.nan
    return values


def _arrays(quantity: str, seen: Sequence[Seen], symbols: Sequence[str]) -> dict[str, Any]:
    """Lay layers into one array, heads that a layer has not NaN."""
    found: dict[str, Any] = {}
    for key in (quantity, "longest") if quantity == "memory" else (quantity,):
        each = [_values(s, key) for s in seen]
        found[key] = np.full((len(each), max(map(len, each)), *each[0].shape[1:]), np.nan, "f4")
        for i, values in enumerate(each):
            found[key][i, : len(values)] = values
    found["layers"] = np.array([s.layer for s in seen])
    found |= {"mixers": np.array([s.mixer for s in seen])}
    found |= {"views": np.array([s.view for s in seen])}
    found |= {"memories": np.array([s.memories for s in seen])}
    if quantity == "write":
        found["write_is"] = np.array([s.write_is for s in seen])
    return found | {"symbols": np.array(symbols)}


def _summary(s: Seen) -> list[dict[str, Any]]:
    """One row for each head, and one for each head of attention."""
    place = {"layer": s.layer, "mixer": s.mixer, "view": s.view}
    rows: list[dict[str, Any]] = []
    blank = dict.fromkeys(
        ("memory", "head", "mean_decay", "median_memory", "median_longest", "mean_write",
         "write_is", "mean_router_share", "mean_attention_distance"), "",
    )  # fmt: skip
    if s.decay is not None:
        decay, memory, longest, write = (
            _values(s, q) for q in ("decay", "memory", "longest", "write")
        )
        shares = None if s.router is None else _values(s, "router").mean(-1)
        own = len(decay) // s.memories
        for row in range(len(decay)):
            numbers = {
                "head": row % own,
                "mean_decay": f"{decay[row].mean():.6g}",
                "median_memory": f"{np.median(memory[row]):.6g}",
                "median_longest": f"{np.median(longest[row]):.6g}",
                "mean_write": f"{write[row].mean():.6g}",
                "write_is": s.write_is,
            }
            if shares is not None:
                m = row // own
                choice = m - (s.memories - len(shares))  # what there is no choice of comes first
                numbers["memory"] = m
                numbers["mean_router_share"] = f"{shares[choice]:.6g}" if choice >= 0 else "always"
            rows.append(place | blank | numbers)
    if s.attention is not None:
        weights = _values(s, "attention")
        t = np.arange(weights.shape[-1])
        far = (weights * np.abs(t[:, None] - t)).sum(-1).mean(-1)
        rows += [
            place | blank | {"head": h, "mean_attention_distance": f"{distance:.6g}"}
            for h, distance in enumerate(far)
        ]
    return rows


def _draw_rows(
    path: Path, quantity: str, seen: Sequence[Seen], symbols: Sequence[str], title: str
) -> None:
    """Draw a panel for each layer: heads downwards, positions to the right."""
    each = [_rows(s, quantity) for s in seen]
    T = len(symbols)
    heights = [min(max(0.17 * len(values), 0.62), 2.4) for values in each]
    ticks = _ticks(symbols)
    width = min(max(WIDTH[0], SYMBOL_INCHES * T + 2.2 if len(ticks[0]) == T else 12.0), WIDTH[1])
    figure = _figure(width, sum(heights) + 0.3 * len(each) + 1.2)
    axes = figure.subplots(len(each), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    shared = None if quantity == "write" else _scale(quantity, each, seen, T)
    image = None
    for axis, values, s in zip(axes, each, seen, strict=True):
        scale = shared or _scale(quantity, [values], [s], T)
        image = axis.imshow(values, aspect="auto", interpolation=_smooth(values), **scale)
        _label_heads(axis, quantity, s, values)
        _label_positions(axis.xaxis, symbols, ticks)
        if shared is None:
            figure.colorbar(image, ax=axis, label=s.write_is, pad=0.01, aspect=8)
    if shared is not None:
        extend = "both" if quantity == "memory" else "neither"
        label = {"decay": "part kept", "memory": "tokens", "router": "weight"}[quantity]
        _bar(figure, image, axes, label, extend)
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


def _scale(quantity: str, each: Sequence[Array], seen: Sequence[Seen], T: int) -> dict[str, Any]:
    """Choose colours: decay from the lowest to 1, memory length in orders of magnitude."""
    import matplotlib
    from matplotlib.colors import LogNorm

    if quantity == "memory":
        colours = matplotlib.colormaps["viridis"].with_extremes(over="#fff7bc", under="#1b0030")
        return {"cmap": colours, "norm": LogNorm(1, BEYOND * max(T, 2))}
    if quantity == "router":
        return {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0}
    flat = np.concatenate([values[~np.isnan(values)] for values in each])
    name = "magma" if quantity == "decay" else "Oranges"
    colours = matplotlib.colormaps[name].with_extremes(bad="#d9d9d9")
    if quantity == "decay":
        low = float(np.quantile(flat, 0.01))
        return {"cmap": colours, "vmin": min(low, 0.99), "vmax": 1.0}
    most = float(np.quantile(flat, 0.99)) or 1.0
    if seen[0].write_is == "beta":
        most = 1.0 if flat.max() <= 1 else 2.0
    return {"cmap": colours, "vmin": 0.0, "vmax": most}


def _smooth(values: Array) -> str:
    """Average rows where there are more of them than the picture has lines."""
    return "antialiased" if len(values) > MANY else "nearest"


def _label_heads(axis: Any, quantity: str, s: Seen, values: Array) -> None:
    n = len(values)
    axis.set_title(", ".join(filter(None, (f"layer {s.layer}: {s.mixer}", s.view))),
                   fontsize=8, loc="left", pad=2)  # fmt: skip
    axis.tick_params(axis="y", labelsize=6, length=2)
    if quantity == "router":
        more = s.memories - n
        labels = [f"memory {m + more}: {share:.0%}" for m, share in enumerate(values.mean(-1))]
        axis.set_yticks(range(n), labels)
    elif s.memories > 1:
        own = n // s.memories
        axis.set_yticks([own * (m + 0.5) - 0.5 for m in range(s.memories)],
                        [f"memory {m}" for m in range(s.memories)])  # fmt: skip
        for m in range(1, s.memories):
            axis.axhline(own * m - 0.5, color="white", linewidth=0.8)
    elif _sorted(s):
        axis.set_yticks([0, n - 1], ["shortest", "longest"])
        axis.set_ylabel(f"{n} heads, by memory", fontsize=6)
    else:
        step = max(1, -(-n // 8))
        axis.set_yticks(range(0, n, step), [f"head {h}" for h in range(0, n, step)])


def _draw_maps(
    path: Path, quantity: str, seen: Sequence[Seen], symbols: Sequence[str], title: str
) -> None:
    """Draw a map for each head of each layer, a row or more of maps for a layer."""
    from matplotlib.colors import PowerNorm

    each = [_values(s, quantity) for s in seen]
    maps = [
        (s, h, values[h]) for s, values in zip(seen, each, strict=True) for h in range(len(values))
    ]
    columns = min(MAPS, max(map(len, each)))
    rows = [-(-len(values) // columns) for values in each]
    T = len(symbols)
    ticks = _ticks(symbols, most=40)
    size = min(max(2.0, 0.12 * T if len(ticks[0]) == T else 2.0), 5.0)
    figure = _figure(max(size * columns + 1.4, 5.0), (size + 0.45) * sum(rows) + 0.7)
    axes = figure.subplots(sum(rows), columns, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat:
        axis.set_visible(False)
    weights = np.concatenate([values[values > 0] for values in each])
    norm = PowerNorm(0.5, 0, float(np.quantile(weights, 0.99)))
    image, place = None, 0
    for number, (s, h, weights) in enumerate(maps):
        place += (-place) % columns if h == 0 and number else 0
        axis = axes.flat[place]
        axis.set_visible(True)
        image = axis.imshow(weights, cmap="Greys", norm=norm, interpolation="antialiased")
        name = ", ".join(filter(None, (f"layer {s.layer}: {s.mixer}", s.view)))
        axis.set_title(
            f"{name}\nhead {h}" if h % columns == 0 else f"head {h}", fontsize=7, loc="left", pad=2
        )
        _label_positions(axis.xaxis, symbols, ticks)
        _label_positions(axis.yaxis, symbols, ticks)
        place += 1
    _bar(figure, image, axes, "weight", "max")
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


def _ticks(symbols: Sequence[str], most: int = 150) -> tuple[list[int], list[str]]:
    """Choose positions to mark, and their symbols: all where that is legible, bars, or numbers."""
    T = len(symbols)
    if most >= T:
        return list(range(T)), list(symbols)
    bars = [t for t, symbol in enumerate(symbols) if symbol.startswith("Bar_")]
    if bars:
        step = max(1, -(-len(bars) // 40))
        return bars[::step], [f"bar {n}" for n in range(1, len(bars) + 1)][::step]
    return [], []


def _label_positions(axis: Any, symbols: Sequence[str], ticks: tuple[list[int], list[str]]) -> None:
    """Write symbols at an axis; upright where they are longer than a character or two."""
    positions, labels = ticks
    if not positions:
        axis.set_tick_params(labelsize=7)
        return
    longest = max(map(len, labels))
    axis.set_ticks(positions, labels, parse_math=False, fontsize=6 if longest > 2 else 7)
    axis.set_tick_params(length=0 if len(positions) == len(symbols) else 2)
    if longest > 2 and axis.axis_name == "x":
        axis.set_tick_params(rotation=90)


def _bar(figure: Any, image: Any, axes: Any, label: str, extend: str) -> None:
    """Draw the scale that all panels share, at most so long that one sees it at once."""
    part = min(1.0, 4.0 / figure.get_size_inches()[1])
    figure.colorbar(
        image, ax=list(np.ravel(axes)), label=label, extend=extend, extendfrac=0.04, pad=0.01,
        fraction=0.04, aspect=25, shrink=part, anchor=(0.0, 1.0),
    )  # fmt: skip


def _figure(width: float, height: float) -> Any:
    """Return a figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # in the user's text
        figure.savefig(path, dpi=110)
