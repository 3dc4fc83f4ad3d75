"""An analysis as pictures, drawn as figures 3, 4, 6, 7 and 8 of Hu et al. 2021 are: a row for each role, PNG and SVG.

Layers are numbered from 0, as in the model's names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Report = dict[str, Any]
Cell = tuple[Axes, str, np.ndarray, list[int] | None]
"""Panel, title, phi, and what its rows are numbered by."""
_COLOURS = ("#5e81ac", "#d08770", "#a3be8c", "#b48ead", "#ebcb8b", "#bf616a", "#4c566a")
_LAYERS = "viridis"
# Any: matplotlib's own type lists every key.
_STYLE: Any = {
    "figure.titlesize": 10,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
}
_PANEL_INCHES = (3.1, 2.6)
_SYMBOLS = {"a": "A", "b": "B", "right": "dW's right", "left": "dW's left"}


def figures_of(report: Report) -> dict[str, Callable[[], Figure]]:
    """What can be drawn of it, by the name of its file."""
    matplotlib.use("agg")
    drawn: dict[str, Callable[[], Figure]] = {"spectra": partial(_spectra, report)}
    if any(row["similarity"] for row in report["maps"]):
        drawn["similarity"] = partial(_similarity, report)
        if len(report["deltas"]) > 1:
            drawn["similarity_by_layer"] = partial(_similarity_by_layer, report)
    if report["base"]:
        drawn["weight_and_update"] = partial(_weight_and_update, report)
        drawn["amplification"] = partial(_amplification, report)
    return drawn


def save(draw: Callable[[], Figure], folder: Path, name: str) -> Path:
    """Draws it and writes it twice; the same report gives the same bytes. Returns the PNG."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=90)
    return folder / f"{name}.png"


def middle(layers: Sequence[int]) -> int:
    """Of 96 layers the 48th, as the paper has it."""
    return layers[(len(layers) - 1) // 2]


def four(layers: Sequence[int]) -> list[int]:
    """Of 96 layers the 1st, 32nd, 64th and 96th."""
    count = len(layers)
    return [layers[place] for place in sorted({0, *(max(0, count * third // 3 - 1) for third in (1, 2, 3))})]


def _spectra(report: Report) -> Figure:
    """Singular values of dW by layer, and effective ranks."""
    names, roles = _names(report), _roles(report)
    figure, panels = _grid(len(names), len(roles) + 1, "Singular values of dW")
    layers = _layers(report)
    colours = matplotlib.colormaps[_LAYERS]
    for line, (place, name) in zip(panels, enumerate(names), strict=True):
        for axes, role in zip(line, roles, strict=False):
            for layer, row in _of_role(report, role, place):
                s = row["singular_values"][: row["directions"]]
                axes.plot(range(1, len(s) + 1), s, color=colours(_place(layer, layers)), linewidth=0.9, marker="." if len(s) < 20 else None)
            axes.set(title=f"{role}: {name}", xlabel="direction", yscale="log")
        colour = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(layers[0], max(layers[-1], layers[0] + 1)), _LAYERS)
        figure.colorbar(colour, ax=line[len(roles) - 1], label="layer")
        for role, line_colour in zip(roles, _COLOURS * len(roles), strict=False):
            found = [(layer, row["effective_rank"]) for layer, row in _of_role(report, role, place) if row["effective_rank"]]
            if found:
                line[-1].plot(*zip(*found, strict=True), marker=".", label=role, color=line_colour)
        line[-1].set(title=f"effective rank: {name}", xlabel="layer")
        line[-1].set_ylim(bottom=0)
        line[-1].legend()
    return figure


def _similarity(report: Report) -> Figure:
    """Figures 3 and 4: one layer; all of it, its lower-left triangle, and two random matrices."""
    layer, (one, other) = middle(_compared(report)), _pair(report)
    rows = {row["role"]: row["similarity"] for row in report["maps"] if row["layer"] == layer and row["similarity"]}
    columns = max(len(_panels(phi)) for phi in rows.values())
    figure, panels = _grid(len(rows), columns, f"φ(i, j), layer {layer}: {one} (i, down) and {other} (j, across)")
    cells: list[Cell] = [
        (axes, f"{role}: {title}", values, None)
        for line, (role, phi) in zip(panels, rows.items(), strict=True)
        for axes, (title, values) in zip(line, _panels(phi), strict=False)
    ]
    return _heat(figure, panels, cells)


def _panels(phi: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """Of one map: title and values."""
    found = []
    for which in ("a", "b") if phi["a"] else ("right", "left"):
        if not phi[which]:
            continue
        values = np.array(phi[which])
        found.append((_SYMBOLS[which], values))
        side = min(values.shape)
        if values.shape[0] != values.shape[1] and side > 1:
            corner = values[:side, :side].copy()
            corner[np.triu_indices(side, 1)] = np.nan
            found.append((f"{_SYMBOLS[which]}, j <= i", corner))
    return [*found, ("random", np.array(phi["random"]))]


def _similarity_by_layer(report: Report) -> Figure:
    """Figures 6 and 7: layers from the first to the last."""
    (one, other), roles, layers = _pair(report), _roles(report), four(_compared(report))
    figure, panels = _grid(len(roles), len(layers), f"φ(i, j) by layer: {one} (i, down) and {other} (j, across)")
    found = {(row["role"], row["layer"]): row["similarity"] for row in report["maps"] if row["similarity"]}
    cells: list[Cell] = []
    for line, role in zip(panels, roles, strict=True):
        for axes, layer in zip(line, layers, strict=True):
            if phi := found.get((role, layer)):
                title, values = _panels(phi)[0]
                cells.append((axes, f"{role}, layer {layer}: {title}", values, None))
    return _heat(figure, panels, cells)


def _weight_and_update(report: Report) -> Figure:
    """Figure 8: W's right singular directions beside those of dW, and beside random ones."""
    layer = middle(_layers(report))
    rows = [row for row in report["maps"] if row["layer"] == layer]
    names = _names(report)
    figure, panels = _grid(len(rows), len(names) + 1, f"φ(i, j), layer {layer}: W (i, down) and dW (j, across), right singular directions")
    cells: list[Cell] = []
    for line, row in zip(panels, rows, strict=True):
        known = [(name, found["w_similarity"]) for name, found in zip(names, row["deltas"], strict=True) if found]
        shown = [(name, phi["right"], phi["i"]) for name, phi in known] + [("random", known[-1][1]["random"], known[-1][1]["i"])]
        cells += [(axes, f"{row['role']}: {name}", np.array(phi), i) for axes, (name, phi, i) in zip(line, shown, strict=False)]
    return _heat(figure, panels, cells)


def _amplification(report: Report) -> Figure:
    """The table of section 7.3 by layer: norms above, factors below."""
    names, roles = _names(report), _roles(report)
    figure, panels = _grid(2 * len(names), len(roles), "||U' W V|| with the directions U, V of dW, of W and of a random matrix")
    kinds = {"w_in_w": "in W's", "w_in_dw": "in dW's", "w_in_random": "in random", "dw_norm": "||dW||"}
    for place, name in enumerate(names):
        for axes, below, role in zip(panels[2 * place], panels[2 * place + 1], roles, strict=True):
            found = [(layer, row["amplification"]) for layer, row in _of_role(report, role, place) if row["amplification"]]
            norms = [(row["layer"], row["w"]["norm"]) for row in report["maps"] if row["role"] == role and row["w"]]
            axes.plot(*zip(*norms, strict=True), color="black", linestyle="--", label="||W||")
            for colour, (key, label) in zip(_COLOURS, kinds.items(), strict=False):
                axes.plot([layer for layer, _ in found], [row[key] for _, row in found], marker=".", color=colour, label=label)
            axes.set(title=f"{role}: {name}", yscale="log")
            factors = [(layer, row["factor"]) for layer, row in found if row["factor"]]
            below.plot([layer for layer, _ in factors], [factor for _, factor in factors], marker=".", color=_COLOURS[5])
            below.set(title=f"amplification factor: {role}", xlabel="layer")
            below.set_ylim(bottom=0)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds) + 1)
    return figure


def _heat(figure: Figure, panels: list[list[Axes]], cells: list[Cell]) -> Figure:
    """All in one range of colours; panels without a cell stay empty."""
    largest = max(float(np.nanmax(values)) for _, _, values, _ in cells)
    for axes in {axes for line in panels for axes in line} - {cell[0] for cell in cells}:
        axes.set_axis_off()
    for axes, title, values, i in cells:
        shown = axes.imshow(values, vmin=0, vmax=largest, aspect="auto", interpolation="nearest", cmap="magma")
        for axis, count, numbers in ((axes.yaxis, values.shape[0], i), (axes.xaxis, values.shape[1], None)):
            places = range(0, count, -(-count // 8))
            axis.set_ticks(places, [str((numbers or range(1, count + 1))[place]) for place in places])
        axes.set_title(title)
    figure.colorbar(shown, ax=[axes for line in panels for axes in line], label="φ", fraction=0.03, pad=0.01)
    return figure


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(max(5.0, columns * width), rows * height + 0.5), layout="constrained")
    figure.suptitle(title)
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]


def _of_role(report: Report, role: str, place: int) -> list[tuple[int, dict[str, Any]]]:
    """Layer and one delta's figures."""
    return [(row["layer"], row["deltas"][place]) for row in report["maps"] if row["role"] == role and row["deltas"][place]]


def _layers(report: Report) -> list[int]:
    return list(dict.fromkeys(row["layer"] for row in report["maps"]))


def _compared(report: Report) -> list[int]:
    return list(dict.fromkeys(row["layer"] for row in report["maps"] if row["similarity"]))


def _place(layer: int, layers: list[int]) -> float:
    return (layer - layers[0]) / max(1, layers[-1] - layers[0])


def _roles(report: Report) -> list[str]:
    return [entry["role"] for entry in report["summary"]]


def _names(report: Report) -> list[str]:
    """Short, of the deltas: first or second, and the LoRA rank."""
    return [_name(report, place) for place in range(len(report["deltas"]))]


def _pair(report: Report) -> tuple[str, str]:
    names = _names(report)
    return names[0], names[1] if len(names) > 1 else "random"


def _name(report: Report, place: int) -> str:
    ranks = sorted({rank for entry in report["summary"] for rank in entry["deltas"][place]["ranks"]})
    number = f"delta {place + 1}" if len(report["deltas"]) > 1 else "delta"
    return f"{number}, r = {', '.join(map(str, ranks))}" if ranks else number
