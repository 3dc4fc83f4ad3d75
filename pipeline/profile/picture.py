"""A profile as one picture: memory through a step, where its time goes, the slowest modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = {"held": "#4c566a", "gathered": "#d08770", "kept": "#5e81ac", "working": "#a3be8c"}
_TIMES = {
    "data": "#b48ead", "gather": "#d08770", "forward": "#5e81ac", "backward": "#81a1c1",
    "reduce": "#ebcb8b", "optimizer": "#a3be8c", "other": "#d8dee9", "save": "#bf616a",
}  # fmt: skip
_MODULES = 10


def draw(report: dict[str, Any], file: Path) -> None:
    """Writes a PNG."""
    matplotlib.use("agg")
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplot_mosaic([["memory", "memory"], ["time", "modules"]], width_ratios=(1, 2), height_ratios=(5, 4))
    _memory(axes["memory"], report["memory"])
    _times(axes["time"], report["time"])
    _modules(axes["modules"], report["modules"])
    figure.savefig(file, dpi=110)


def _memory(axes: Axes, held: dict[str, Any]) -> None:
    rows, parts = held["timeline"], held["parts"]
    fixed = sum(parts[name]["measured"] for name in ("base_shard", "delta", "gradients", "optimizer"))
    unit, name = (2**30, "GiB") if parts["backward"]["measured"] > 2**31 else (2**20, "MiB")
    seconds = [row["s"] for row in rows]
    layers = [[fixed / unit] * len(rows), *([row[part] / unit for row in rows] for part in ("gathered", "kept", "working"))]
    labels = ["base shard, delta, optimizer", "gathered weights", "kept for backward", "in work"]
    axes.stackplot(seconds, *layers, labels=labels, colors=list(_COLOURS.values()), step="post")
    planned = parts["backward"]["predicted"] / unit
    axes.axhline(planned, color="black", linewidth=1, linestyle="--", label=f"the plan's most: {planned:,.0f} {name}")
    top = max(planned, parts["backward"]["measured"] / unit)
    for one in held["phases"]:
        if one["phase"] in ("forward", "backward", "reduce"):
            axes.axvline(one["s"], color="black", linewidth=0.5, alpha=0.5)
            axes.text(one["s"], 1.13 * top, f" {one['phase']}", fontsize=8, va="top", rotation=90 if len(held["phases"]) > 12 else 0)
    axes.set(title="Memory of the first rank through one step", xlabel="seconds", ylabel=name, ylim=(0, 1.15 * top))
    axes.margins(x=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, fontsize=8, frameon=False)


def _times(axes: Axes, time: dict[str, Any]) -> None:
    bottom, whole = 0.0, sum(time["split_s"].values())
    for name, seconds in time["split_s"].items():
        axes.bar(0.0, 1e3 * seconds, bottom=1e3 * bottom, color=_TIMES[name], width=0.5)
        if seconds > 0.03 * whole:
            axes.text(0, 1e3 * (bottom + seconds / 2), f"{name} {100 * seconds / whole:.0f} %", ha="center", va="center", fontsize=8)
        bottom += seconds
    axes.set(title="A step's time, mean of the ranks", ylabel="ms", xticks=[])


def _modules(axes: Axes, modules: list[dict[str, Any]]) -> None:
    rows = modules[:_MODULES][::-1]
    names = [row["module"] for row in rows]
    forward = [1e3 * row["forward_s"] for row in rows]
    axes.barh(names, forward, color=_TIMES["forward"], label="forward")
    axes.barh(names, [1e3 * row["backward_s"] for row in rows], left=forward, color=_TIMES["backward"], label="backward")
    axes.set(title="Slowest modules, their own work", xlabel="ms")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=8)
